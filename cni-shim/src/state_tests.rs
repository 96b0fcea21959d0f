use std::fs;

use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::error::Code;

fn id(container: &str, ifname: &str) -> AttachmentId {
    AttachmentId { container: container.to_owned().try_into().expect("valid"), ifname: ifname.parse().expect("valid") }
}

fn saved(id: &AttachmentId) -> Saved {
    let config = json!({"name": "fabric"}).as_object().cloned().expect("an object");
    Saved { id: id.clone(), netns: Some("/run/netns/pod".into()), pod: None, config, attached: None }
}

fn attachments(dir: &TempDir) -> Attachments {
    Attachments::of(dir.path(), &"fabric".to_owned().try_into().expect("a name"))
}

#[test]
fn what_was_saved_is_read_back_listed_and_forgotten() {
    let dir = TempDir::new().expect("a folder");
    let (all, id) = (attachments(&dir), id("c1", "eth0"));
    drop(all.create(&saved(&id)).expect("saved"));
    let held = all.open(&id, Duration::ZERO).expect("opened").expect("there");
    assert_eq!(held.saved(), Some(saved(&id)));
    assert_eq!(all.all().expect("listed"), std::slice::from_ref(&id));
    held.forget().expect("removed");
    assert!(all.open(&id, Duration::ZERO).expect("no error").is_none());
    assert!(all.all().expect("listed").is_empty());
}

#[test]
fn containers_and_interfaces_with_dashes_do_not_share_a_file() {
    let dir = TempDir::new().expect("a folder");
    let all = attachments(&dir);
    let _one = all.create(&saved(&id("a-b", "c"))).expect("saved");
    let _two = all.create(&saved(&id("a", "b-c"))).expect("saved");
    assert_eq!(all.all().expect("listed").len(), 2);
}

#[test]
fn of_two_that_create_at_once_one_wins_and_stays_whole() {
    let dir = TempDir::new().expect("a folder");
    let (all, id) = (attachments(&dir), id("c1", "eth0"));
    let _first = all.create(&saved(&id)).expect("saved");
    let mut other = saved(&id);
    other.netns = None;
    let error = all.create(&other).expect_err("it exists");
    assert_eq!(error.code(), Code::AlreadyAttached);
    assert_eq!(all.read(&id), Some(saved(&id)));
    assert_eq!(fs::read_dir(&all.dir).expect("a folder").count(), 1, "the loser leaves no draft");
}

#[test]
fn spoiled_file_that_is_still_json_is_none_and_one_without_a_checksum_is_read() {
    let id = id("c1", "eth0");
    let mut other = saved(&id);
    other.config.insert("mtu".into(), json!(1450));
    let whole = String::from_utf8(other.encode().expect("encoded")).expect("text");
    assert_eq!(Saved::decode(whole.as_bytes()), Some(other.clone()));
    assert_eq!(Saved::decode(whole.replace("1450", "1451").as_bytes()), None);
    assert_eq!(Saved::decode(&serde_json::to_vec(&other).expect("encoded")), Some(other));
}

#[test]
fn cables_are_remembered_when_they_are_known_and_a_cut_line_is_none() {
    let dir = TempDir::new().expect("a folder");
    let (all, id) = (attachments(&dir), id("c1", "eth0"));
    let held = all.create(&saved(&id)).expect("saved");
    assert_eq!(all.read(&id).expect("whole").attached, None);
    let attached = Attached { ports: vec!["veth1".into()], ..Attached::default() };
    held.attached(&attached);
    assert_eq!(all.read(&id).expect("whole").attached, Some(attached));
    let whole = fs::read(&held.path).expect("a file");
    fs::write(&held.path, &whole[..whole.len() - 1]).expect("a file");
    assert_eq!(all.read(&id), Some(saved(&id)));
}

#[test]
fn busy_attachment_is_not_opened_and_says_who_to_ask() {
    let dir = TempDir::new().expect("a folder");
    let (all, id) = (attachments(&dir), id("c1", "eth0"));
    let _busy = all.create(&saved(&id)).expect("saved");
    let error = all.open(&id, Duration::from_millis(30)).expect_err("busy");
    assert_eq!(error.code(), Code::TryAgainLater);
}

#[test]
fn drafts_of_the_dead_are_swept_and_those_of_the_living_are_not() {
    let dir = TempDir::new().expect("a folder");
    let all = attachments(&dir);
    fs::create_dir_all(&all.dir).expect("a folder");
    for name in [".c1@eth0.7", ".c1@eth0.8", ".c2@eth0.9", "c1@eth0.json"] {
        fs::write(all.dir.join(name), "").expect("a file");
    }
    let living = File::open(all.dir.join(".c1@eth0.8")).expect("a file");
    living.lock().expect("locked");
    all.sweep_drafts(Some(&id("c1", "eth0")));
    let mut left = all.file_names().expect("listed");
    left.sort();
    assert_eq!(left, [".c1@eth0.8", ".c2@eth0.9", "c1@eth0.json"]);
    drop(living);
    all.sweep_drafts(None);
    assert_eq!(all.file_names().expect("listed"), ["c1@eth0.json"]);
}

proptest! {
    #[test]
    fn no_content_of_a_state_file_makes_it_panic_or_name_a_path(
        content in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..300),
            any::<(String, String)>().prop_map(|(container, ifname)| {
                json!({"containerID": container, "ifname": ifname, "netns": null, "config": {}}).to_string().into()
            }),
        ],
    ) {
        if let Some(saved) = Saved::decode(&content) {
            let name = format!("{}@{}", saved.id.container, saved.id.ifname);
            prop_assert!(!name.contains('/'));
        }
    }
}
