//! What every [`Kernel`] must do with the fast path, as cases that run on both kernels, like those of
//! [`kernel`](super::kernel). The node has both families; its peers and pods are of the one that the world is asked for.

use std::sync::Arc;

use fabric_core::diff::{Change, Op, Stage, diff, fast_path as fast, routing};
use fabric_core::model::{Family, PerFamily};
use fabric_core::state::fast_path::{
    End, FastPath, LocalVtep, MapSizes, Peer, PeerSlot, Place, Pod, PodSlot, UnderlayPath,
};
use fabric_core::state::{Routing, VxlanLink};
use fabricd::kernel::{Kernel, Touched, fast_path::programs};

use super::kernel::{World, device, look, mac, refusals, settle, subnet, underlay, v, woken};

/// The index of the world's interface.
async fn eth0(kernel: &mut impl Kernel) -> u32 {
    let observed = look(kernel).await;
    observed.host.links.iter().find(|link| link.name.as_str() == "eth0").expect("there").index
}

fn peer(family: Family, n: u32, ifindex: u32) -> Peer {
    let underlay = underlay(family, n);
    let path = UnderlayPath { ifindex, gateway: underlay };
    Peer { underlay, vtep_mac: mac(n), path, direct: n == 1, mtu: 1450 }
}

/// A node with `peers` peers and one pod, whose port is `eth0`. Programs are all that this release has, each attached once.
async fn wanted(kernel: &mut impl Kernel, family: Family, peers: u32) -> FastPath {
    let ifindex = eth0(kernel).await;
    let pod = Pod { ifindex, mac: v("02:42:0a:40:00:05"), gateway_mac: v("02:42:0a:40:00:01"), mtu: 1450, fast: true };
    let end = |network, local, family| End {
        vtep_mac: mac(0),
        local: v(local),
        network: v(network),
        subnet: subnet(family, 0),
    };
    let ends = PerFamily {
        v4: Some(end("10.64.0.0/12", "192.0.2.1", Family::V4)),
        v6: Some(end("2001:db8::/48", "2001:db8:ff::1", Family::V6)),
    };
    let address = match family {
        Family::V4 => v("10.64.0.5"),
        Family::V6 => v("2001:db8::5"),
    };
    FastPath {
        maps: Some(MapSizes { subnets4: 4096, subnets6: 65_536, peers: 256, addresses4: 256, pods: 8 }),
        node: Some(LocalVtep { vni: 7_u32.try_into().expect("a VNI"), port: 8472, guard: true, ends }),
        peers: (1..=peers).map(|n| (PeerSlot(n), peer(family, n, ifindex))).collect(),
        index: (1..=peers).map(|n| (subnet(family, n), PeerSlot(n))).collect(),
        pods: [(PodSlot(1), pod)].into(),
        addresses: [(address, PodSlot(1))].into(),
        programs: programs(),
        former: false,
        links: programs().into_iter().map(|p| (Place { ifindex, hook: p.role.hook() }, p)).collect(),
    }
}

async fn settles(kernel: &mut impl Kernel, want: &FastPath) -> String {
    let steps = settle(kernel, want).await;
    assert_eq!(*look(kernel).await.fast_path.state, *want);
    assert_eq!(settle(kernel, want).await, "", "a second pass writes nothing");
    kernel.audit();
    assert_eq!(*look(kernel).await.fast_path.state, *want);
    steps
}

/// All that is wanted is made, seen again as it was wanted, and not written twice; and all of it goes.
pub async fn fast_path_is_made_seen_and_goes_again(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    assert_eq!(look(kernel).await.fast_path.trouble, None);
    let want = wanted(kernel, family, 3).await;
    let made = settle(kernel, &want).await;
    assert!(made.starts_with("+ fast path: maps for") && made.trim_end().ends_with("taken"), "{made}");
    assert_eq!(woken(kernel).await, Touched::State, "there may be more to do");
    assert_eq!(settles(kernel, &want).await, "");
    let gone = settles(kernel, &FastPath::new()).await;
    assert!(gone.starts_with("- fast path: link at") && gone.ends_with("- fast path: maps\n"), "{gone}");
}

/// A new entry, the index, and then the old entry: none that is in use changes.
pub async fn peer_that_moves_costs_three_steps(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let mut want = wanted(kernel, family, 3).await;
    settles(kernel, &want).await;
    let moved = Peer { underlay: underlay(family, 77), ..want.peers[&PeerSlot(2)] };
    want.peers.remove(&PeerSlot(2));
    want.peers.insert(PeerSlot(4), moved);
    want.index.insert(subnet(family, 2), PeerSlot(4));
    let steps = settles(kernel, &want).await;
    let signs: Vec<&str> = steps.lines().map(|line| &line[..1]).collect();
    assert_eq!(signs, ["+", "~", "-"], "{steps}");
}

/// A pod that is another's from now on takes the kernel's path until its connections are known.
pub async fn pod_is_marked_before_it_is_taken(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let mut want = wanted(kernel, family, 1).await;
    settles(kernel, &want).await;
    want.pods.get_mut(&PodSlot(1)).expect("there").mac = v("02:42:0a:40:00:06");
    let plan = diff(&want, &*look(kernel).await.fast_path.state);
    let stages: Vec<Stage> = plan.ops().iter().map(Op::stage).collect();
    assert_eq!(stages, [Stage::FastPod, Stage::FastGuard, Stage::FastPodTaken]);
    kernel.apply(&plan.ops()[..1]).await.into_iter().for_each(|result| result.expect("taken"));
    assert!(!look(kernel).await.fast_path.state.pods[&PodSlot(1)].fast);
    settles(kernel, &want).await;
}

/// Entries mean something else in another network.
pub async fn another_network_takes_all_away_first(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let mut want = wanted(kernel, family, 2).await;
    settles(kernel, &want).await;
    want.node.as_mut().expect("there").port = 4789;
    let gone = settle(kernel, &want).await;
    assert!(gone.lines().all(|line| line.starts_with('-')) && !gone.contains("maps"), "{gone}");
    settles(kernel, &want).await;
    want.maps.as_mut().expect("there").peers = 512;
    let gone = settle(kernel, &want).await;
    assert!(gone.lines().all(|line| line.starts_with('-')) && gone.contains("maps"), "{gone}");
    settles(kernel, &want).await;
}

/// What a step needs and isn't there is its own refusal.
pub async fn steps_without_their_base_are_refused_alone(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let want = wanted(kernel, family, 1).await;
    let plan = diff(&want, &FastPath::new());
    let of = |stage: Stage| plan.ops().iter().filter(move |op| op.stage() == stage).cloned();
    let without_maps: Vec<Op> = [Stage::FastNode, Stage::FastPeer, Stage::FastIndex].into_iter().flat_map(of).collect();
    let refused = refusals(&kernel.apply(&without_maps).await);
    assert_eq!(refused, [(0, libc::EINVAL), (1, libc::EINVAL), (2, libc::EINVAL)]);
    let without_programs: Vec<Op> = [Stage::FastMaps, Stage::FastLink].into_iter().flat_map(of).collect();
    let refused = refusals(&kernel.apply(&without_programs).await);
    assert!(refused.iter().all(|(at, errno)| *at > 0 && *errno == libc::ENOENT), "{refused:?}");
    assert_eq!(refused.len(), want.links.len());

    let program = *want.programs.iter().next().expect("there is one");
    let nowhere = Place { ifindex: 4_000_000, hook: program.role.hook() };
    let ops = [fast::Op::Program(Change::Create(program)), fast::Op::Link(nowhere, Change::Create(program))];
    let refused = refusals(&kernel.apply(&ops.map(Op::from)).await);
    assert_eq!(refused, [(1, libc::ENODEV)]);
    settles(kernel, &want).await;
}

/// Where a peer is reached is known as soon as the FDB names it.
pub async fn way_to_a_peer_is_seen_once_its_fdb_entry_is(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let ifindex = eth0(kernel).await;
    assert!(look(kernel).await.fast_path.paths.is_empty());
    let dev = device(family);
    let (local, far) = match family {
        Family::V4 => (v("192.0.2.1"), v("198.51.100.3")),
        Family::V6 => (v("2001:db8:ff::1"), v("2001:db8:aaaa::3")),
    };
    let near = underlay(family, 2);
    let link = VxlanLink {
        vni: 1_u32.try_into().expect("a VNI"),
        port: 8472,
        gbp: false,
        mac: mac(0),
        local,
        mtu: 1450,
        learning: false,
        up: true,
    };
    let fdb = [((dev, mac(2)), near), ((dev, mac(3)), far)].into();
    let want = Routing { links: [(dev, link)].into(), fdb, ..Routing::new() };
    settle(kernel, &want).await;
    woken(kernel).await;
    let found = Arc::clone(&look(kernel).await);
    assert!(found.fast_path.devices.contains_key(&dev));
    let way = UnderlayPath { ifindex, gateway: near };
    assert_eq!(found.fast_path.paths, [(near, way)].into(), "the other has none");
    let op = routing::Op::Fdb(dev, mac(2), Change::Delete(near));
    kernel.apply(&[op.into()]).await.into_iter().for_each(|result| result.expect("taken"));
    woken(kernel).await;
    assert!(look(kernel).await.fast_path.paths.is_empty());
}
