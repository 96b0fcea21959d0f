//! What somebody deletes or alters of ours is noticed, with all that went with it in silence, and comes back.

use fabric_core::model::Family;
use fabric_core::state::{Routing, Via};

use super::{Act, World, device, look, mac, nexthop_id, settles, subnet, underlay, v, wanted, woken};

/// A deleted device takes all along, and it comes back.
pub async fn deleted_device_is_noticed_with_all_that_hung_on_it(world: &mut impl World, family: Family) {
    let want = wanted(family, 4);
    settles(world.kernel(), &want).await;
    world.act(&Act::DeleteLink(device(family)));
    woken(world.kernel()).await;
    let left = look(world.kernel()).await.ours.clone();
    assert_eq!((left.links.len(), left.fdb.len(), left.neighbours.len(), left.nexthops.len()), (0, 0, 0, 0));
    assert_eq!(left.routes.keys().collect::<Vec<_>>(), [&subnet(family, 4)], "the direct route alone");
    settles(world.kernel(), &want).await;
}

/// A device set down loses routes, nexthop objects and neighbours in silence.
pub async fn device_set_down_is_noticed_with_what_it_lost(world: &mut impl World, family: Family) {
    let want = wanted(family, 4);
    settles(world.kernel(), &want).await;
    world.act(&Act::LinkDown(device(family)));
    woken(world.kernel()).await;
    let left = look(world.kernel()).await.ours.clone();
    assert!(!left.links[&device(family)].up);
    assert_eq!((left.fdb.len(), left.neighbours.len(), left.nexthops.len()), (3, 0, 0), "FDB entries stay");
    assert_eq!(left.routes.keys().collect::<Vec<_>>(), [&subnet(family, 4)], "the direct route alone");
    settles(world.kernel(), &want).await;
}

/// The underlay interface set down takes the direct routes in silence.
pub async fn underlay_set_down_is_noticed_with_its_direct_routes(world: &mut impl World, family: Family) {
    let want = wanted(family, 3);
    settles(world.kernel(), &want).await;
    world.act(&Act::LinkDown(v("eth0")));
    woken(world.kernel()).await;
    let left = look(world.kernel()).await.ours.clone();
    assert!(!left.routes.contains_key(&subnet(family, 3)));
    assert_eq!(left.routes.len(), 2, "those over the VTEP stay");
}

/// A deleted nexthop object takes its route in silence.
pub async fn deleted_nexthop_is_noticed_with_its_route(world: &mut impl World, family: Family) {
    if family == Family::V6 {
        return; // IPv6 needs no nexthop objects.
    }
    let want = wanted(family, 3);
    settles(world.kernel(), &want).await;
    world.act(&Act::DeleteNexthop(nexthop_id(1)));
    woken(world.kernel()).await;
    let steps = settles(world.kernel(), &want).await;
    assert_eq!(
        steps,
        format!(
            "+ ip nexthop add id {id} via 10.64.1.0 dev fabric.1 onlink proto 250\n\
             + ip route add 10.64.1.0/24 nhid {id} proto 250\n",
            id = nexthop_id(1)
        )
    );
}

/// An FDB entry or neighbour that somebody deleted comes back.
pub async fn deleted_fdb_entry_and_neighbour_are_noticed(world: &mut impl World, family: Family) {
    let want = wanted(family, 3);
    let dev = device(family);
    settles(world.kernel(), &want).await;
    for act in [Act::DeleteFdb(dev, mac(1), underlay(family, 1)), Act::DeleteNeighbour(dev, subnet(family, 2).base())] {
        world.act(&act);
        woken(world.kernel()).await;
        let steps = settles(world.kernel(), &want).await;
        assert_eq!(steps.lines().count(), 1, "{steps}");
    }
}

/// A route with our mark that somebody bent is seen as ours and put right.
pub async fn route_of_ours_in_a_strange_shape_is_put_right(world: &mut impl World, family: Family) {
    let want = wanted(family, 3);
    settles(world.kernel(), &want).await;
    world.act(&Act::SpoilRoute(subnet(family, 1)));
    woken(world.kernel()).await;
    let bent = look(world.kernel()).await.ours.routes[&subnet(family, 1)].clone();
    assert!(matches!(&bent, Via::Other(words) if words.contains("blackhole")), "{bent:?}");
    let steps = settles(world.kernel(), &want).await;
    assert!(steps.starts_with("~ ip route replace"), "{steps}");
    world.act(&Act::SpoilRoute(subnet(family, 1)));
    settles(world.kernel(), &Routing::default()).await;
}
