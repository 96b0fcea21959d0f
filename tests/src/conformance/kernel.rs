//! What every [`Kernel`] must do, as cases that run on [`FakeKernel`](crate::fake_kernel::FakeKernel) and, in a network
//! namespace, on [`Netlink`](fabricd::kernel::netlink::Netlink).
//!
//! A [`World`] is a kernel under test together with the other programs of its host, which act behind fabricd's back.
//! Every world begins with `lo` and with `eth0`, up, with [`HOST`]'s addresses.

mod drift;
mod others;

use std::sync::Arc;
use std::time::Duration;

use fabric_core::diff::routing::Op;
use fabric_core::diff::{self, Change, Gate, diff};
use fabric_core::model::{Family, IfName, MacAddr, Subnet};
use fabric_core::state::{NEXTHOP_ID_BASE, Nexthop, NexthopId, Routing, State, Sysctl, Via, VxlanLink};
use fabricd::kernel::{AUDITS, Kernel, KernelError, Observed, Touched};

pub use self::drift::{
    deleted_device_is_noticed_with_all_that_hung_on_it, deleted_fdb_entry_and_neighbour_are_noticed,
    deleted_nexthop_is_noticed_with_its_route, device_set_down_is_noticed_with_what_it_lost,
    route_of_ours_in_a_strange_shape_is_put_right, underlay_set_down_is_noticed_with_its_direct_routes,
};
pub use self::others::{
    direct_route_of_flannels_kind_is_replaced_in_place, place_that_others_took_is_refused,
    plain_route_of_others_is_replaced_in_place, vxlan_of_others_with_our_vni_stays,
    vxlan_with_our_name_as_its_alternative_one_is_ours, what_others_made_stays_theirs,
    wider_route_of_others_is_no_obstacle,
};

/// The host's addresses on `eth0`.
pub const HOST: [&str; 2] = ["192.0.2.1/24", "2001:db8:ff::1/64"];

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Something that another program of the host does.
#[derive(Clone, Debug)]
pub enum Act {
    /// `ip link del DEV`.
    DeleteLink(IfName),
    /// `ip link set DEV down`.
    LinkDown(IfName),
    /// `ip link add NAME up type vxlan id VNI dstport PORT local IP`.
    AddVxlan {
        /// Name of the device.
        name: IfName,
        /// VNI.
        vni: u32,
        /// UDP port.
        port: u16,
    },
    /// `ip link property add dev DEV altname NAME`.
    AddAltname(IfName, IfName),
    /// `ip nexthop add id ID via IP dev DEV onlink`.
    AddNexthop(NexthopId, Nexthop),
    /// `ip nexthop del id ID`.
    DeleteNexthop(NexthopId),
    /// `ip route add DST via IP dev DEV onlink proto static`.
    AddRoute(Subnet, Nexthop),
    /// A route of protocol boot, as of all that names none.
    AddBootRoute(Subnet, Nexthop),
    /// `ip route change DST … proto 250`, to a shape that fabricd never gives a route: a blackhole.
    SpoilRoute(Subnet),
    /// `bridge fdb add MAC dev DEV dst IP self permanent`.
    AddFdb(IfName, MacAddr, std::net::IpAddr),
    /// `bridge fdb del MAC dev DEV`.
    DeleteFdb(IfName, MacAddr, std::net::IpAddr),
    /// `ip neighbour del IP dev DEV`.
    DeleteNeighbour(IfName, std::net::IpAddr),
    /// `nft flush ruleset`.
    FlushRuleset,
}

/// A kernel under test, and what else happens on its host.
pub trait World {
    /// The kernel's type.
    type Kernel: Kernel;

    /// The kernel under test.
    fn kernel(&mut self) -> &mut Self::Kernel;

    /// Another program acts.
    fn act(&mut self, act: &Act);

    /// How many FDB entries a device has, as somebody else counts them.
    fn fdb_entries(&self, dev: &IfName) -> usize;
}

/// Text as a value of the domain.
///
/// # Panics
/// When it is none: the text is a test's own.
pub fn v<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} in a test is wrong"))
}

/// Our device of one family.
#[must_use]
pub fn device(family: Family) -> IfName {
    v(match family {
        Family::V4 => "fabric.1",
        Family::V6 => "fabric6.1",
    })
}

/// The id of the nexthop object of peer `n`.
#[must_use]
pub fn nexthop_id(n: u32) -> NexthopId {
    NexthopId(NEXTHOP_ID_BASE + n)
}

/// The subnet of peer `n`.
#[must_use]
pub fn subnet(family: Family, n: u32) -> Subnet {
    match family {
        Family::V4 => v(&format!("10.{}.{}.0/24", 64 + n / 256, n % 256)),
        Family::V6 => v(&format!("2001:db8:0:{n:x}::/64")),
    }
}

/// The VTEP's MAC address of peer `n`.
#[must_use]
pub fn mac(n: u32) -> MacAddr {
    v(&format!("02:42:00:00:{:02x}:{:02x}", n / 256, n % 256))
}

/// The underlay address of peer `n`.
#[must_use]
pub fn underlay(family: Family, n: u32) -> std::net::IpAddr {
    match family {
        Family::V4 => v(&format!("192.0.2.{}", n % 250 + 2)),
        Family::V6 => v(&format!("2001:db8:ff::{:x}", n + 0x10)),
    }
}

/// What a node with `peers` peers wants of one family; the last peer is reached directly.
#[must_use]
pub fn wanted(family: Family, peers: u32) -> Routing {
    let dev = device(family);
    let mut state = Routing::default();
    state.links.insert(
        dev,
        VxlanLink {
            vni: v::<u32>("1").try_into().expect("a VNI"),
            port: 8472,
            gbp: false,
            mac: mac(0),
            local: v(HOST[usize::from(family == Family::V6)].split('/').next().expect("an address")),
            mtu: 1500 - family.vxlan_overhead(),
            learning: false,
            up: true,
        },
    );
    state.sysctls.insert(Sysctl::AcceptRa(dev), 0);
    state.sysctls.extend((family == Family::V4).then_some((Sysctl::RpFilter(dev), 2)));
    state.sysctls.insert(if family == Family::V4 { Sysctl::Ipv4Forward } else { Sysctl::Ipv6Forward }, 1);
    state.addresses.insert((dev, Subnet::host(subnet(family, 0).base())));
    for n in 1..peers {
        let dst = subnet(family, n);
        let via = Nexthop { gateway: dst.base(), dev };
        state.fdb.insert((dev, mac(n)), underlay(family, n));
        state.neighbours.insert((dev, dst.base()), mac(n));
        let via = match family {
            Family::V4 => {
                state.nexthops.insert(nexthop_id(n), via);
                Via::Nexthop(nexthop_id(n))
            }
            Family::V6 => Via::Gateway(via),
        };
        state.routes.insert(dst, via);
    }
    let direct = Nexthop { gateway: underlay(family, peers), dev: v("eth0") };
    state.routes.insert(subnet(family, peers), Via::Direct(direct));
    state
}

/// One look.
///
/// # Panics
/// When the kernel can't be read.
pub async fn look(kernel: &mut impl Kernel) -> Arc<Observed> {
    let observed = tokio::time::timeout(PATIENCE, kernel.observe()).await.expect("observe answers");
    observed.expect("the kernel can be read")
}

/// What is ours now, of the settings only those wanted at all.
async fn ours(kernel: &mut impl Kernel, want: &Routing) -> Routing {
    let mut ours = look(kernel).await.ours.clone();
    ours.sysctls.retain(|setting, _| want.sysctls.contains_key(setting));
    ours
}

/// Applies the plan from what is there to `want`: the steps taken.
///
/// # Panics
/// When a step fails.
pub async fn settle(kernel: &mut impl Kernel, want: impl Into<State<'_>>) -> String {
    let (want, observed) = (want.into(), look(kernel).await);
    let plan = diff(want, observed.found(want.routing));
    let mut gate = Gate::default();
    for stage in plan.stages() {
        assert!(stage.iter().all(|op| gate.admits(op).is_ok()));
        for (op, result) in stage.iter().zip(kernel.apply(stage).await) {
            result.unwrap_or_else(|error| panic!("{op}: {error}"));
        }
    }
    plan.to_string()
}

/// Applies the plan and checks that the kernel holds what is wanted then, with nothing left to do.
async fn settles(kernel: &mut impl Kernel, want: &Routing) -> String {
    let steps = settle(kernel, want).await;
    assert_eq!(ours(kernel, want).await, *want);
    assert_eq!(settle(kernel, want).await, "", "a second pass writes nothing");
    steps
}

/// Waits until the kernel says that something changed.
///
/// # Panics
/// When it doesn't.
pub async fn woken(kernel: &mut impl Kernel) -> Touched {
    tokio::time::timeout(PATIENCE, kernel.changed()).await.expect("changed() wakes")
}

/// Steps of routing, given to the kernel at once.
async fn apply(kernel: &mut impl Kernel, ops: &[Op]) -> Vec<Result<(), KernelError>> {
    let ops: Vec<diff::Op> = ops.iter().cloned().map(diff::Op::from).collect();
    kernel.apply(&ops).await
}

/// The errno of each refused step, by position.
pub(super) fn refusals(results: &[Result<(), KernelError>]) -> Vec<(usize, i32)> {
    let errno = |error: &KernelError| error.errno().expect("a refusal has an errno");
    results.iter().enumerate().filter_map(|(at, result)| Some((at, errno(result.as_ref().err()?)))).collect()
}

/// All that is wanted is made, seen again as it was wanted, and not written twice.
pub async fn what_is_wanted_is_made_and_seen(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let steps = settles(kernel, &wanted(family, 5)).await;
    assert!(steps.lines().count() >= 15, "{steps}");
}

/// Each entry can take another value in place.
pub async fn every_entry_changes_in_place(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let dev = device(family);
    settles(kernel, &wanted(family, 5)).await;
    let mut want = wanted(family, 5);
    let link = want.links.get_mut(&dev).expect("wanted");
    (link.mac, link.mtu, link.learning) = (mac(99), 1300, true);
    link.local = underlay(family, 70);
    want.fdb.insert((dev, mac(1)), underlay(family, 71));
    want.neighbours.insert((dev, subnet(family, 2).base()), mac(1));
    if family == Family::V4 {
        let other = Nexthop { gateway: subnet(family, 2).base(), dev };
        want.nexthops.insert(nexthop_id(1), other);
    }
    let first = want.routes[&subnet(family, 1)].clone();
    want.routes.insert(subnet(family, 2), first);
    let direct = want.routes[&subnet(family, 5)].clone();
    want.routes.insert(subnet(family, 3), direct);
    let steps = settles(kernel, &want).await;
    // The new MAC address cost the neighbours.
    let made: Vec<_> = steps.lines().filter(|step| !step.starts_with('~')).collect();
    assert!(made.len() == 4 && made.iter().all(|step| step.starts_with("+ ip neighbour")), "{steps}");
}

/// A peer moves out of our layer-2 segment and back in: its route changes between direct and encapsulated.
pub async fn route_changes_between_direct_and_encapsulated(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let encapsulated = wanted(family, 3);
    let mut direct = encapsulated.clone();
    let through = encapsulated.routes[&subnet(family, 3)].clone();
    direct.routes.insert(subnet(family, 1), through);
    settles(kernel, &encapsulated).await;
    for want in [&direct, &encapsulated] {
        let steps = settles(kernel, want).await;
        assert!(steps.starts_with("~ ip route replace") && steps.lines().count() == 1, "{steps}");
    }
}

/// A device that can't become what is wanted is made anew, with all that hung on it.
pub async fn changed_port_makes_the_device_anew(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    settles(kernel, &wanted(family, 3)).await;
    let mut want = wanted(family, 3);
    want.links.get_mut(&device(family)).expect("wanted").port = 4789;
    let steps = settles(kernel, &want).await;
    assert!(steps.starts_with("- ip link del"), "{steps}");
}

/// All of it goes again.
pub async fn what_is_not_wanted_goes(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    settles(kernel, &wanted(family, 5)).await;
    settles(kernel, &wanted(family, 2)).await;
    settles(kernel, &Routing::default()).await;
}

/// What is gone already is no error to delete, and an address that is there none to make.
pub async fn repeated_steps_are_no_error(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let want = wanted(family, 3);
    settles(kernel, &want).await;
    let dev = device(family);
    let again: Vec<Op> = want
        .addresses
        .iter()
        .map(|(dev, address)| Op::Address(*dev, Change::Create(*address)))
        .chain(want.fdb.iter().map(|((dev, mac), dst)| Op::Fdb(*dev, *mac, Change::Create(*dst))))
        .chain(want.neighbours.iter().map(|((d, ip), mac)| Op::Neighbour(*d, *ip, Change::Create(*mac))))
        .collect();
    assert_eq!(refusals(&apply(kernel, &again).await), []);
    let link = want.links[&dev];
    let mut deletions: Vec<Op> =
        want.routes.iter().map(|(dst, via)| Op::Route(*dst, Change::Delete(via.clone()))).collect();
    deletions.extend(want.nexthops.iter().map(|(id, to)| Op::Nexthop(*id, Change::Delete(*to))));
    deletions.extend(want.neighbours.iter().map(|((d, ip), mac)| Op::Neighbour(*d, *ip, Change::Delete(*mac))));
    deletions.extend(want.fdb.iter().map(|((d, mac), dst)| Op::Fdb(*d, *mac, Change::Delete(*dst))));
    deletions.extend(want.addresses.iter().map(|(d, address)| Op::Address(*d, Change::Delete(*address))));
    for _ in 0..2 {
        assert_eq!(refusals(&apply(kernel, &deletions).await), []);
    }
    deletions.push(Op::Link(dev, Change::Delete(link)));
    for _ in 0..2 {
        assert_eq!(refusals(&apply(kernel, &deletions).await), []);
    }
    settles(kernel, &want).await;
}

/// The first entries of a table that exclude each other are not made twice.
pub async fn device_nexthop_or_route_that_is_there_is_not_made_again(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let want = wanted(family, 2);
    settles(kernel, &want).await;
    let dev = device(family);
    let mut ops = vec![Op::Link(dev, Change::Create(want.links[&dev]))];
    ops.extend(want.nexthops.iter().map(|(id, to)| Op::Nexthop(*id, Change::Create(*to))));
    ops.extend(want.routes.iter().map(|(dst, via)| Op::Route(*dst, Change::Create(via.clone()))));
    let refused = refusals(&apply(kernel, &ops).await);
    assert_eq!(refused, (0..ops.len()).map(|at| (at, libc::EEXIST)).collect::<Vec<_>>());
}

/// Steps on a device that isn't there, on a nexthop object that isn't there, or without a way to the gateway.
pub async fn step_without_its_base_is_refused_alone(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let want = wanted(family, 2);
    settles(kernel, &want).await;
    let nowhere: IfName = v("fabric.9");
    let to = |dev: &IfName| Nexthop { gateway: subnet(family, 8).base(), dev: *dev };
    let ops = [
        Op::Fdb(nowhere, mac(8), Change::Create(underlay(family, 8))),
        Op::Fdb(device(family), mac(8), Change::Create(underlay(family, 8))),
        Op::Neighbour(nowhere, subnet(family, 8).base(), Change::Create(mac(8))),
        Op::Nexthop(nexthop_id(8), Change::Create(to(&nowhere))),
        Op::Route(subnet(family, 8), Change::Create(Via::Nexthop(nexthop_id(77)))),
        Op::Fdb(nowhere, mac(9), Change::Delete(underlay(family, 9))),
    ];
    let refused = refusals(&apply(kernel, &ops).await);
    assert_eq!(refused, [(0, libc::ENODEV), (2, libc::ENODEV), (3, libc::ENODEV), (4, libc::EINVAL)]);
    let off_link =
        Nexthop { gateway: v(if family == Family::V4 { "198.51.100.1" } else { "2001:db8:99::1" }), dev: v("eth0") };
    let direct = Op::Route(subnet(family, 8), Change::Create(Via::Direct(off_link)));
    let unreachable = if family == Family::V4 { libc::ENETUNREACH } else { libc::EHOSTUNREACH };
    assert_eq!(refusals(&apply(kernel, &[direct]).await), [(0, unreachable)]);
}

/// Of a large batch exactly the steps that fail are reported.
pub async fn batch_of_600_reports_exactly_the_three_that_fail(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    settles(kernel, &wanted(family, 1)).await;
    let dev = device(family);
    let mut ops: Vec<Op> =
        (1..=600).map(|n| Op::Neighbour(dev, subnet(family, n).base(), Change::Create(mac(n)))).collect();
    for at in [2, 299, 599] {
        ops[at] = Op::Route(subnet(family, 9), Change::Create(Via::Nexthop(nexthop_id(77))));
    }
    assert_eq!(refusals(&apply(kernel, &ops).await), [(2, libc::EINVAL), (299, libc::EINVAL), (599, libc::EINVAL)]);
    assert_eq!(look(kernel).await.ours.neighbours.len(), 597);
}

/// Thousands of refusals don't lose each other.
pub async fn batch_in_which_all_fail_reports_all(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let ops: Vec<Op> =
        (0..3000).map(|n| Op::Route(subnet(family, n % 1000), Change::Create(Via::Nexthop(nexthop_id(77))))).collect();
    assert_eq!(refusals(&apply(kernel, &ops).await).len(), 3000);
}

/// A look at a kernel that nothing happened to shows the same once more, and nobody is woken.
pub async fn silence_wakes_nobody(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    settles(kernel, &wanted(family, 2)).await;
    let falls_silent = async {
        loop {
            let before = look(kernel).await;
            // Polled once: nothing is there to be waited for. A link just made may still be busy with itself.
            let silent = tokio::time::timeout(Duration::ZERO, kernel.changed()).await.is_err();
            if silent && Arc::ptr_eq(&before, &look(kernel).await) {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, falls_silent).await.expect("nothing is read again and nobody woken");
}

/// An audit looks anew, and where nothing has changed all of them find the same.
pub async fn audits_find_what_is_known(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    settles(kernel, &wanted(family, 2)).await;
    let before = look(kernel).await;
    for _ in 0..AUDITS {
        kernel.audit();
        let after = look(kernel).await;
        assert!(!Arc::ptr_eq(&before, &after));
        assert_eq!(before, after);
    }
}
