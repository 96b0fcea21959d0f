//! Properties of the diff over arbitrary states, with a model of what each step does.

#![allow(clippy::unwrap_used, reason = "a test that unwraps says where it broke")]

use std::net::IpAddr;

use fabric_core::diff::{Change, Gate, Key, Op, diff, without};
use fabric_core::model::{IfName, MacAddr, Subnet, Vni};
use fabric_core::state::{KernelState, Nexthop, NexthopId, Sysctl, Via, VxlanLink};
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
    prop_oneof![id().prop_map(Via::Nexthop), nexthop().prop_map(Via::Gateway), nexthop().prop_map(Via::Direct)]
}

fn link() -> impl Strategy<Value = VxlanLink> {
    (1..3_u32, prop::sample::select(vec![8472, 4789]), mac(), ip(), 1400..1402_u32, any::<bool>()).prop_map(
        |(vni, port, mac, local, mtu, up)| {
            let vni = Vni::try_from(vni).unwrap();
            VxlanLink { vni, port, gbp: false, mac, local, mtu, learning: false, up }
        },
    )
}

fn sysctl() -> impl Strategy<Value = Sysctl> {
    prop_oneof![Just(Sysctl::Ipv4Forward), Just(Sysctl::Ipv6Forward), dev().prop_map(Sysctl::AcceptRa)]
}

/// Any state that a kernel can be in: nothing hangs on a device that isn't there.
fn state() -> impl Strategy<Value = KernelState> {
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
            let state = KernelState { links, addresses, fdb, neighbours, nexthops, routes, sysctls };
            without(&state, |dev| !state.links.contains_key(dev))
        })
}

/// What one step does. A device takes all that hangs on it along; a nexthop its routes.
fn take(state: &mut KernelState, op: &Op) {
    fn set<K: Ord, V: Clone>(map: &mut std::collections::BTreeMap<K, V>, key: K, change: &Change<V>) {
        match change.wanted() {
            Some(value) => drop(map.insert(key, value.clone())),
            None => drop(map.remove(&key)),
        }
    }
    match op {
        Op::Link(name, Change::Delete(_)) => *state = without(state, |dev| dev == name),
        Op::Link(name, change) => set(&mut state.links, name.clone(), change),
        Op::Sysctl(sysctl, value) => drop(state.sysctls.insert(sysctl.clone(), *value)),
        Op::Address(dev, Change::Delete(address)) => drop(state.addresses.remove(&(dev.clone(), *address))),
        Op::Address(dev, change) => drop(state.addresses.insert((dev.clone(), *change.wanted().unwrap()))),
        Op::Fdb(dev, mac, change) => set(&mut state.fdb, (dev.clone(), *mac), change),
        Op::Neighbour(dev, ip, change) => set(&mut state.neighbours, (dev.clone(), *ip), change),
        Op::Nexthop(id, change) => {
            set(&mut state.nexthops, *id, change);
            if change.wanted().is_none() {
                state.routes.retain(|_, via| *via != Via::Nexthop(*id));
            }
        }
        Op::Route(dst, change) => set(&mut state.routes, *dst, change),
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
    fn stages_hold_all_steps_in_order(want in state(), have in state()) {
        let plan = diff(&want, &have);
        let staged: Vec<Op> = plan.stages().flatten().cloned().collect();
        prop_assert_eq!(&staged[..], plan.ops());
    }

    #[test]
    fn no_step_is_taken_on_what_has_failed(want in state(), have in state(), failing in any::<prop::sample::Index>()) {
        let plan = diff(&want, &have);
        prop_assume!(!plan.is_empty());
        let victim = plan.ops()[failing.index(plan.ops().len())].clone();
        let mut gate = Gate::default();
        let mut failed: Vec<Key> = vec![];
        for op in plan.stages().flatten() {
            if *op == victim {
                gate.failed(op);
                failed.push(op.key());
            } else if gate.admits(op) {
                prop_assert!(!op.needs().iter().any(|key| failed.contains(key)), "{op} after {victim}");
            } else {
                failed.push(op.key());
            }
        }
    }
}
