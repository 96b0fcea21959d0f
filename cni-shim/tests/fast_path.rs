//! DEL and the maps of the fast path, on a bpffs of the test's own. It needs root.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use fabric_bpf::abi::{self, Map as Name};
use fabric_cni::fast_path::forget;
use fabric_ebpf::{Kind, Map, Shape};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use zerocopy::IntoBytes;

/// Mounts a bpffs where this thread alone sees it.
fn mount_bpffs(place: &Path) {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("a mount namespace of its own; is this root?");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("mounts of its own");
    mount(Some("bpf"), place, Some("bpf"), MsFlags::empty(), none).expect("a bpffs");
}

fn pinned(maps: &Path, name: Name, kind: Kind) -> Map {
    let size = |bytes: usize| u32::try_from(bytes).expect("small");
    let shape = Shape {
        kind,
        key_size: size(name.key_size()),
        value_size: size(name.value_size()),
        max_entries: 256,
        flags: 0,
    };
    let map = Map::create(name.name(), shape).expect("made");
    map.pin(&maps.join(name.name())).expect("pinned");
    map
}

#[test]
fn addresses_of_both_families_are_taken_out_of_the_maps_and_others_stay() {
    let folder = tempfile::tempdir().expect("a folder");
    mount_bpffs(folder.path());
    let maps = folder.path().join("fabric").join(abi::LAYOUT.to_string()).join("maps");
    fs::create_dir_all(&maps).expect("a folder of bpffs");
    let config = pinned(&maps, Name::Config, Kind::Array);
    let (index4, index6) = (pinned(&maps, Name::PodIndex4, Kind::Array), pinned(&maps, Name::PodIndex6, Kind::Hash));
    let node = abi::Config { own4: 0xc612_0100, own4_mask: 0xffff_ff00, ..abi::Config::default() };
    config.set(&0_u32.to_ne_bytes(), node.as_bytes()).expect("written");
    let v6 = |host: u16| std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, host);
    for host in [5_u32, 6] {
        index4.set(&host.to_ne_bytes(), &host.to_ne_bytes()).expect("written");
        index6.set(&v6(host as u16).octets(), &host.to_ne_bytes()).expect("written");
    }
    // What is nobody's here is nothing to clear.
    let ips: [IpAddr; 4] = [[198, 18, 1, 5].into(), v6(5).into(), [203, 0, 113, 6].into(), v6(9).into()];
    for _ in 0..2 {
        forget(folder.path(), &ips).expect("cleared");
        let of4 = |host: u32| index4.get(&host.to_ne_bytes()).expect("read").expect("an array");
        assert_eq!([of4(5), of4(6)], [0_u32, 6].map(|slot| slot.to_ne_bytes().to_vec()));
        let of6 = |host| index6.get(&v6(host).octets()).expect("read");
        assert_eq!([of6(5), of6(6)], [None, Some(6_u32.to_ne_bytes().to_vec())]);
    }
}
