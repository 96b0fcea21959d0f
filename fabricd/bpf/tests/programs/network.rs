//! Two nodes with pods, made by `ip` and `bridge` as the kernel's path has them, in namespaces; the programs on top.
//!
//! ```text
//!   pod 10 ─┬─ cni0 ─ routes ─ fabric.1 ─ wire ═══ wire ─ fabric.1 ─ routes ─ cni0 ─┬─ pod 10
//!   pod 11 ─┘            node 1                                node 2              └─ pod 11
//! ```

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::process::Command;

use fabric_bpf::abi::{self, Map, PEER_DIRECT, POD_FAST};
use fabric_bpf::{Path, Program, Reason};
use fabric_ebpf::{Hook, Link};
use nix::mount::{MsFlags, mount};
use nix::net::if_::{if_indextoname, if_nametoindex};
use nix::sched::{CloneFlags, setns, unshare};

use super::rig::{GATEWAY, Links, PEER4, POD_A, POD_B, PORT, Rig, VNI, pod_mac, tables, uplink_mac, vtep};

/// A network namespace.
pub(crate) struct Space(File);

impl Space {
    fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
            // Nothing is sent that nobody asked for.
            std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").expect("written");
            File::open("/proc/thread-self/ns/net").expect("its own namespace")
        };
        Self(std::thread::spawn(make).join().expect("no panic"))
    }

    /// Does something in it.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = || {
                setns(&self.0, CloneFlags::CLONE_NEWNET).expect("entered");
                work()
            };
            scope.spawn(inside).join().expect("no panic")
        })
    }

    /// A script of sh.
    pub(crate) fn sh(&self, script: &str) {
        let ran = self.run(|| Command::new("sh").args(["-ec", script]).output().expect("sh runs"));
        assert!(ran.status.success(), "{script}\n{}", String::from_utf8_lossy(&ran.stderr));
    }

    /// As `ip link set … netns` takes it.
    fn name(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// A node with its pods, and the programs if it has them.
pub(crate) struct Node {
    pub(crate) space: Space,
    pub(crate) pods: BTreeMap<u8, Space>,
    pub(crate) rig: Rig,
    links: Links,
    attached: Vec<Link>,
}

impl Node {
    fn new(number: u8) -> Self {
        let (space, pods) = (Space::new(), BTreeMap::from([(10, Space::new()), (11, Space::new())]));
        let other = 3 - number;
        let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
        let (gateway, ours, theirs) = (mac(GATEWAY), mac(vtep(number, 4)), mac(vtep(other, 4)));
        space.sh(&format!(
            "echo 1 >/proc/sys/net/ipv4/ip_forward
             ip link set lo up
             ip link add cni0 address {gateway} mtu 1450 up type bridge
             ip address add 198.18.{number}.1/24 dev cni0
             ip link add fabric.1 address {ours} mtu 1450 up type vxlan id {VNI} dstport {PORT} local 192.0.2.{number} nolearning
             ip address add 198.18.{number}.0/32 dev fabric.1
             bridge fdb replace {theirs} dev fabric.1 dst 192.0.2.{other} self permanent
             ip neighbour replace 198.18.{other}.0 lladdr {theirs} dev fabric.1 nud permanent
             ip route add 198.18.{other}.0/24 via 198.18.{other}.0 dev fabric.1 onlink"
        ));
        for (host, pod) in &pods {
            let name = pod.name();
            let address = mac(pod_mac(number, *host));
            space.sh(&format!(
                "ip link add pod-{host} mtu 1450 up master cni0 type veth peer name eth0 mtu 1450 address {address} netns {name}"
            ));
            pod.sh(&format!(
                "ip link set lo up; ip link set eth0 up; ip address add 198.18.{number}.{host}/24 dev eth0
                 ip route add default via 198.18.{number}.1"
            ));
        }
        let links = space.run(|| {
            let index = |name: &str| if_nametoindex(CString::new(name).expect("a name").as_c_str()).expect("there");
            Links { uplink: 0, pod_a: index("pod-10"), pod_b: index("pod-11"), device6: index("fabric.1") }
        });
        Self { space, pods, rig: Rig::new(tables(number, links)), links, attached: vec![] }
    }

    fn hooks(&self) -> [(Program, u32, Hook); 6] {
        let Links { uplink, pod_a, pod_b, device6: device } = self.links;
        [
            (Program::WireIn, uplink, Hook::Ingress),
            (Program::PodOut, pod_a, Hook::Ingress),
            (Program::PodOut, pod_b, Hook::Ingress),
            (Program::PodIn, pod_a, Hook::Egress),
            (Program::PodIn, pod_b, Hook::Egress),
            (Program::WireOut, device, Hook::Egress),
        ]
    }

    /// Puts the programs at their hooks (tcx, kernel 6.6).
    pub(crate) fn attach(&mut self) {
        let hooks = self.hooks();
        let Self { space, rig, .. } = self;
        self.attached = space.run(|| {
            let attach = |(program, ifindex, hook)| loop {
                match Link::attach(rig.program(program), ifindex, hook) {
                    // A child of another test, not yet become another program, still has the link that was closed.
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => std::thread::yield_now(),
                    attached => return attached.expect("attached"),
                }
            };
            hooks.into_iter().map(attach).collect()
        });
    }

    /// The same as older kernels have it: filters of tc at the qdisc clsact.
    pub(crate) fn attach_by_tc(&self) {
        let folder = tempfile::tempdir().expect("a folder");
        let tc = |(program, ifindex, hook): (Program, u32, Hook)| {
            let (pin, name) = (folder.path().join(program.name()), if_indextoname(ifindex).expect("there"));
            let name = name.to_str().expect("text");
            let side = if hook == Hook::Ingress { "ingress" } else { "egress" };
            let pin = pin.display();
            format!(
                "tc qdisc replace dev {name} clsact; tc filter add dev {name} {side} pref 1 bpf direct-action pinned {pin}\n"
            )
        };
        self.space.run(|| {
            // bpffs for this thread and its children alone: the filters stay, the pins go.
            let none = None::<&str>;
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("needs root");
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
            mount(Some("bpf"), folder.path(), Some("bpf"), MsFlags::empty(), none).expect("a bpffs");
            for program in Program::ALL {
                self.rig.program(program).pin(&folder.path().join(program.name())).expect("pinned");
            }
            let script: String = self.hooks().map(tc).concat();
            let ran = Command::new("sh").args(["-ec", &script]).output().expect("sh runs");
            assert!(ran.status.success(), "{script}{}", String::from_utf8_lossy(&ran.stderr));
        });
    }

    /// Takes them away.
    pub(crate) fn detach(&mut self) {
        self.attached.clear();
    }

    /// Packets that the programs counted, by path: fast and slow.
    pub(crate) fn fast_and_slow(&self) -> (u64, u64) {
        let programs = [Program::PodOut, Program::WireIn];
        let of = |path: Path| {
            let reasons = Reason::ALL.into_iter().filter(move |reason| reason.path() == path);
            reasons.flat_map(|reason| programs.map(|program| self.count(program, reason))).sum()
        };
        assert_eq!(of(Path::Dropped), 0_u64);
        (of(Path::Fast), of(Path::Slow))
    }

    /// All that was counted, for whoever reads why a test failed.
    pub(crate) fn counts(&self) -> String {
        let all = Program::ALL.into_iter().flat_map(|program| Reason::ALL.map(|reason| (program, reason)));
        let some = all.map(|(program, reason)| (program, reason, self.count(program, reason)));
        let some = some.filter(|(_, _, count)| *count > 0);
        some.map(|(program, reason, count)| format!("{program:?} {reason:?} {count}; ")).collect()
    }

    pub(crate) fn count(&self, program: Program, reason: Reason) -> u64 {
        self.rig.words(Map::Counters, &abi::counter(program, reason).to_ne_bytes()).expect("an array")[0]
    }

    /// The peer is reached without encapsulation.
    pub(crate) fn go_direct(&mut self) {
        self.rig.change(|tables| tables.peers.get_mut(&PEER4).expect("there").flags |= PEER_DIRECT);
    }

    /// Whether pods are fast.
    pub(crate) fn set_fast(&mut self, fast: bool) {
        self.rig.change(|tables| {
            for slot in [POD_A, POD_B] {
                tables.pods.get_mut(&slot).expect("there").flags = if fast { POD_FAST } else { 0 };
            }
        });
    }
}

/// Two nodes, without programs at their hooks.
pub(crate) fn nodes() -> [Node; 2] {
    let mut nodes = [Node::new(1), Node::new(2)];
    let mac = |number| uplink_mac(number).map(|byte: u8| format!("{byte:02x}")).join(":");
    let name = nodes[1].space.name();
    nodes[0].space.sh(&format!(
        "ip link add wire address {} type veth peer name wire address {} netns {name}",
        mac(1),
        mac(2)
    ));
    for (number, node) in [1, 2].into_iter().zip(&mut nodes) {
        node.space.sh(&format!("ip link set wire up; ip address add 192.0.2.{number}/24 dev wire"));
        let uplink = node.space.run(|| if_nametoindex(c"wire").expect("there"));
        node.links.uplink = uplink;
        node.rig.change(|tables| tables.peers.get_mut(&PEER4).expect("there").ifindex = uplink);
    }
    nodes
}
