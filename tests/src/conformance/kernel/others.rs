//! What others have in the kernel: it stays theirs, is refused, or gives way.

use fabric_core::diff::routing::Op;
use fabric_core::diff::{Change, Key, diff};
use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::state::{Nexthop, NexthopId, Routing, VxlanLink};
use fabricd::kernel::Kernel;

use super::{
    Act, World, apply, device, look, mac, nexthop_id, ours, refusals, settles, subnet, underlay, v, wanted, woken,
};

/// What others made is seen as theirs and is still there after all of ours is gone.
pub async fn what_others_made_stays_theirs(world: &mut impl World, family: Family) {
    let want = wanted(family, 3);
    let dev = device(family);
    settles(world.kernel(), &want).await;
    let elsewhere: IfName = v("vxlan7");
    let (route, foreign_id) = (subnet(family, 200), NexthopId(7));
    let over_eth0 = Nexthop { gateway: underlay(family, 200), dev: v("eth0") };
    world.act(&Act::AddVxlan { name: elsewhere, vni: 7, port: 8472 });
    world.act(&Act::AddVxlan { name: v("fabric.2"), vni: 3, port: 8472 });
    world.act(&Act::AddFdb(elsewhere, mac(150), underlay(Family::V4, 50)));
    world.act(&Act::AddNexthop(foreign_id, over_eth0));
    world.act(&Act::AddNexthop(nexthop_id(99), over_eth0));
    world.act(&Act::AddRoute(route, Nexthop { gateway: subnet(family, 1).base(), dev }));
    woken(world.kernel()).await;
    assert_eq!(ours(world.kernel(), &want).await, want);
    let foreign = look(world.kernel()).await.foreign.clone();
    assert!(foreign.routes.contains_key(&route), "{foreign:?}");
    assert!(foreign.nexthop_ids.contains(&foreign_id) && foreign.nexthop_ids.contains(&nexthop_id(99)));
    assert_eq!(foreign.links[&elsewhere].vxlan, Some((7, 8472, Family::V4)));
    assert_eq!(foreign.links[&v::<IfName>("fabric.2")].vxlan, Some((3, 8472, Family::V4)), "not its own VNI");
    assert_eq!(foreign.links[&v::<IfName>("eth0")].kind, "veth");

    // The route leads over our device, so that it stays only as long as this does.
    let mut bare = wanted(family, 0);
    bare.routes.clear();
    settles(world.kernel(), &bare).await;
    let left = look(world.kernel()).await.foreign.clone();
    assert_eq!(left, foreign);
    assert_eq!(world.fdb_entries(&elsewhere), 1);
    settles(world.kernel(), &Routing::default()).await;
    assert_eq!(world.fdb_entries(&elsewhere), 1);
}

/// A route or a nexthop object of somebody else where ours should be is not overwritten.
pub async fn place_that_others_took_is_refused(world: &mut impl World, family: Family) {
    let want = wanted(family, 3);
    let over_eth0 = Nexthop { gateway: underlay(family, 200), dev: v("eth0") };
    world.act(&Act::AddRoute(subnet(family, 1), over_eth0));
    let plan = diff(&want, &look(world.kernel()).await.ours);
    let mut refused = vec![];
    for stage in plan.stages() {
        for (op, result) in stage.iter().zip(world.kernel().apply(stage).await) {
            refused.extend(result.err().map(|error| (op.key(), error.errno())));
        }
    }
    assert_eq!(refused, [(Key::Route(subnet(family, 1)), Some(libc::EEXIST))]);
}

/// A route over our device to a peer's overlay address, as flannel makes it, gives way to ours; one beyond what is wanted
/// stays.
pub async fn plain_route_of_others_is_replaced_in_place(world: &mut impl World, family: Family) {
    let want = wanted(family, 3);
    let mut without = want.clone();
    let dst = subnet(family, 1);
    without.routes.remove(&dst);
    settles(world.kernel(), &without).await;
    let stays = subnet(family, 200);
    for dst in [dst, stays] {
        world.act(&Act::AddRoute(dst, Nexthop { gateway: dst.base(), dev: device(family) }));
    }
    woken(world.kernel()).await;
    let observed = look(world.kernel()).await;
    assert!(observed.foreign.plain.contains_key(&dst) && observed.foreign.plain.contains_key(&stays));
    let plan = diff(&want, observed.found(&want));
    assert_eq!(plan.ops().len(), 1, "{plan}");
    assert_eq!(refusals(&world.kernel().apply(plan.ops()).await), []);
    assert_eq!(ours(world.kernel(), &want).await, want);
    assert_eq!(look(world.kernel()).await.foreign.plain.keys().collect::<Vec<_>>(), [&stays]);
}

/// A route to a peer over the underlay, as flannel's `DirectRouting` makes it, gives way to ours, direct or encapsulated.
pub async fn direct_route_of_flannels_kind_is_replaced_in_place(world: &mut impl World, family: Family) {
    let want = wanted(family, 3);
    let mut without = want.clone();
    let (dst, other) = (subnet(family, 1), subnet(family, 200));
    without.routes.remove(&dst);
    settles(world.kernel(), &without).await;
    let gateway = underlay(family, 200);
    for dst in [dst, other] {
        world.act(&Act::AddBootRoute(dst, Nexthop { gateway, dev: v("eth0") }));
    }
    woken(world.kernel()).await;
    let observed = look(world.kernel()).await;
    assert_eq!(observed.foreign.direct, [(dst, gateway), (other, gateway)].into());
    assert!(observed.foreign.routes.contains_key(&dst), "not of the peer's for all that the kernel knows");
    let plan = diff(&want, observed.found(&want));
    assert_eq!(plan.ops().len(), 1, "{plan}");
    assert_eq!(refusals(&world.kernel().apply(plan.ops()).await), []);
    assert_eq!(ours(world.kernel(), &want).await, want);
    assert_eq!(look(world.kernel()).await.foreign.direct, [(other, gateway)].into());
}

/// A wider route of somebody else, under which all of the overlay lies, is no obstacle.
pub async fn wider_route_of_others_is_no_obstacle(world: &mut impl World, family: Family) {
    let wide: Subnet = v(if family == Family::V4 { "10.0.0.0/8" } else { "2001:db8::/32" });
    world.act(&Act::AddRoute(wide, Nexthop { gateway: underlay(family, 200), dev: v("eth0") }));
    settles(world.kernel(), &wanted(family, 4)).await;
    assert!(look(world.kernel()).await.foreign.routes.contains_key(&wide));
}

/// A VXLAN device of somebody else with our VNI and port makes ours impossible, and nothing else is tried on it.
pub async fn vxlan_of_others_with_our_vni_stays(world: &mut impl World, family: Family) {
    if family == Family::V6 {
        return; // The two families don't collide.
    }
    let want = wanted(family, 2);
    let taken: IfName = v("flannel.1");
    world.act(&Act::AddVxlan { name: taken, vni: 1, port: 8472 });
    let observed = look(world.kernel()).await;
    assert!(observed.ours.links.is_empty());
    assert_eq!(observed.foreign.links[&taken].vxlan, Some((1, 8472, Family::V4)));
    let dev = device(family);
    let create = Op::Link(dev, Change::Create(want.links[&dev]));
    assert_eq!(refusals(&apply(world.kernel(), &[create]).await), [(0, libc::EEXIST)]);
}

/// A takeover marks the device so where the kernel can't rename it: it is noticed, kept, changed and deleted as ours.
pub async fn vxlan_with_our_name_as_its_alternative_one_is_ours(world: &mut impl World, family: Family) {
    if family == Family::V6 {
        return; // Its source is an address of IPv4.
    }
    let (theirs, usual) = (v::<IfName>("flannel.1"), device(family));
    world.act(&Act::AddVxlan { name: theirs, vni: 1, port: 8472 });
    assert!(look(world.kernel()).await.foreign.links.contains_key(&theirs));
    world.act(&Act::AddAltname(theirs, usual));
    woken(world.kernel()).await;
    let observed = look(world.kernel()).await;
    assert!(!observed.foreign.links.contains_key(&theirs), "{:?}", observed.foreign);
    let found = observed.ours.links[&theirs];
    let want = Routing { links: [(theirs, VxlanLink { mtu: 1400, ..found })].into(), ..Routing::default() };
    let plan = diff(&want, observed.found(&want));
    assert_eq!(plan.ops().len(), 1, "{plan}");
    assert_eq!(refusals(&world.kernel().apply(plan.ops()).await), []);
    assert_eq!(look(world.kernel()).await.ours.links, want.links);
    settles(world.kernel(), &Routing::default()).await;
    assert!(look(world.kernel()).await.ours.links.is_empty());
}
