//! `pki` in a folder, looked at with a parser that didn't write it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use tempfile::TempDir;
use time::{Duration, OffsetDateTime};

use super::authority::ends_soon;
use super::{Pki, address};

const FILES: [&str; 6] = ["ca.crt", "ca.key", "server.crt", "server.key", "client.crt", "client.key"];

fn pki(dir: &Path, args: &[&str]) -> anyhow::Result<()> {
    let line = ["fabricd", "pki"].into_iter().chain(args.iter().copied());
    let line = line.chain(["--out", dir.to_str().expect("a path")]).map(Into::into);
    Pki::asked(line).expect("it is asked for").run()
}

fn contents(dir: &TempDir) -> Vec<String> {
    FILES.map(|file| fs::read_to_string(dir.path().join(file)).expect(file)).into()
}

/// Which of the files have changed.
fn changed(before: &[String], after: &[String]) -> Vec<&'static str> {
    (0..FILES.len()).filter(|i| before[*i] != after[*i]).map(|i| FILES[i]).collect()
}

#[test]
fn init_makes_what_is_missing_and_touches_nothing_that_is_there() {
    let dir = TempDir::new().expect("a folder");
    pki(dir.path(), &["init", "--etcd-address", "192.0.2.10,etcd.example"]).expect("made");
    let first = contents(&dir);
    let mode = |file: &str| fs::metadata(dir.path().join(file)).expect(file).permissions().mode() & 0o777;
    assert_eq!((mode("ca.key"), mode("server.key"), mode("client.crt")), (0o600, 0o600, 0o644));
    pki(dir.path(), &["init", "--etcd-address", "192.0.2.10"]).expect("kept");
    assert_eq!(changed(&first, &contents(&dir)), Vec::<&str>::new());
    // An attempt that was cut short has left a key alone.
    fs::remove_file(dir.path().join("client.crt")).expect("removed");
    pki(dir.path(), &["init", "--etcd-address", "192.0.2.10"]).expect("completed");
    assert_eq!(changed(&first, &contents(&dir)), ["client.crt", "client.key"]);
}

#[test]
fn certificate_that_lacks_an_address_is_refused_and_renewed() {
    let dir = TempDir::new().expect("a folder");
    pki(dir.path(), &["init", "--etcd-address", "192.0.2.10"]).expect("made");
    let first = contents(&dir);
    let more = ["init", "--etcd-address", "192.0.2.10", "--etcd-address", "2001:DB8::0:11"];
    let error = pki(dir.path(), &more).expect_err("it lacks one").to_string();
    let (told, command) = error.split_once("; replace it with: fabricd pki ").expect("a command");
    assert!(told.contains("it is not for 2001:db8::11"), "{error}");
    assert_eq!(changed(&first, &contents(&dir)), Vec::<&str>::new());
    // As it is printed; the folder is what all commands here are given.
    let command = command.strip_suffix(&format!(" --out {}", dir.path().display())).expect("the folder");
    pki(dir.path(), &command.split(' ').collect::<Vec<_>>()).expect("renewed");
    assert_eq!(changed(&first, &contents(&dir)), ["server.crt", "server.key"]);
    pki(dir.path(), &more).expect("it has all now");
    pki(dir.path(), &["renew", "--all", "--etcd-address", "192.0.2.10"]).expect("renewed");
    assert_eq!(changed(&first, &contents(&dir)), ["server.crt", "server.key", "client.crt", "client.key"]);
}

#[test]
fn certificate_of_another_authority_is_refused_and_renewed() {
    let (dir, other) = (TempDir::new().expect("a folder"), TempDir::new().expect("a folder"));
    for dir in [&dir, &other] {
        pki(dir.path(), &["init", "--etcd-address", "192.0.2.10"]).expect("made");
    }
    for file in ["client.crt", "client.key"] {
        fs::copy(other.path().join(file), dir.path().join(file)).expect("copied");
    }
    let error = pki(dir.path(), &["init", "--etcd-address", "192.0.2.10"]).expect_err("another's").to_string();
    assert!(error.contains("client.crt can't be used: it is signed by another authority"), "{error}");
    pki(dir.path(), &["renew", "--etcd-address", "192.0.2.10"]).expect("renewed");
    pki(dir.path(), &["init", "--etcd-address", "192.0.2.10"]).expect("fits");
}

#[test]
fn certificate_ends_soon_when_a_third_of_its_life_is_left() {
    let dir = TempDir::new().expect("a folder");
    pki(dir.path(), &["init", "--etcd-address", "192.0.2.10", "--days", "90"]).expect("made");
    let server = fs::read_to_string(dir.path().join("server.crt")).expect("made");
    for (days, soon) in [(0, false), (59, false), (61, true), (91, true)] {
        let then = OffsetDateTime::now_utc() + Duration::days(days);
        assert_eq!(ends_soon(&server, then).expect("readable"), soon, "in {days} days");
    }
}

/// `pki node` for `name`, of the authority in `ca`, into `out`.
fn node(ca: &Path, name: &str, out: &Path, args: &[&str]) -> anyhow::Result<()> {
    let ca = ca.to_str().expect("a path");
    pki(out, &[&["node", "--ca", ca, "--name", name], args].concat())
}

fn nodes_files(dir: &TempDir) -> [String; 3] {
    ["ca.crt", "node.crt", "node.key"].map(|file| fs::read_to_string(dir.path().join(file)).expect(file))
}

#[test]
fn nodes_certificate_is_made_once_and_again_when_name_or_authority_or_life_do_not_fit() {
    let (ca, out) = (TempDir::new().expect("a folder"), TempDir::new().expect("a folder"));
    let error = node(ca.path(), "node-1", out.path(), &[]).expect_err("no authority").to_string();
    assert!(error.contains("fabricd pki ca"), "{error}");
    pki(ca.path(), &["ca"]).expect("made");
    let mode =
        |dir: &TempDir, file: &str| fs::metadata(dir.path().join(file)).expect(file).permissions().mode() & 0o777;
    assert_eq!((mode(&ca, "ca.key"), mode(&ca, "ca.crt")), (0o600, 0o644));

    node(ca.path(), "node-1", out.path(), &[]).expect("made");
    let first = nodes_files(&out);
    assert_eq!((mode(&out, "node.key"), mode(&out, "node.crt")), (0o600, 0o644));
    assert_eq!(first[0], fs::read_to_string(ca.path().join("ca.crt")).expect("made"));
    assert!(!out.path().join("ca.key").exists(), "a node has not the authority's key");
    pki(ca.path(), &["ca"]).expect("kept");
    node(ca.path(), "node-1", out.path(), &[]).expect("kept");
    assert_eq!(nodes_files(&out), first);

    // Another name, and back; garbage; a life that has less than a third left at once.
    node(ca.path(), "node-2", out.path(), &[]).expect("made");
    assert_ne!(nodes_files(&out)[1..], first[1..]);
    fs::write(out.path().join("node.crt"), "garbage").expect("written");
    node(ca.path(), "node-2", out.path(), &[]).expect("made");
    let whole = nodes_files(&out);
    fs::remove_file(out.path().join("node.key")).expect("removed");
    node(ca.path(), "node-2", out.path(), &[]).expect("made");
    assert_ne!(nodes_files(&out)[1..], whole[1..]);

    // Another authority: its certificate comes along.
    for file in ["ca.crt", "ca.key"] {
        fs::remove_file(ca.path().join(file)).expect("removed");
    }
    pki(ca.path(), &["ca"]).expect("made");
    let before = nodes_files(&out);
    node(ca.path(), "node-2", out.path(), &[]).expect("made");
    let after = nodes_files(&out);
    assert!(before.iter().zip(&after).all(|(before, after)| before != after));
    assert_eq!(after[0], fs::read_to_string(ca.path().join("ca.crt")).expect("made"));
}

#[test]
fn what_cannot_be_used_is_named() {
    let dir = TempDir::new().expect("a folder");
    for wrong in ["a b", "192.0.2.10:2379", "https://192.0.2.10", ""] {
        assert!(address(wrong).is_err(), "{wrong}");
    }
    let error = pki(dir.path(), &["renew", "--etcd-address", "192.0.2.10"]).expect_err("nothing there");
    assert!(format!("{error:#}").contains("fabricd pki init --etcd-address 192.0.2.10 --out "), "{error:#}");
    for (file, told) in [("ca.crt", "ca.key: No such file"), ("ca.key", "the authority's key")] {
        fs::write(dir.path().join(file), "garbage").expect("written");
        let error = pki(dir.path(), &["init", "--etcd-address", "192.0.2.10"]).expect_err("garbage");
        assert!(format!("{error:#}").contains(told), "{error:#}");
    }
}
