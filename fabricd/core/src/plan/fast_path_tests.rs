use super::*;
use crate::diff::{Op, diff};
use crate::plan::filter::Pod as AttachedPod;
use crate::state::Nexthop;

fn v<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} in a test is wrong"))
}

/// A node of one network, whose parts a test changes.
struct World {
    network: NetworkConfig,
    routing: Routing,
    paths: BTreeMap<IpAddr, UnderlayPath>,
    pods: BTreeMap<IfName, AttachedPod>,
    ports: BTreeMap<IfName, Port>,
    kept_off: BTreeSet<u32>,
    indexes: BTreeMap<IfName, u32>,
    have: FastPath,
}

fn network(config: &str) -> NetworkConfig {
    NetworkConfig::decode(config.as_bytes()).expect("valid")
}

impl World {
    /// Peers 2 to 4 of 10.64.0.0/12, and two pods.
    fn new() -> Self {
        let mut world = Self {
            network: network(r#"{"Network":"10.64.0.0/12","Backend":{"Type":"vxlan"}}"#),
            routing: Routing::new(),
            paths: BTreeMap::new(),
            pods: BTreeMap::new(),
            ports: BTreeMap::new(),
            kept_off: BTreeSet::new(),
            indexes: [(v("fabric.1"), 30), (v("fabric6.1"), 36)].into(),
            have: FastPath::new(),
        };
        (2..=4).for_each(|n| world.add_peer(n, n));
        world.add_pod("veth7", 7, "10.64.1.5");
        world.add_pod("veth8", 8, "10.64.1.6");
        world
    }

    /// The same with IPv6 beside.
    fn dual() -> Self {
        let config =
            r#"{"Network":"10.64.0.0/12","EnableIPv6":true,"IPv6Network":"2001:db8::/48","Backend":{"Type":"vxlan"}}"#;
        let mut world = Self { network: network(config), ..Self::new() };
        (2..=3).for_each(|n| world.add_peer_at(Family::V6, n, n));
        world.pods.get_mut(&v::<IfName>("veth7")).expect("there").ips.insert(v("2001:db8:0:1::5"));
        world
    }

    /// The peer `n`, at the underlay address of `at`.
    fn add_peer(&mut self, n: u8, at: u8) {
        self.add_peer_at(Family::V4, n, at);
    }

    fn add_peer_at(&mut self, family: Family, n: u8, at: u8) {
        let (dev, subnet, underlay) = match family {
            Family::V4 => ("fabric.1", format!("10.64.{n}.0/24"), format!("192.0.2.{at}")),
            Family::V6 => ("fabric6.1", format!("2001:db8:0:{n}::/64"), format!("2001:db8:ff::{at}")),
        };
        let (dev, subnet): (IfName, Subnet) = (v(dev), v(&subnet));
        let mac = v(&format!("02:42:c0:00:02:{n:02x}"));
        let underlay = v(&underlay);
        self.routing.routes.insert(subnet, Via::Gateway(Nexthop { gateway: subnet.base(), dev }));
        self.routing.neighbours.insert((dev, subnet.base()), mac);
        self.routing.fdb.insert((dev, mac), underlay);
        self.paths.insert(underlay, UnderlayPath { ifindex: 2, gateway: underlay });
    }

    fn add_pod(&mut self, port: &str, ifindex: u32, ip: &str) {
        let mac = v(&format!("02:42:0a:40:01:{ifindex:02x}"));
        self.pods.insert(v(port), AttachedPod { mac, ips: [v(ip)].into() });
        self.ports.insert(v(port), Port { ifindex, mtu: 1450, bridge_mac: v("02:42:0a:40:01:01") });
    }

    fn plan(&self) -> Result<FastPath, NoFastPath> {
        self.planned().map(|planned| planned.state)
    }

    fn planned(&self) -> Result<Planned, NoFastPath> {
        let program = |role| Program { role, fingerprint: 1 };
        fast_path(&FastPathInputs {
            network: &self.network,
            own: &PerFamily { v4: Some(v("10.64.1.0/24")), v6: Some(v("2001:db8:0:1::/64")) },
            vteps: &PerFamily {
                v4: Some(Vtep { mac: v("02:42:c0:00:02:01"), local: v("192.0.2.1"), mtu: 1450 }),
                v6: Some(Vtep { mac: v("02:42:c0:00:06:01"), local: v("2001:db8:ff::1"), mtu: 1430 }),
            },
            devices: &PerFamily { v4: Some(v("fabric.1")), v6: Some(v("fabric6.1")) },
            indexes: &self.indexes,
            routing: &self.routing,
            paths: &self.paths,
            uplinks: &[2].into(),
            pods: &self.pods,
            ports: &self.ports,
            kept_off: &self.kept_off,
            programs: &Role::ALL.map(program).into(),
            tracked: true,
            have: &self.have,
        })
    }

    /// The node as it is once the plan has been carried out.
    fn settle(&mut self) -> FastPath {
        for _ in 0..3 {
            let want = self.plan().expect("possible");
            for op in diff(&want, &self.have.clone()).ops() {
                let Op::FastPath(op) = op else { panic!("{op}") };
                op.apply_to(&mut self.have);
            }
        }
        assert!(diff(&self.plan().expect("possible"), &self.have).is_empty(), "it comes to rest");
        self.have.clone()
    }
}

fn subnets(state: &FastPath) -> Vec<String> {
    state.index.keys().map(ToString::to_string).collect()
}

#[test]
fn peers_are_those_that_the_kernel_is_led_to() {
    let mut world = World::new();
    let state = world.settle();
    assert_eq!(subnets(&state), ["10.64.2.0/24", "10.64.3.0/24", "10.64.4.0/24"]);
    let peer = state.peers[&state.index[&v("10.64.3.0/24")]];
    assert_eq!((peer.underlay, peer.vtep_mac, peer.direct), (v("192.0.2.3"), v("02:42:c0:00:02:03"), false));
    assert_eq!(state.maps, Some(MapSizes { subnets4: 4096, subnets6: 1, peers: 256, addresses4: 256, pods: 128 }));

    let direct = Via::Direct(Nexthop { gateway: v("192.0.2.2"), dev: v("eth0") });
    world.routing.routes.insert(v("10.64.2.0/24"), direct);
    world.routing.routes.insert(v("10.64.3.0/24"), Via::Other("blackhole".into()));
    world.paths.remove(&v::<IpAddr>("192.0.2.4"));
    let state = world.settle();
    assert_eq!(
        subnets(&state),
        ["10.64.2.0/24"],
        "one that is bent, and one whose way is not known, take the kernel's path"
    );
    assert!(state.peers[&state.index[&v("10.64.2.0/24")]].direct);
}

#[test]
fn a_peer_that_moves_gets_another_entry_and_the_others_keep_theirs() {
    let mut world = World::new();
    let before = world.settle();
    world.add_peer(3, 33);
    let want = world.plan().expect("possible");
    let (old, new) = (before.index[&v("10.64.3.0/24")], want.index[&v("10.64.3.0/24")]);
    assert_ne!(old, new);
    let steps = diff(&want, &before).to_string();
    let lines: Vec<&str> = steps.lines().collect();
    assert!(lines[0].starts_with(&format!("+ fast path: peer {}, 192.0.2.33", new.0)), "{steps}");
    assert!(lines[1].starts_with("~ fast path: 10.64.3.0/24 is of"), "{steps}");
    assert!(lines[2].starts_with(&format!("- fast path: peer {}, 192.0.2.3", old.0)), "{steps}");
    assert_eq!(lines.len(), 3);
    let after = world.settle();
    assert_eq!(before.index[&v("10.64.4.0/24")], after.index[&v("10.64.4.0/24")]);
}

#[test]
fn pods_are_those_whose_port_is_known_and_whose_address_is_theirs_alone() {
    let mut world = World::new();
    let state = world.settle();
    let pod = state.pods[&state.addresses[&v("10.64.1.5")]];
    assert_eq!((pod.ifindex, pod.gateway_mac, pod.fast), (7, v("02:42:0a:40:01:01"), true));
    assert_eq!(state.links.len(), 6, "two at each port, one at the uplink, and one at the VXLAN device");

    world.add_pod("veth9", 9, "10.64.1.5");
    world.pods.get_mut(&v::<IfName>("veth8")).expect("there").ips.insert(v("203.0.113.9"));
    let state = world.settle();
    assert_eq!(state.addresses.keys().map(ToString::to_string).collect::<Vec<_>>(), ["10.64.1.6"]);
    world.ports.remove(&v::<IfName>("veth9"));
    assert_eq!(world.settle().addresses.len(), 2, "its port is gone");
}

#[test]
fn maps_grow_by_doubling_and_stay_as_they_are() {
    assert_eq!(room(0, 256, None), 256);
    assert_eq!(room(95, 256, None), 256);
    assert_eq!(room(150, 256, Some(256)), 256, "what is there is enough");
    assert_eq!(room(200, 256, Some(256)), 1024);
    assert_eq!(room(5_000, 256, None), 16_384);
    assert_eq!(room(3, 256, Some(16_384)), 16_384);
    assert_eq!(room(usize::MAX, 256, None), MOST_ENTRIES);
}

#[test]
fn numbers_are_kept_taken_up_again_or_given_and_what_has_no_room_takes_the_kernels_path() {
    let index = [(2, 5)].into();
    let entries = [(5, 'b'), (1, 'z'), (3, 'd')].into();
    let wanted = [(1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')].into();
    let (index, entries) = numbered(wanted, &index, &entries, char::eq, 1..3);
    assert_eq!(index, [(1, 2), (2, 5), (4, 3)].into(), "1 is in use still, and there is no more room");
    assert_eq!(entries, [(2, 'a'), (5, 'b'), (3, 'd')].into());
}

#[test]
fn networks_that_programs_do_not_know_have_no_fast_path() {
    let refused = |config: &str| {
        let world = World { network: network(config), ..World::new() };
        world.plan().expect_err("refused").to_string()
    };
    assert!(refused(r#"{"Network":"10.64.0.0/12","Backend":{"Type":"vxlan","GBP":true}}"#).contains("GBP"));
    let mut wide = World::new();
    wide.network = network(r#"{"Network":"10.0.0.0/7","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#);
    assert!(matches!(wide.plan(), Err(NoFastPath::TooManySubnets(..))), "{:?}", wide.plan());
}

#[test]
fn ipv6_peers_are_sent_to_by_the_device_and_direct_ones_by_the_uplink() {
    let mut world = World::dual();
    let direct = Via::Direct(Nexthop { gateway: v("2001:db8:ff::3"), dev: v("eth0") });
    world.routing.routes.insert(v("2001:db8:0:3::/64"), direct);
    let state = world.settle();
    let peer = |state: &FastPath, subnet: &str| state.peers[&state.index[&v::<Subnet>(subnet)]];
    let (tunnelled, direct) = (peer(&state, "2001:db8:0:2::/64"), peer(&state, "2001:db8:0:3::/64"));
    assert_eq!((tunnelled.path.ifindex, tunnelled.direct, tunnelled.mtu), (36, false, 1430));
    assert_eq!((direct.path.ifindex, direct.direct), (2, true));
    assert_eq!(state.maps, Some(MapSizes { subnets4: 4096, subnets6: 65_536, peers: 256, addresses4: 256, pods: 128 }));
    let slots = [v::<IpAddr>("10.64.1.5"), v("2001:db8:0:1::5")].map(|ip| state.addresses[&ip]);
    assert_ne!(slots[0], slots[1], "its ports are marked in each family by itself");
    let leaves: Vec<u32> = (state.links.iter())
        .filter(|(_, program)| program.role == Role::WireOut)
        .map(|(place, _)| place.ifindex)
        .collect();
    assert_eq!(leaves, [2, 30, 36], "devices, and the uplink for what goes direct");

    world.paths.remove(&v::<IpAddr>("2001:db8:ff::2"));
    world.indexes.clear();
    let state = world.settle();
    assert_eq!(
        subnets(&state),
        ["10.64.2.0/24", "10.64.3.0/24", "10.64.4.0/24", "2001:db8:0:3::/64"],
        "what comes from there may come by an interface without programs"
    );
    world.paths.insert(v("2001:db8:ff::2"), UnderlayPath { ifindex: 2, gateway: v("fe80::1") });
    assert_eq!(subnets(&world.settle()).len(), 4, "the device is not there yet");
}

#[test]
fn a_family_that_programs_do_not_know_leaves_the_other_fast() {
    let only6 = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"2001:db8::/48","Backend":{"Type":"vxlan"}}"#;
    let world = World { network: network(only6), ..World::dual() };
    let planned = world.planned().expect("possible");
    assert_eq!(planned.without, PerFamily::default());
    assert_eq!(subnets(&planned.state), ["2001:db8:0:2::/64", "2001:db8:0:3::/64"]);
    assert_eq!(planned.state.addresses.keys().collect::<Vec<_>>(), [&v::<IpAddr>("2001:db8:0:1::5")]);

    let wide6 =
        r#"{"Network":"10.64.0.0/12","EnableIPv6":true,"IPv6Network":"2001:db8::/32","Backend":{"Type":"vxlan"}}"#;
    let world = World { network: network(wide6), ..World::dual() };
    let planned = world.planned().expect("possible");
    assert!(matches!(planned.without.v6, Some(NoFastPath::TooManySubnets(..))), "{:?}", planned.without);
    assert_eq!((planned.state.index.len(), planned.state.addresses.len()), (3, 2), "all of IPv4, and nothing else");
}

#[test]
fn port_that_is_kept_off_has_no_programs_and_its_pod_is_not_fast() {
    let mut world = World::new();
    world.kept_off = [8].into();
    let state = world.settle();
    let fast: Vec<(u32, bool)> = state.pods.values().map(|pod| (pod.ifindex, pod.fast)).collect();
    assert_eq!(fast, [(7, true), (8, false)]);
    assert!(state.links.keys().all(|place| place.ifindex != 8) && state.links.keys().any(|place| place.ifindex == 7));
    world.kept_off.clear();
    let state = world.settle();
    assert!(state.pods.values().all(|pod| pod.fast) && state.links.keys().any(|place| place.ifindex == 8));
}
