//! Properties of the diff over arbitrary states, with a model of what each step does, and of the codecs.

#![allow(clippy::unwrap_used, reason = "a test that unwraps says where it broke")]

use std::net::IpAddr;

use fabric_core::derived::Dirty;
use fabric_core::diff::routing::{self, without};
use fabric_core::diff::{Change, Gate, Key, Op, diff, diff_of};
use fabric_core::handoff::NodeFile;
use fabric_core::inquiry::Inquiry;
use fabric_core::model::{Family, IfName, MacAddr, PerFamily, Subnet, Vni};
use fabric_core::network::NetworkConfig;
use fabric_core::record::{Backend, Endpoint, LeaseKey, Owner, Record};
use fabric_core::state::{Nexthop, NexthopId, Routing, Sysctl, Via, VxlanLink};
use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;

fn dev() -> impl Strategy<Value = IfName> {
    prop::sample::select(vec!["fabric.1", "fabric6.1", "fabric.2"]).prop_map(|name| name.parse().unwrap())
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (1..6_u8).prop_map(|n| IpAddr::from([192, 0, 2, n])),
        (1..6_u16).prop_map(|n| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n])),
    ]
}

fn mac() -> impl Strategy<Value = MacAddr> {
    (1..6_u8).prop_map(|n| [2, 0, 0, 0, 0, n].try_into().unwrap())
}

fn subnet() -> impl Strategy<Value = Subnet> {
    (1..6_u8).prop_map(|n| Subnet::holding(IpAddr::from([10, 244, n, 0]), 24).unwrap())
}

fn nexthop() -> impl Strategy<Value = Nexthop> {
    (ip(), dev()).prop_map(|(gateway, dev)| Nexthop { gateway, dev })
}

fn id() -> impl Strategy<Value = NexthopId> {
    (1..6_u32).prop_map(NexthopId)
}

fn via() -> impl Strategy<Value = Via> {
    prop_oneof![
        id().prop_map(Via::Nexthop),
        nexthop().prop_map(Via::Gateway),
        nexthop().prop_map(Via::Direct),
        (1..3_u8).prop_map(|n| Via::Other(format!("via 192.0.2.{n} dev eth0"))),
    ]
}

fn link() -> impl Strategy<Value = VxlanLink> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (1..3_u32, prop::sample::select(vec![8472, 4789]), mac(), ip(), 1400..1402_u32, flags).prop_map(
        |(vni, port, mac, local, mtu, (up, gbp, learning))| {
            let vni = Vni::try_from(vni).unwrap();
            VxlanLink { vni, port, gbp, mac, local, mtu, learning, up }
        },
    )
}

fn sysctl() -> impl Strategy<Value = Sysctl> {
    prop_oneof![
        Just(Sysctl::Ipv4Forward),
        Just(Sysctl::Ipv6Forward),
        dev().prop_map(Sysctl::AcceptRa),
        dev().prop_map(Sysctl::RpFilter),
    ]
}

/// Any state that a kernel can be in: nothing hangs on a device that isn't there.
fn state() -> impl Strategy<Value = Routing> {
    (
        btree_map(dev(), link(), 0..3),
        btree_set((dev(), subnet()), 0..4),
        btree_map((dev(), mac()), ip(), 0..4),
        btree_map((dev(), ip()), mac(), 0..4),
        btree_map(id(), nexthop(), 0..4),
        btree_map(subnet(), via(), 0..4),
        btree_map(sysctl(), 0..2_u32, 0..4),
    )
        .prop_map(|(links, addresses, fdb, neighbours, nexthops, routes, sysctls)| {
            let state = Routing { links, addresses, fdb, neighbours, nexthops, routes, sysctls };
            without(&state, |dev| !state.links.contains_key(dev))
        })
}

/// What one step does. A device takes all that hangs on it along; a nexthop its routes.
fn take(state: &mut Routing, op: &Op) {
    fn set<K: Ord, V: Clone>(map: &mut std::collections::BTreeMap<K, V>, key: K, change: &Change<V>) {
        match change.wanted() {
            Some(value) => drop(map.insert(key, value.clone())),
            None => drop(map.remove(&key)),
        }
    }
    let Op::Routing(op) = op else { panic!("{op} is no step of this section") };
    match op {
        routing::Op::Link(name, Change::Delete(_)) | routing::Op::Outgrown(name, _) => {
            *state = without(state, |dev| dev == name);
        }
        routing::Op::Link(name, change) => {
            // A device whose address changes forgets its neighbours (net/core/neighbour.c, neigh_changeaddr).
            if change.found().map(|link| link.mac) != change.wanted().map(|link| link.mac) {
                state.neighbours.retain(|(dev, _), _| dev != name);
            }
            set(&mut state.links, *name, change);
        }
        routing::Op::Sysctl(sysctl, value) => drop(state.sysctls.insert(*sysctl, *value)),
        routing::Op::Address(dev, Change::Delete(address)) => drop(state.addresses.remove(&(*dev, *address))),
        routing::Op::Address(dev, change) => drop(state.addresses.insert((*dev, *change.wanted().unwrap()))),
        routing::Op::Fdb(dev, mac, change) => set(&mut state.fdb, (*dev, *mac), change),
        routing::Op::Neighbour(dev, ip, change) => set(&mut state.neighbours, (*dev, *ip), change),
        routing::Op::Nexthop(id, change) => {
            set(&mut state.nexthops, *id, change);
            if change.wanted().is_none() {
                state.routes.retain(|_, via| *via != Via::Nexthop(*id));
            }
        }
        routing::Op::Route(dst, change) => set(&mut state.routes, *dst, change),
    }
}

proptest! {
    #[test]
    fn what_is_as_wanted_needs_no_step(state in state()) {
        prop_assert!(diff(&state, &state).is_empty());
    }

    #[test]
    fn the_steps_lead_to_what_is_wanted(want in state(), have in state()) {
        let mut now = have.clone();
        diff(&want, &have).ops().iter().for_each(|op| take(&mut now, op));
        // Settings are never taken back: those nobody asks for stay as they were.
        now.sysctls.retain(|sysctl, _| want.sysctls.contains_key(sysctl));
        prop_assert_eq!(now, want);
    }

    #[test]
    fn entries_that_differ_are_all_that_has_to_be_compared(want in state(), have in state()) {
        let plan = diff(&want, &have);
        let dirty = Dirty::Keys(plan.ops().iter().map(Op::key).collect());
        prop_assert_eq!(diff_of(&want, &have, &dirty), plan);
    }

    #[test]
    fn stages_hold_all_steps_in_order(want in state(), have in state()) {
        let plan = diff(&want, &have);
        let staged: Vec<Op> = plan.stages().flatten().cloned().collect();
        prop_assert_eq!(&staged[..], plan.ops());
    }

    #[test]
    fn no_step_is_taken_on_what_has_failed(want in state(), have in state(), failing in any::<prop::sample::Index>()) {
        let plan = diff(&want, &have);
        if plan.is_empty() {
            return Ok(());
        }
        let victim = plan.ops()[failing.index(plan.ops().len())].clone();
        let mut gate = Gate::default();
        let mut failed: Vec<Key> = vec![];
        for op in plan.stages().flatten() {
            if *op == victim {
                gate.failed(op);
                failed.push(op.key());
            } else if gate.admits(op).is_ok() {
                prop_assert!(!op.needs().iter().any(|key| failed.contains(key)), "{op} after {victim}");
            } else {
                failed.push(op.key());
            }
        }
    }
}

fn endpoint_record(v4: u8, v6: u8, epoch: u64, node: &str) -> (LeaseKey, Record) {
    let vni = Vni::DEFAULT;
    let vtep_mac = [2, 0, 0, 0, v4, v6].try_into().unwrap();
    let subnets = PerFamily {
        v4: (v4 > 0).then(|| Subnet::holding(IpAddr::from([10, 244, v4, 0]), 24).unwrap()),
        v6: (v6 > 0).then(|| Subnet::holding(IpAddr::from([0xfd00, 0, 0, v6.into(), 0, 0, 0, 0]), 64).unwrap()),
    };
    let endpoints = subnets.map(|family, _| Endpoint {
        public_ip: match family {
            Family::V4 => IpAddr::from([192, 0, 2, v4]),
            Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, v6.into()]),
        },
        vtep_mac,
        vni,
    });
    let owner = Owner {
        version: 1,
        node: node.parse().unwrap(),
        boot: "boot".into(),
        netns: 7,
        epoch,
        taken_from: None,
        taken_back: false,
        unknown: serde_json::Map::default(),
    };
    let record = Record { backend: Backend::Vxlan(endpoints), owner: Some(owner), unknown: serde_json::Map::default() };
    (LeaseKey::new(subnets).unwrap(), record)
}

proptest! {
    #[test]
    fn records_survive_the_store(v4: u8, v6: u8, epoch: u64, node in "[a-z0-9][a-z0-9.-]{0,30}") {
        prop_assume!(v4 > 0 || v6 > 0);
        let (key, record) = endpoint_record(v4, v6, epoch, &node);
        prop_assert_eq!(LeaseKey::decode(&key.encode()), Ok(key));
        prop_assert_eq!(Record::decode(&key, &record.encode()), Ok(record));
    }

    #[test]
    fn decoders_survive_any_bytes(bytes: Vec<u8>, text: String) {
        let _ = LeaseKey::decode(&text);
        let (key, _) = endpoint_record(1, 1, 0, "n");
        let _ = Record::decode(&key, &bytes);
        let _ = NetworkConfig::decode(&bytes);
        let _ = NodeFile::decode(&bytes);
        let _ = Inquiry::decode(&bytes);
    }

    #[test]
    fn decoders_survive_a_good_value_with_one_byte_changed(at: prop::sample::Index, byte: u8) {
        let (key, record) = endpoint_record(1, 1, 3, "node-1");
        let mut value = record.encode();
        let at = at.index(value.len());
        value[at] = byte;
        if let Ok(read) = Record::decode(&key, &value) {
            // Whatever it is taken for can be written and read again.
            prop_assert_eq!(Record::decode(&key, &read.encode()), Ok(read));
        }
    }
}
