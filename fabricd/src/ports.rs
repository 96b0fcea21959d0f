//! Which pod is behind a port of the bridge: read from what `fabric-cni` remembers of each pod, whenever that changes.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use fabric_core::handoff::Attached;
use fabric_core::model::IfName;
use fabric_core::rules::Pod;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::sync::watch;
use tracing::warn;

use crate::backoff::Backoff;

/// Pods by the port that they are plugged into.
pub type PodPorts = BTreeMap<IfName, Pod>;

/// How long at most until a folder that can't be watched is read again.
const RETRY: Duration = Duration::from_secs(10);

/// The largest file that is read: the plugin's own limit.
const MAX_FILE: u64 = 2 << 20;

/// Follows the attachments below `dir`, a folder for each network. What can't be read is no pod: its port stays open
/// for every address of this node.
#[must_use]
pub fn follow(dir: PathBuf) -> watch::Receiver<Arc<PodPorts>> {
    let (sender, receiver) = watch::channel(Arc::default());
    // It waits in the kernel, so it has a thread of its own; that ends with the process.
    thread::spawn(move || {
        let mut retry = Backoff::new(Duration::from_millis(500), RETRY);
        while !sender.is_closed() {
            let began = Instant::now();
            if let Err(error) = publish_all(&dir, &sender) {
                retry.lasted(began.elapsed());
                if retry.attempts() == 0 {
                    warn!(dir = %dir.display(), %error, "cannot follow which pod is behind a port, trying again");
                }
                thread::sleep(retry.delay());
            }
        }
    });
    receiver
}

/// Reads everything anew after each change, until something fails or nobody listens.
fn publish_all(dir: &Path, sender: &watch::Sender<Arc<PodPorts>>) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let changes = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let written = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_DELETE_SELF;
    while !sender.is_closed() {
        // First watched, then read, so that nothing happens in between. Watching twice is watching once.
        changes.add_watch(dir, written)?;
        let networks: Vec<PathBuf> = entries(dir)?.into_iter().filter(|path| path.is_dir()).collect();
        for network in &networks {
            changes.add_watch(network, written)?;
        }
        let ports = Arc::new(read(&networks)?);
        sender.send_if_modified(|current| {
            let differs = *current != ports;
            *current = ports;
            differs
        });
        changes.read_events()?;
    }
    Ok(())
}

fn read(networks: &[PathBuf]) -> io::Result<PodPorts> {
    let mut ports = PodPorts::new();
    for network in networks {
        for file in entries(network)?.iter().filter(|file| file.extension().is_some_and(|end| end == "json")) {
            ports.extend(attached(file).into_iter().flat_map(|attached| pods(&attached)));
        }
    }
    Ok(ports)
}

/// What is saved of one pod; nothing of one that is just coming or going.
fn attached(file: &Path) -> Option<Attached> {
    let small = fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_FILE);
    small.then(|| Attached::decode(&fs::read(file).ok()?))?
}

fn pods(attached: &Attached) -> Vec<(IfName, Pod)> {
    let ips: BTreeSet<_> = attached.ips.iter().copied().collect();
    let Some(mac) = attached.mac.filter(|_| !ips.is_empty()) else { return vec![] };
    let ports = attached.ports.iter().filter_map(|port| port.parse().ok());
    ports.map(|port| (port, Pod { mac, ips: ips.clone() })).collect()
}

fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST_LINE: &str = "{}\n";
    const POD: &str = r#"{"ports":["veth7"],"mac":"02:42:c0:00:02:07","ips":["10.244.3.7","fd00:3::7"]}"#;

    #[tokio::test]
    async fn pods_that_come_and_go_are_heard_of() {
        let dir = tempfile::tempdir().expect("a folder");
        let mut ports = follow(dir.path().join("fabric"));
        let network = dir.path().join("fabric/pods");
        fs::create_dir_all(&network).expect("a folder");
        let file = network.join("c1@eth0.json");
        fs::write(&file, FIRST_LINE).expect("written");
        fs::write(network.join("c2@eth0.json"), "garbage").expect("written");
        fs::write(
            network.join("c3@eth0.json"),
            FIRST_LINE.to_owned() + &POD.replace("veth7", "not a port's name at all"),
        )
        .expect("written");
        fs::write(&file, FIRST_LINE.to_owned() + POD).expect("written");
        let known = ports.wait_for(|ports| !ports.is_empty()).await.expect("followed").clone();
        let pod = &known[&"veth7".parse().expect("valid")];
        assert_eq!((known.len(), pod.mac.to_string(), pod.ips.len()), (1, "02:42:c0:00:02:07".to_owned(), 2));
        fs::remove_file(file).expect("removed");
        ports.wait_for(|ports| ports.is_empty()).await.expect("followed");
    }
}
