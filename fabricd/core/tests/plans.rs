//! Golden plans: given leases and a kernel, the exact steps, as an operator would type them.

#![allow(clippy::unwrap_used, reason = "a test that unwraps says where it broke")]

use std::sync::Arc;

use fabric_core::derived::Dirty;
use fabric_core::diff::{Op, diff, diff_of};
use fabric_core::leases::{Entry, Event, LeaseSet};
use fabric_core::model::{Family, PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::{Conflict, Desired, Facts, PeerInputs, PeerPlan, Refusal, Vtep, desired};
use fabric_core::record::LeaseKey;
use fabric_core::state::{Foreign, ForeignLink, NEXTHOP_ID_BASE, NexthopId, Routing, Via};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;

/// node-1, with 10.244.1.0/24 and fd00:10:244:1::/64 on 192.0.2.1 and 2001:db8::1.
struct Node {
    network: NetworkConfig,
    own: LeaseKey,
    vteps: PerFamily<Vtep>,
    facts: Facts,
    foreign: Foreign,
}

const V4: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
const DIRECT: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#;
const V6: &str =
    r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;

impl Node {
    fn new(config: &str) -> Self {
        let network = NetworkConfig::decode(config.as_bytes()).expect("valid config");
        let own = network.spaces.map(|family, _| match family {
            Family::V4 => subnet("10.244.1.0/24"),
            Family::V6 => subnet("fd00:10:244:1::/64"),
        });
        let vteps = network.spaces.map(|family, _| match family {
            Family::V4 => {
                Vtep { mac: "02:42:c0:00:02:01".parse().unwrap(), local: "192.0.2.1".parse().unwrap(), mtu: 1450 }
            }
            Family::V6 => {
                Vtep { mac: "02:42:c0:00:06:01".parse().unwrap(), local: "2001:db8::1".parse().unwrap(), mtu: 1430 }
            }
        });
        let facts = Facts {
            nexthop_objects: true,
            ipv6: true,
            on_link: vec![(subnet("192.0.2.0/24"), "eth0".parse().unwrap())],
        };
        Self { network, own: LeaseKey::new(own).expect("a family"), vteps, facts, foreign: Foreign::default() }
    }

    fn inputs<'a>(&'a self, leases: &'a LeaseSet, have: &'a Routing) -> PeerInputs<'a> {
        let Self { network, own, vteps, facts, foreign } = self;
        PeerInputs { network, own, vteps, leases, facts, have, foreign }
    }

    fn desired(&self, leases: &LeaseSet, have: &Routing) -> Desired {
        desired(&self.inputs(leases, have))
    }

    fn plan(&self, leases: &LeaseSet, have: &Routing) -> String {
        diff(&self.desired(leases, have).state, have).to_string()
    }
}

fn subnet(text: &str) -> Subnet {
    text.parse().expect(text)
}

fn leases(entries: &[(&str, String)]) -> LeaseSet {
    let entry = |(revision, (key, value)): (usize, &(&str, String))| {
        let revision = i64::try_from(revision).unwrap() + 1;
        Entry {
            key: (*key).into(),
            value: value.clone().into_bytes(),
            create_revision: revision,
            mod_revision: revision,
        }
    };
    let set = LeaseSet::snapshot(&LeaseSet::default(), entries.iter().enumerate().map(entry).collect(), 100);
    assert_eq!(set.unreadable().len(), 0, "{:?}", set.unreadable());
    set
}

fn v4_peer(ip: &str, mac: &str) -> String {
    format!(r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#)
}

fn v6_peer(ip: &str, mac: &str) -> String {
    format!(
        r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{ip}","BackendType":"vxlan","BackendV6Data":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    )
}

fn node_2() -> (&'static str, String) {
    ("10.244.2.0-24", v4_peer("192.0.2.2", "02:42:c0:00:02:02"))
}

/// The plan of a text block: its indentation is not part of it.
fn steps(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).fold(String::new(), |all, line| all + line + "\n")
}

#[test]
fn a_new_node_builds_its_device_and_one_peer_from_the_bottom_up() {
    let node = Node::new(V4);
    let want = "
        + ip link add fabric.1 address 02:42:c0:00:02:01 mtu 1450 up type vxlan id 1 dstport 8472 local 192.0.2.1 nolearning
        ~ sysctl -w net/ipv4/ip_forward=1
        ~ sysctl -w net/ipv6/conf/fabric.1/accept_ra=0
        ~ sysctl -w net/ipv4/conf/fabric.1/rp_filter=2
        + ip address add 10.244.1.0/32 dev fabric.1
        + bridge fdb replace 02:42:c0:00:02:02 dev fabric.1 dst 192.0.2.2 self permanent
        + ip neighbour replace 10.244.2.0 lladdr 02:42:c0:00:02:02 dev fabric.1 nud permanent
        + ip nexthop add id 4194304000 via 10.244.2.0 dev fabric.1 onlink proto 250
        + ip route add 10.244.2.0/24 nhid 4194304000 proto 250";
    assert_eq!(node.plan(&leases(&[node_2()]), &Routing::default()), steps(want));
}

#[test]
fn ipv6_needs_no_nexthop_object() {
    let node = Node::new(V6);
    let peers = leases(&[("0.0.0.0-0&fd00:10:244:2::-64", v6_peer("2001:db8::2", "02:42:c0:00:06:02"))]);
    let want = "
        + ip link add fabric6.1 address 02:42:c0:00:06:01 mtu 1430 up type vxlan id 1 dstport 8472 local 2001:db8::1 nolearning
        ~ sysctl -w net/ipv6/conf/all/forwarding=1
        ~ sysctl -w net/ipv6/conf/fabric6.1/accept_ra=0
        + ip address add fd00:10:244:1::/128 dev fabric6.1 nodad
        + bridge fdb replace 02:42:c0:00:06:02 dev fabric6.1 dst 2001:db8::2 self permanent
        + ip neighbour replace fd00:10:244:2:: lladdr 02:42:c0:00:06:02 dev fabric6.1 nud permanent
        + ip route add fd00:10:244:2::/64 via fd00:10:244:2:: dev fabric6.1 onlink proto 250";
    assert_eq!(node.plan(&peers, &Routing::default()), steps(want));
}

#[test]
fn kernel_without_nexthop_objects_gets_plain_onlink_routes() {
    let mut node = Node::new(V4);
    node.facts.nexthop_objects = false;
    let plan = node.plan(&leases(&[node_2()]), &Routing::default());
    assert!(plan.ends_with("+ ip route add 10.244.2.0/24 via 10.244.2.0 dev fabric.1 onlink proto 250\n"), "{plan}");
    assert!(!plan.contains("nexthop"), "{plan}");
}

#[test]
fn device_too_narrow_for_ipv6_has_no_setting_of_it() {
    let mut node = Node::new(V4);
    node.vteps.v4.as_mut().unwrap().mtu = 1279;
    assert!(!node.plan(&leases(&[node_2()]), &Routing::default()).contains("accept_ra"));
}

#[test]
fn kernel_without_ipv6_has_no_setting_of_it() {
    let mut node = Node::new(V4);
    node.facts.ipv6 = false;
    assert!(!node.plan(&leases(&[node_2()]), &Routing::default()).contains("accept_ra"));
}

#[test]
fn peer_on_the_same_link_is_routed_directly_when_the_config_says_so() {
    let node = Node::new(DIRECT);
    let far = ("10.244.3.0-24", v4_peer("198.51.100.3", "02:42:c0:00:02:03"));
    let plan = node.plan(&leases(&[node_2(), far]), &Routing::default());
    assert!(plan.contains("+ ip route add 10.244.2.0/24 via 192.0.2.2 dev eth0 proto 250\n"), "{plan}");
    assert!(plan.contains("+ ip route add 10.244.3.0/24 nhid 4194304000 proto 250\n"), "{plan}");
}

#[test]
fn changed_vtep_mac_replaces_the_neighbour_before_the_old_fdb_entry_goes() {
    let node = Node::new(V4);
    let have = node.desired(&leases(&[node_2()]), &Routing::default()).state;
    let reborn = leases(&[("10.244.2.0-24", v4_peer("192.0.2.2", "02:42:c0:00:02:99"))]);
    let want = "
        + bridge fdb replace 02:42:c0:00:02:99 dev fabric.1 dst 192.0.2.2 self permanent
        ~ ip neighbour replace 10.244.2.0 lladdr 02:42:c0:00:02:99 dev fabric.1 nud permanent
        - bridge fdb del 02:42:c0:00:02:02 dev fabric.1 self";
    assert_eq!(node.plan(&reborn, &have), steps(want));
}

#[test]
fn changed_underlay_address_of_a_peer_is_one_step() {
    let node = Node::new(V4);
    let have = node.desired(&leases(&[node_2()]), &Routing::default()).state;
    let moved = leases(&[("10.244.2.0-24", v4_peer("192.0.2.22", "02:42:c0:00:02:02"))]);
    let want = "~ bridge fdb replace 02:42:c0:00:02:02 dev fabric.1 dst 192.0.2.22 self permanent";
    assert_eq!(node.plan(&moved, &have), steps(want));
}

#[test]
fn leases_that_ended_while_the_daemon_was_down_are_swept_from_the_top_down() {
    let node = Node::new(V4);
    let have = node.desired(&leases(&[node_2()]), &Routing::default()).state;
    let want = "
        - ip route del 10.244.2.0/24 nhid 4194304000 proto 250
        - ip nexthop del id 4194304000
        - ip neighbour del 10.244.2.0 dev fabric.1
        - bridge fdb del 02:42:c0:00:02:02 dev fabric.1 self";
    assert_eq!(node.plan(&LeaseSet::default(), &have), steps(want));
}

#[test]
fn own_address_change_is_made_in_place() {
    let mut node = Node::new(V4);
    let have = node.desired(&leases(&[node_2()]), &Routing::default()).state;
    node.vteps.v4.as_mut().unwrap().local = "192.0.2.100".parse().unwrap();
    node.vteps.v4.as_mut().unwrap().mtu = 8950;
    let want = "~ ip link set fabric.1 mtu 8950 type vxlan local 192.0.2.100 nolearning";
    assert_eq!(node.plan(&leases(&[node_2()]), &have), steps(want));
}

#[test]
fn device_with_another_port_is_built_beside_the_old_one_which_goes_last() {
    let mut node = Node::new(V4);
    let have = node.desired(&leases(&[node_2()]), &Routing::default()).state;
    node.network.vxlan.port = 4789;
    let want = "
        + ip link add fab.1 address 02:42:c0:00:02:01 mtu 1450 up type vxlan id 1 dstport 4789 local 192.0.2.1 nolearning
        ~ sysctl -w net/ipv6/conf/fab.1/accept_ra=0
        ~ sysctl -w net/ipv4/conf/fab.1/rp_filter=2
        + ip address add 10.244.1.0/32 dev fab.1
        + bridge fdb replace 02:42:c0:00:02:02 dev fab.1 dst 192.0.2.2 self permanent
        + ip neighbour replace 10.244.2.0 lladdr 02:42:c0:00:02:02 dev fab.1 nud permanent
        + ip nexthop add id 4194304001 via 10.244.2.0 dev fab.1 onlink proto 250
        ~ ip route replace 10.244.2.0/24 nhid 4194304001 proto 250
        - ip nexthop del id 4194304000
        - ip neighbour del 10.244.2.0 dev fabric.1
        - bridge fdb del 02:42:c0:00:02:02 dev fabric.1 self
        - ip address del 10.244.1.0/32 dev fabric.1
        - ip link del fabric.1";
    assert_eq!(node.plan(&leases(&[node_2()]), &have), steps(want));
    let have = node.desired(&leases(&[node_2()]), &have).state;
    assert_eq!(node.plan(&leases(&[node_2()]), &have), "", "the other name stays");
}

#[test]
fn device_that_can_not_stand_beside_its_successor_is_made_anew_with_all_that_hangs_on_it() {
    let mut node = Node::new(V4);
    node.network.vxlan.gbp = true;
    let mut have = node.desired(&leases(&[node_2()]), &Routing::default()).state;
    let fresh = node.plan(&leases(&[node_2()]), &Routing { sysctls: have.sysctls.clone(), ..Routing::default() });
    have.links.values_mut().for_each(|link| link.gbp = false);
    // The new device has settings of its own, so they are written again too.
    let plan = node.plan(&leases(&[node_2()]), &have);
    let (first, rest) = plan.split_once('\n').unwrap();
    assert_eq!(first, "- ip link del fabric.1");
    let settings = "~ sysctl -w net/ipv6/conf/fabric.1/accept_ra=0\n~ sysctl -w net/ipv4/conf/fabric.1/rp_filter=2\n";
    assert!(rest.contains(settings), "{rest}");
    assert_eq!(rest.replace(settings, ""), fresh);
}

#[test]
fn restart_with_nothing_changed_plans_nothing_and_keeps_nexthop_ids() {
    let mut node = Node::new(V4);
    // Somebody else's id pushed ours up when it was made; that they are gone now moves nothing.
    node.foreign.nexthop_ids.insert(NexthopId(NEXTHOP_ID_BASE));
    let have = node.desired(&leases(&[node_2()]), &Routing::default()).state;
    assert!(have.nexthops.contains_key(&NexthopId(NEXTHOP_ID_BASE + 1)));
    node.foreign.nexthop_ids.clear();
    assert_eq!(node.plan(&leases(&[node_2()]), &have), "");
}

#[test]
fn nexthops_that_went_with_their_device_come_back_with_their_ids_whatever_else_has_changed() {
    let mut node = Node::new(V4);
    node.foreign.nexthop_ids.insert(NexthopId(NEXTHOP_ID_BASE));
    let leases = Arc::new(leases(&[node_2()]));
    let nothing = Routing::default();
    let mut plan = PeerPlan::new(&node.inputs(&leases, &nothing));
    let before = Arc::clone(plan.desired());
    assert!(before.state.nexthops.contains_key(&NexthopId(NEXTHOP_ID_BASE + 1)));
    // Another context: all is planned anew, and a lower id is free.
    node.foreign.nexthop_ids.clear();
    plan.update(&node.inputs(&leases, &nothing), &leases, &Dirty::Everything);
    assert!(plan.turned().is_none());
    assert_eq!(plan.desired().state, before.state);
    // Unless somebody has taken it meanwhile.
    node.foreign.nexthop_ids.insert(NexthopId(NEXTHOP_ID_BASE + 1));
    plan.update(&node.inputs(&leases, &nothing), &leases, &Dirty::Everything);
    assert!(plan.desired().state.nexthops.keys().eq([&NexthopId(NEXTHOP_ID_BASE)]));
}

#[test]
fn hostile_leases_are_refused_each_by_itself() {
    let node = Node::new(V4);
    let mac = "02:42:c0:00:02:66";
    let hostile = [
        node_2(),
        ("10.244.0.0-16", v4_peer("192.0.2.66", mac)),
        ("10.244.1.0-24", v4_peer("192.0.2.66", mac)),
        ("10.244.1.128-25", v4_peer("192.0.2.66", mac)),
        ("10.244.2.64-26", v4_peer("192.0.2.66", mac)),
        ("10.99.0.0-24", v4_peer("192.0.2.66", mac)),
        ("10.244.6.0-24", v4_peer("192.0.2.1", mac)),
        ("10.244.7.0-24", v4_peer("192.0.2.66", "02:42:c0:00:02:02")),
        ("10.244.8.0-24", v4_peer("192.0.2.66", "02:42:c0:00:02:01")),
        ("10.244.9.0-24", v4_peer("192.0.2.66", mac).replace(r#""VNI":1"#, r#""VNI":2"#)),
        ("10.244.10.0-24", r#"{"PublicIP":"192.0.2.66","BackendType":"host-gw"}"#.into()),
    ];
    let desired = node.desired(&leases(&hostile), &Routing::default());
    assert_eq!(desired.state, node.desired(&leases(&[node_2()]), &Routing::default()).state);
    assert_eq!(desired.peers, 1);
    // Our own key is ours whatever it says there; that somebody wrote it is the lease keeper's business.
    let refused: Vec<String> = desired.refused.iter().map(|(key, why)| format!("{key}: {why}")).collect();
    assert_eq!(
        refused,
        [
            "10.99.0.0/24: its subnet 10.99.0.0/24 is not a part of the network 10.244.0.0/16",
            "10.244.0.0/16: its subnet 10.244.0.0/16 is not a part of the network 10.244.0.0/16",
            "10.244.1.128/25: its subnet 10.244.1.128/25 overlaps our own, 10.244.1.0/24",
            "10.244.2.64/26: its subnet 10.244.2.64/26 overlaps that of 192.0.2.2, which is older",
            "10.244.6.0/24: its underlay address 192.0.2.1 is our own",
            "10.244.7.0/24: its VTEP address 02:42:c0:00:02:02 is also that of 192.0.2.2",
            "10.244.8.0/24: its VTEP address 02:42:c0:00:02:01 is also that of this node",
            "10.244.9.0/24: its VNI is 2, ours is 1",
            "10.244.10.0/24: its backend is \"host-gw\", not vxlan",
        ]
    );
}

#[test]
fn objects_of_others_in_our_way_are_named_and_left_alone() {
    let mut node = Node::new(V4);
    let other = |kind: &str, vxlan| ForeignLink { kind: kind.into(), vxlan };
    node.foreign.routes.insert(subnet("10.244.2.0/24"), "10.244.2.0/24 via 192.0.2.9 dev eth0 proto static".into());
    let desired = node.desired(&leases(&[node_2()]), &Routing::default());
    assert!(matches!(desired.conflicts[..], [Conflict::Route { .. }]));
    assert!(desired.state.routes.is_empty() && desired.state.fdb.is_empty());

    node.foreign.links.insert("fabric.1".parse().unwrap(), other("vxlan", Some((2, 8472, Family::V4))));
    let name = &node.desired(&leases(&[node_2()]), &Routing::default()).conflicts[0];
    assert!(
        name.to_string().starts_with("the interface fabric.1 exists and is not ours (vxlan with VNI 2, UDP port 8472)")
    );

    node.foreign.links = [("flannel.1".parse().unwrap(), other("vxlan", Some((1, 8472, Family::V4))))].into();
    let vni = &node.desired(&leases(&[node_2()]), &Routing::default()).conflicts[0];
    assert!(vni.to_string().starts_with("the interface flannel.1 already uses VNI 1 on UDP port 8472"));
    // The other family's underlay is another device space.
    node.foreign.links = [("other".parse().unwrap(), other("vxlan", Some((1, 8472, Family::V6))))].into();
    node.foreign.routes.clear();
    assert_eq!(node.desired(&leases(&[node_2()]), &Routing::default()).conflicts, []);
}

#[test]
fn refusal_of_one_lease_frees_what_it_would_have_taken() {
    // The older lease is refused for its VNI; the younger one of the same subnet part is good.
    let node = Node::new(V4);
    let old = ("10.244.2.0-24", v4_peer("192.0.2.66", "02:42:c0:00:02:66").replace(r#""VNI":1"#, r#""VNI":9"#));
    let young = ("10.244.2.0-25", v4_peer("192.0.2.2", "02:42:c0:00:02:02"));
    let desired = node.desired(&leases(&[old, young]), &Routing::default());
    assert_eq!(desired.peers, 1);
    assert!(matches!(desired.refused.values().collect::<Vec<_>>()[..], [Refusal::Vni(..)]));
}

#[test]
fn sharing_a_lease_set_costs_no_copy_of_the_leases() {
    let set = leases(&[node_2()]);
    let copy = set.clone();
    assert!(Arc::ptr_eq(set.iter().next().unwrap(), copy.iter().next().unwrap()));
}

/// A change of a lease: the subnet, whether it covers two (0: yes), whose addresses it has, and whether it comes.
type Step = (u8, u8, u8, bool);

/// A lease of the families of this network, as the store has it.
fn leased(config: &str, (subnet, wide, id, _): Step) -> (String, String) {
    let (v4, v6) = match wide {
        0 => (format!("10.244.{}.0-23", subnet & !1), format!("fd00:10:244:{:x}::-63", subnet & !1)),
        _ => (format!("10.244.{subnet}.0-24"), format!("fd00:10:244:{subnet:x}::-64")),
    };
    let data = |of: u8| format!(r#"{{"VNI":1,"VtepMAC":"02:42:c0:00:{of:02x}:{id:02x}"}}"#);
    // Some are on our link, some behind a gateway.
    let net = if id % 2 == 0 { 2 } else { 3 };
    let (ip, ip6) = (format!("192.0.{net}.{id}"), format!("2001:db8:{net}::{id:x}"));
    let backend = r#""BackendType":"vxlan""#;
    if config == DUAL {
        let (v4_data, v6_data) = (data(2), data(6));
        let value = format!(
            r#"{{"PublicIP":"{ip}","PublicIPv6":"{ip6}",{backend},"BackendData":{v4_data},"BackendV6Data":{v6_data}}}"#
        );
        (format!("{v4}&{v6}"), value)
    } else if config == V6 {
        (
            format!("0.0.0.0-0&{v6}"),
            format!(r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{ip6}",{backend},"BackendV6Data":{}}}"#, data(6)),
        )
    } else {
        (v4, format!(r#"{{"PublicIP":"{ip}",{backend},"BackendData":{}}}"#, data(2)))
    }
}

const DUAL: &str =
    r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;

/// The same with routes that name their nexthop: which of several new ones has which free id is of no account.
fn whatever_the_ids(desired: &Desired) -> Desired {
    let mut desired = desired.clone();
    let nexthops = std::mem::take(&mut desired.state.nexthops);
    assert_eq!(desired.state.routes.values().filter(|via| matches!(via, Via::Nexthop(_))).count(), nexthops.len());
    for via in desired.state.routes.values_mut() {
        if let Via::Nexthop(id) = via {
            *via = Via::Gateway(nexthops[id]);
        }
    }
    desired
}

/// Something else of what decides.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// A route of others leads to a peer's subnet, or no longer does.
    ForeignRoute(u8),
    /// Somebody has a nexthop object.
    ForeignNexthop(u32),
    /// The kernel learns of nexthop objects, or forgets.
    NexthopObjects,
    /// An underlay link reaches the peers, or no longer does.
    OnLink,
}

impl Node {
    fn take(&mut self, change: Change) {
        match change {
            Change::ForeignRoute(third) => {
                for dst in [format!("10.244.{third}.0/24"), format!("fd00:10:244:{third}::/64")].map(|dst| subnet(&dst))
                {
                    if self.foreign.routes.remove(&dst).is_none() {
                        self.foreign.routes.insert(dst, format!("{dst} dev eth9"));
                    }
                }
            }
            Change::ForeignNexthop(n) => drop(self.foreign.nexthop_ids.insert(NexthopId(NEXTHOP_ID_BASE + n))),
            Change::NexthopObjects => self.facts.nexthop_objects = !self.facts.nexthop_objects,
            Change::OnLink => match self.facts.on_link.pop() {
                Some(_) => {}
                None => self.facts.on_link.push((subnet("192.0.2.0/24"), "eth0".parse().unwrap())),
            },
        }
    }
}

/// Takes batches of changes over one by one, and compares each time with what is planned of all at once: what is desired,
/// which of it is said to be dirty, and the steps. Gives how many updates took leases over without planning anew.
fn update_and_compare(config: &str, batches: &[(Vec<Step>, Option<Change>)]) -> usize {
    let (mut node, mut set, mut have) = (Node::new(config), LeaseSet::default(), Routing::default());
    let (mut plan, mut revision, mut updated): (Option<PeerPlan>, _, _) = (None, 0, 0);
    let mut touched = Dirty::Everything;
    for (batch, change) in batches {
        for step in batch {
            revision += 1;
            let (key, value) = leased(config, *step);
            let known = LeaseKey::decode(&key).ok().and_then(|key| Some(set.get(&key)?.create_revision));
            let event = if step.3 {
                let create_revision = known.unwrap_or(revision);
                Event::Put(Entry { key, value: value.into(), create_revision, mod_revision: revision })
            } else {
                Event::Delete { key, given_back: true }
            };
            set.apply(event, revision);
        }
        assert!(set.unreadable().is_empty(), "{:?}", set.unreadable());
        let was = (node.foreign.clone(), node.facts.clone());
        change.iter().for_each(|change| node.take(*change));
        let has_changed = was != (node.foreign.clone(), node.facts.clone());
        let Node { network, own, vteps, facts, foreign } = &node;
        let leases = Arc::new(set.clone());
        let inputs = PeerInputs { network, own, vteps, leases: &leases, facts, have: &have, foreign };
        let anew = desired(&inputs);
        let Some(plan) = &mut plan else {
            plan = Some(PeerPlan::new(&inputs));
            continue;
        };
        let before = Arc::clone(plan.desired());
        let mut dirty = plan.update(&inputs, &leases, &touched);
        let now = Arc::clone(plan.desired());
        assert_eq!(whatever_the_ids(&now), whatever_the_ids(&anew));
        assert_eq!(plan.turned().is_none(), has_changed, "another context, and nothing else, derives everything anew");
        updated += plan.turned().map_or(0, |turned| usize::from(!turned.is_empty()));
        for (id, nexthop) in have.nexthops.iter().filter(|(_, n)| now.state.nexthops.values().any(|m| m == *n)) {
            assert_eq!(now.state.nexthops.get(id), Some(nexthop), "a nexthop object keeps its id");
        }
        let differ = diff(&now.state, &before.state);
        assert!(differ.ops().iter().all(|op| dirty.covers(&op.key())), "{differ} of {dirty:?}");
        dirty.extend(touched);
        let steps = diff(&now.state, &have);
        assert_eq!(diff_of(&now.state, &have, &dirty), steps);
        touched = Dirty::Keys(steps.ops().iter().map(Op::key).collect());
        have = now.state.clone();
    }
    updated
}

const CONFIGS: [&str; 4] = [V4, DIRECT, V6, DUAL];

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (2..10_u8).prop_map(Change::ForeignRoute),
        (0..8_u32).prop_map(Change::ForeignNexthop),
        Just(Change::NexthopObjects),
        Just(Change::OnLink),
    ]
}

/// Some of them clash: over a subnet, a MAC address, or our own.
fn step() -> impl Strategy<Value = Step> {
    (2..10_u8, 0..8_u8, 2..10_u8, any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes, changes and goes, in whatever order, clashes included, while what else decides changes too: what is
    /// desired, refused and in conflict is as if all had come at once.
    #[test]
    fn any_order_of_changes_is_all_at_once(
        config in 0..CONFIGS.len(),
        batches in vec((vec(step(), 1..65), option::weighted(0.2, change())), 1..12),
        singles in vec((vec(step(), 1), option::weighted(0.1, change())), 1..40),
    ) {
        update_and_compare(CONFIGS[config], &batches);
        update_and_compare(CONFIGS[config], &singles);
    }

    /// Each batch of up to 64 leases is taken over without planning anew, clash or not.
    #[test]
    fn changed_leases_alone_never_plan_anew(
        config in 0..CONFIGS.len(),
        batches in vec(btree_map(2..66_u8, (any::<bool>(), any::<bool>()), 1..65), 2..8),
    ) {
        // The first peer changes in every batch, so that each has something to take over.
        let steps = |(n, batch): (usize, std::collections::BTreeMap<u8, (bool, bool)>)| {
            let step = |(subnet, (clashes, comes)): (u8, (bool, bool))| (subnet, 1, if clashes { 2 } else { subnet }, comes);
            let first = (100, 1, 100, n % 2 == 0);
            (batch.into_iter().map(step).chain([first]).collect(), None)
        };
        let batches: Vec<(Vec<Step>, Option<Change>)> = batches.into_iter().enumerate().map(steps).collect();
        prop_assert_eq!(update_and_compare(CONFIGS[config], &batches), batches.len() - 1);
    }
}
