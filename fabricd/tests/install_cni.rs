//! `fabricd install-cni --only conflist --stay`, as the container beside the daemon runs it.

mod common;

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use self::common::{Stays, wait_until};

fn start(dir: &Path) -> Stays {
    let paths = [("--bin-dir", "bin"), ("--conf-dir", "net.d"), ("--run-dir", "run")];
    Stays::start(&["install-cni", "--only", "conflist", "--stay"], &paths.map(|(flag, name)| (flag, dir.join(name))))
}

fn tell(dir: &Path, state: &str) {
    let subnet = r#"{"network": "10.244.0.0/16", "subnet": "10.244.3.0/24"}"#;
    let node =
        format!(r#"{{"version": 1, "node": "node-1", "state": {state}, "ipv4": {subnet}, "mtu": 1450, "epoch": 1}}"#);
    let file = dir.join("run/node.json");
    fs::write(file.with_extension("new"), node).expect("written");
    fs::rename(file.with_extension("new"), file).expect("renamed");
}

#[test]
fn conflist_comes_with_readiness_comes_back_when_lost_and_stays_at_the_end() {
    let dir = TempDir::new().expect("a folder");
    let dir = dir.path();
    for folder in ["bin", "net.d", "run"] {
        fs::create_dir(dir.join(folder)).expect("a folder");
    }
    let conflist = dir.join("net.d/10-fabric.conflist");
    tell(dir, r#""not-ready", "code": "starting", "reason": "no lease yet""#);
    let stays = start(dir);
    #[expect(clippy::disallowed_methods, reason = "that nothing happens takes time to see")]
    thread::sleep(Duration::from_millis(500));
    assert!(!conflist.exists(), "the node is not ready");

    tell(dir, r#""ready""#);
    wait_until("the conflist of a ready node", || conflist.exists());
    fs::remove_file(&conflist).expect("removed");
    wait_until("a conflist that was removed", || conflist.exists());
    fs::write(&conflist, r#"{"plugins": [{"type": "fabric-cni", "readyTimeout": 0}]}"#).expect("written");
    wait_until("a conflist that was changed", || {
        fs::read_to_string(&conflist).is_ok_and(|text| !text.contains("readyTimeout"))
    });

    stays.terminate();
    assert!(conflist.exists());
}
