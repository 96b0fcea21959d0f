use std::os::unix::fs::MetadataExt;
use std::thread;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

fn network() -> Identifier {
    "fabric".to_owned().try_into().expect("valid")
}

fn pod(name: &str) -> AttachmentId {
    AttachmentId { container: name.to_owned().try_into().expect("valid"), ifname: "eth0".parse().expect("valid") }
}

fn range(subnet: &str) -> Range {
    Range { subnet: subnet.parse().expect("valid"), range_start: None, range_end: None, gateway: None }
}

fn reserve(dir: &TempDir, name: &str, range: &Range) -> Result<String, AllocateError> {
    let ipam = IpamState::open(dir.path(), &network()).expect("IPAM state");
    ipam.reserve(&pod(name), 0, std::slice::from_ref(range), &[]).map(|(ip, _)| ip.to_string())
}

#[test]
fn addresses_are_given_in_order_around_the_subnet_and_never_the_gateways() {
    let dir = TempDir::new().expect("a folder");
    let small = range("192.0.2.0/29");
    let all: Vec<_> = (2..7).map(|n| reserve(&dir, &format!("c{n}"), &small).expect("one is left")).collect();
    assert_eq!(all, ["192.0.2.2/29", "192.0.2.3/29", "192.0.2.4/29", "192.0.2.5/29", "192.0.2.6/29"]);
    let told = reserve(&dir, "c7", &small).expect_err("none is left").to_string();
    assert!(told.starts_with("no IP addresses available in range set: 192.0.2.0/29"), "{told}");

    IpamState::open(dir.path(), &network()).expect("IPAM state").release(&pod("c3")).expect("freed");
    assert_eq!(reserve(&dir, "c8", &small).expect("one is left"), "192.0.2.3/29");
}

#[test]
fn files_are_host_locals_to_the_byte() {
    let dir = TempDir::new().expect("a folder");
    reserve(&dir, "c1", &range("2001:db8::/64")).expect("given");
    let content = |name: &str| fs::read_to_string(dir.path().join("fabric").join(name)).expect(name);
    assert_eq!(content("2001:db8::2"), "c1\r\neth0");
    assert_eq!(content("last_reserved_ip.0"), "2001:db8::2");
    assert_eq!(content("lock"), "");
}

#[test]
fn requested_address_is_given_if_it_is_free_and_for_pods() {
    let dir = TempDir::new().expect("a folder");
    let ipam = IpamState::open(dir.path(), &network()).expect("IPAM state");
    let ranges = [range("192.0.2.0/24")];
    let ask = |name: &str, ip: &str| ipam.reserve(&pod(name), 0, &ranges, &[ip.parse().expect("an address")]);
    assert_eq!(ask("c1", "192.0.2.77").expect("free").0.to_string(), "192.0.2.77/24");
    assert!(matches!(ask("c2", "192.0.2.77"), Err(AllocateError::Taken(..))));
    assert!(matches!(ask("c2", "192.0.2.1"), Err(AllocateError::Gateway(_))));
    assert_eq!(ask("c2", "198.51.100.1").expect("of another set").0.to_string(), "192.0.2.2/24");
}

#[test]
fn book_that_is_cut_or_holds_strange_files_is_read_as_far_as_it_goes() {
    let dir = TempDir::new().expect("a folder");
    let folder = dir.path().join("fabric");
    fs::create_dir(&folder).expect("a folder");
    for (name, content) in [
        ("192.0.2.2", ""),
        ("192.0.2.3", "c1"),
        ("192.0.2.4", "c1\r\neth0\r\n"),
        ("last_reserved_ip.0", "nonsense"),
        ("README", "c1\r\neth0"),
    ] {
        fs::write(folder.join(name), content).expect("a file");
    }
    let ipam = IpamState::open(dir.path(), &network()).expect("IPAM state");
    assert_eq!(ipam.release(&pod("c1")).expect("freed"), ["192.0.2.4".parse::<IpAddr>().expect("valid")]);
    assert_eq!(ipam.release_where(|_, holder| holder.is_none()).expect("freed").len(), 2);
    assert!(folder.join("README").exists());
}

#[test]
fn sweep_waits_for_whoever_is_writing_an_address() {
    let dir = TempDir::new().expect("a folder");
    let ipam = IpamState::open(dir.path(), &network()).expect("IPAM state");
    let file = dir.path().join("fabric/192.0.2.2");
    fs::write(&file, "").expect("a file");
    let lock = fs::metadata(dir.path().join("fabric/lock")).expect("a lock").ino().to_string();
    let awaited = || {
        let locks = fs::read_to_string("/proc/locks").expect("the kernel's locks");
        locks.lines().any(|line| line.contains("->") && line.contains(&format!(":{lock} ")))
    };
    thread::scope(|scope| {
        let sweep =
            scope.spawn(|| IpamState::open(dir.path(), &network())?.release_where(|_, holder| holder.is_none()));
        while !awaited() {
            assert!(!sweep.is_finished(), "it did not wait");
            thread::yield_now();
        }
        fs::write(&file, "c1\r\neth0").expect("written");
        drop(ipam);
        assert!(sweep.join().expect("no panic").expect("swept").is_empty());
    });
    assert!(file.exists());
}

#[test]
fn hundred_at_once_get_addresses_of_their_own() {
    let dir = TempDir::new().expect("a folder");
    let ips: BTreeSet<_> = thread::scope(|scope| {
        let dir = &dir;
        let all: Vec<_> = (0..100)
            .map(|n| scope.spawn(move || reserve(dir, &format!("c{n}"), &range("192.0.2.0/24")).expect("one is left")))
            .collect();
        all.into_iter().map(|one| one.join().expect("no panic")).collect()
    });
    assert_eq!(ips.len(), 100);
}

proptest! {
    #[test]
    fn any_range_gives_each_address_once_or_says_why_not(
        base in any::<u32>(), len in 24u8..=32, start in any::<Option<u8>>(), end in any::<Option<u8>>(), last in any::<u8>(),
    ) {
        let subnet = IpNetwork::new(IpAddr::V4(base.into()), len).expect("valid");
        let near = |n: u8| from_bits(Family::V4, (to_bits(subnet.network()) + u128::from(n)).min(u32::MAX.into()));
        let range = Range { range_start: start.map(near), range_end: end.map(near), ..range("192.0.2.0/24") };
        let range = Range { subnet: IpNetwork::new(subnet.network(), len).expect("valid"), ..range };
        if let Ok(span) = Span::of(&range) {
            let spans = [span];
            let all: Vec<_> = candidates(&spans, Some(near(last))).map(|(ip, _)| ip).collect();
            let unique: BTreeSet<_> = all.iter().copied().collect();
            prop_assert!(unique.iter().all(|ip| subnet.contains(*ip)));
            prop_assert_eq!(unique.len() as u128, spans[0].last - spans[0].first + 1);
        }
    }

    #[test]
    fn no_content_of_an_address_file_makes_it_panic(text in any::<String>()) {
        let _ = holder(&text);
    }
}
