//! The kernel of a fresh network namespace, with iproute2 as the other programs of its host.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use fabric_core::model::IfName;
use fabric_core::state::Nexthop;
use fabricd::kernel::Options;
use fabricd::kernel::netlink::Netlink;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::kernel::{Act, HOST, World};
use crate::lab::tcx;
use crate::netns::{ip, run};

/// See above. To be made inside [`crate::netns::in_netns_async`].
pub struct RealWorld(Netlink);

impl RealWorld {
    /// A host with `eth0` and its addresses.
    ///
    /// # Panics
    /// When the namespace can't be furnished.
    #[must_use]
    pub fn new(options: Options) -> Self {
        ip("link add eth0 type veth peer name eth0-peer");
        ip("link set eth0-peer up");
        ip("link set eth0 up");
        for address in HOST {
            ip(&format!("address add {address} dev eth0{}", if address.contains("::") { " nodad" } else { "" }));
        }
        let began = Instant::now();
        while !ip("link show dev eth0").contains("state UP") {
            assert!(began.elapsed() < Duration::from_secs(10), "eth0 finds its carrier");
            std::thread::yield_now();
        }
        Self(Netlink::new(options).expect("netlink opens"))
    }
}

impl RealWorld {
    /// The same with a bpffs of its own, which goes with the thread that this is called on, and all that it starts.
    ///
    /// # Panics
    /// As [`RealWorld::new`].
    #[must_use]
    pub fn with_fast_path() -> Self {
        Self::new(Options { bpffs: own_bpffs(), fast_path: true, ..Options::default() })
    }
}

impl RealWorld {
    /// The same, where the kernel has no tcx: programs are filters of tc.
    ///
    /// # Panics
    /// As [`RealWorld::new`].
    #[must_use]
    pub fn without_tcx() -> Self {
        tcx::take_away().expect("a seccomp filter; is this root?");
        Self::with_fast_path()
    }
}

/// Mounts a bpffs where only this thread, and what it starts from now on, sees it. Gives its place.
///
/// # Panics
/// When it can't be mounted: it takes root.
#[must_use]
pub fn own_bpffs() -> PathBuf {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace of its own; is this root?");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("mounts of its own");
    let place = PathBuf::from("/sys/fs/bpf");
    mount(Some("bpf"), &place, Some("bpf"), MsFlags::empty(), none).expect("a bpffs");
    place
}

impl Default for RealWorld {
    fn default() -> Self {
        Self::new(Options::default())
    }
}

impl World for RealWorld {
    type Kernel = Netlink;

    fn kernel(&mut self) -> &mut Netlink {
        &mut self.0
    }

    fn act(&mut self, act: &Act) {
        let onlink = |Nexthop { gateway, dev }: &Nexthop| format!("via {gateway} dev {dev} onlink");
        match act {
            Act::DeleteLink(dev) => ip(&format!("link del {dev}")),
            Act::LinkDown(dev) => ip(&format!("link set {dev} down")),
            Act::AddVxlan { name, vni, port } => {
                ip(&format!("link add {name} up type vxlan id {vni} dstport {port} local 192.0.2.1"))
            }
            Act::AddAltname(dev, name) => ip(&format!("link property add dev {dev} altname {name}")),
            Act::AddNexthop(id, to) => ip(&format!("nexthop add id {id} {}", onlink(to))),
            Act::DeleteNexthop(id) => ip(&format!("nexthop del id {id}")),
            Act::AddRoute(dst, to) => ip(&format!("route add {dst} {} proto static", onlink(to))),
            Act::AddBootRoute(dst, Nexthop { gateway, dev }) => ip(&format!("route add {dst} via {gateway} dev {dev}")),
            Act::SpoilRoute(dst) => ip(&format!("route replace blackhole {dst} proto 250")),
            Act::AddFdb(dev, mac, dst) => run("bridge", &format!("fdb add {mac} dev {dev} dst {dst} self permanent")),
            Act::DeleteFdb(dev, mac, dst) => run("bridge", &format!("fdb del {mac} dev {dev} dst {dst} self")),
            Act::FlushRuleset => run("nft", "flush ruleset"),
            Act::DeleteNeighbour(dev, address) => ip(&format!("neighbour del {address} dev {dev}")),
        };
    }

    fn fdb_entries(&self, dev: &IfName) -> usize {
        run("bridge", &format!("fdb show dev {dev}")).lines().filter(|line| line.contains("dst")).count()
    }
}
