use super::*;
use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::model::{MacAddr, PerFamily, Vni};
use fabric_core::record::Endpoint;

fn node() -> NodeName {
    "node-1".parse().unwrap()
}

fn config() -> NetworkConfig {
    NetworkConfig::decode(br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap()
}

fn holding() -> Holding {
    let vtep_mac = MacAddr::derived(&node(), Vni::DEFAULT, fabric_core::model::Family::V4);
    let endpoint = Endpoint { public_ip: "192.0.2.1".parse().unwrap(), vtep_mac, vni: Vni::DEFAULT };
    let key = LeaseKey::decode("10.244.3.0-24").unwrap();
    let own = Own { key, endpoints: PerFamily { v4: Some(endpoint), v6: None }, epoch: 7 };
    let mark = Mark { mod_revision: 41, lease_id: 77, ttl: Duration::from_secs(86_400) };
    let expires = Some(Instant::now() + Duration::from_secs(3600));
    Holding { own: Some(own), mark: Some(mark), expires, ..Holding::default() }
}

fn leases(revision: i64) -> LeaseSet {
    let value = r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"},"Fabric":{"v":1,"node":"node-2","boot":"b","netns":1,"epoch":1}}"#;
    let entry = Entry { key: "10.244.2.0-24".into(), value: value.into(), create_revision: 3, mod_revision: 4 };
    LeaseSet::snapshot(&LeaseSet::default(), vec![entry], revision)
}

fn uptime(boot: &str, seconds: u64) -> Uptime {
    Uptime { boot: boot.into(), seconds }
}

fn disk(dir: &tempfile::TempDir) -> Disk {
    let disk = Disk::new(dir.path(), &node());
    disk.save_lease(&config(), &holding(), &uptime("boot", 100)).unwrap();
    disk.save_peers(&leases(50)).unwrap();
    disk
}

#[tokio::test(start_paused = true)]
async fn everything_is_found_again_and_the_lease_ends_when_it_would_have() {
    let dir = tempfile::tempdir().unwrap();
    let state = disk(&dir).load(&uptime("boot", 700));
    let (lease, had) = (state.lease.unwrap(), holding());
    assert_eq!(state.network, Some(config()));
    assert_eq!((Some(&lease.own), lease.mark, lease.revision), (had.own.as_ref(), had.mark, 50));
    assert_eq!(lease.expires, Some(Instant::now() + Duration::from_secs(3000)));
    assert_eq!(state.leases.as_deref(), Some(&leases(50)));
}

#[tokio::test(start_paused = true)]
async fn how_long_a_lease_has_left_is_unknown_after_a_reboot_and_nothing_once_it_ran_out_or_was_lost() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(&dir);
    let expires = |now: Uptime| disk.load(&now).lease.unwrap().expires;
    assert_eq!(expires(uptime("another", 5)), None);
    assert_eq!(expires(uptime("boot", 99_999)), Some(Instant::now()));
    disk.save_lease(&config(), &Holding { expires: None, ..holding() }, &uptime("boot", 200)).unwrap();
    assert_eq!(expires(uptime("boot", 201)), Some(Instant::now()));
}

#[tokio::test(start_paused = true)]
async fn file_that_cannot_be_used_is_set_aside_and_the_other_one_counts() {
    let dir = tempfile::tempdir().unwrap();
    for (what, damage) in [
        ("empty", (|_: &[u8]| vec![]) as fn(&[u8]) -> Vec<u8>),
        ("cut", |file| file[..file.len() / 2].to_vec()),
        ("one bit turned", |file| {
            let mut file = file.to_vec();
            *file.last_mut().unwrap() ^= 1;
            file
        }),
        ("another version", |file| [b"fabricd-state 2 ", &file[16..]].concat()),
        ("something else", |_| b"\xff\x00 hello".to_vec()),
    ] {
        let disk = disk(&dir);
        let file = dir.path().join(LEASE);
        fs::write(&file, damage(&fs::read(&file).unwrap())).unwrap();
        let state = disk.load(&uptime("boot", 100));
        assert!(state.lease.is_none() && state.network.is_none(), "{what}");
        assert!(state.leases.is_some(), "{what}");
        assert!(!file.exists() && dir.path().join("lease.unusable").exists(), "{what}");
    }
    let stranger = Disk::new(dir.path(), &"node-2".parse().unwrap());
    disk(&dir);
    let copied = stranger.load(&uptime("another", 100));
    let lease = copied.lease.expect("it may be this machine's after all");
    assert_eq!((lease.formerly, lease.this_boot, copied.network, copied.leases), (Some(node()), false, None, None));
}

#[tokio::test(start_paused = true)]
async fn members_of_a_newer_version_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(&dir);
    let file = fs::read_to_string(dir.path().join(LEASE)).unwrap();
    let (_, json) = file.split_once('\n').unwrap();
    let mut content: Value = serde_json::from_str(json).unwrap();
    content["later"] = "colour".into();
    fs::write(dir.path().join(LEASE), encode(&content)).unwrap();
    assert!(disk.load(&uptime("boot", 100)).lease.is_some());
}

#[tokio::test]
async fn disk_has_what_the_loop_sees_and_not_what_came_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path(), &node());
    let seen = |from_disk| View {
        network: Some(config()),
        holding: holding(),
        leases: Some(Arc::new(leases(9))),
        readiness: Readiness::NotReady { code: NotReady::Starting, reason: String::new() },
        from_disk,
        ..View::new(node())
    };
    let (sender, receiver) = watch::channel(Arc::new(seen(true)));
    let watching = tokio::spawn(watch_view(disk.clone(), receiver));
    tokio::task::yield_now().await;
    assert_eq!(disk.load(&Uptime::now().unwrap()), State::default());
    sender.send_replace(Arc::new(seen(false)));
    let written = async {
        while !dir.path().join(PEERS).exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), written).await.unwrap();
    assert!(disk.load(&Uptime::now().unwrap()).lease.is_some());
    drop(sender);
    watching.await.unwrap();
    fs::write(dir.path().join(addresses::FILE), "[]").unwrap();
    disk.remove().unwrap();
    disk.remove().unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn renamed_machine_finds_what_it_had_under_its_former_name() {
    let dir = tempfile::tempdir().unwrap();
    disk(&dir);
    let renamed = Disk::new(dir.path(), &"renamed".parse().unwrap());
    let state = renamed.load(&uptime("boot", 100));
    let lease = state.lease.unwrap();
    assert_eq!((lease.formerly, lease.this_boot), (Some(node()), true));
    assert_eq!((Some(lease.own), state.network), (holding().own, Some(config())));
    assert_eq!(state.leases.as_deref(), Some(&leases(50)));
}

#[test]
fn what_a_person_cut_off_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(&dir);
    let left = vec!["10.244.9.0/24".parse().unwrap()];
    disk.save_lease(&config(), &Holding { left: left.clone(), ..holding() }, &uptime("boot", 100)).unwrap();
    assert_eq!(disk.load(&uptime("boot", 101)).lease.unwrap().left, left);
}
