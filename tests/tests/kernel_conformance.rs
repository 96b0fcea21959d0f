//! The kernel conformance suite on both kernels. What only the real one can show is in `kernel_netlink.rs`.

use fabric_core::model::{Family, IfName};
use fabric_core::state::{ROUTE_PROTOCOL, Via, VxlanLink};
use fabric_tests::conformance::kernel::{Act, HOST, World, v};
use fabric_tests::conformance::real_world::RealWorld;
use fabric_tests::fake_kernel::{BOOT, FakeKernel, STATIC, Tables};
use fabric_tests::netns::in_netns_async;
use ipnetwork::IpNetwork;

/// The fake and the other programs on its host.
struct FakeWorld(FakeKernel);

impl FakeWorld {
    fn new() -> Self {
        let addresses = HOST.map(|text| {
            let net: IpNetwork = v(text);
            (net.ip(), v(&format!("{}/{}", net.network(), net.prefix())))
        });
        Self(FakeKernel::new(Tables::host(&addresses)))
    }
}

impl World for FakeWorld {
    type Kernel = FakeKernel;

    fn kernel(&mut self) -> &mut FakeKernel {
        &mut self.0
    }

    fn act(&mut self, act: &Act) {
        self.0.edit(|tables| match act.clone() {
            Act::DeleteLink(dev) => tables.delete_link(&dev),
            Act::LinkDown(dev) => tables.set_down(&dev),
            Act::AddVxlan { name, vni, port } => {
                let vxlan = VxlanLink {
                    vni: vni.try_into().expect("a VNI"),
                    port,
                    gbp: false,
                    mac: v("02:00:00:00:99:99"),
                    local: v("192.0.2.1"),
                    mtu: 1450,
                    learning: true,
                    up: true,
                };
                tables.add_vxlan(name, vxlan).expect("free");
            }
            Act::AddAltname(dev, name) => tables.links.get_mut(&dev).expect("there").altname = Some(name),
            Act::AddNexthop(id, to) => {
                tables.nexthops.insert(id, (STATIC, to));
            }
            Act::DeleteNexthop(id) => tables.delete_nexthop(id),
            Act::AddRoute(dst, to) => {
                tables.routes.insert(dst, (STATIC, Via::Gateway(to)));
            }
            Act::AddBootRoute(dst, to) => {
                tables.routes.insert(dst, (BOOT, Via::Direct(to)));
            }
            Act::SpoilRoute(dst) => {
                tables.routes.insert(dst, (ROUTE_PROTOCOL, Via::Other("blackhole".into())));
            }
            Act::AddFdb(dev, mac, dst) => {
                tables.fdb.insert((dev, mac), dst);
            }
            Act::DeleteFdb(dev, mac, _) => {
                tables.fdb.remove(&(dev, mac));
            }
            Act::DeleteNeighbour(dev, address) => {
                tables.neighbours.remove(&(dev, address));
            }
            Act::FlushRuleset => tables.filter.clear(),
        });
    }

    fn fdb_entries(&self, dev: &IfName) -> usize {
        self.0.tables().fdb.keys().filter(|(device, _)| device == dev).count()
    }
}

/// Each case as two tests, each on a world of its own for each family.
macro_rules! on_both_kernels {
    ($suite:ident in $world:expr => $($case:ident)*) => {
        mod $suite {
        mod fake {
            use super::super::*;
            $(#[tokio::test]
            async fn $case() {
                for family in Family::ALL {
                    fabric_tests::conformance::$suite::$case(&mut FakeWorld::new(), family).await;
                }
            })*
        }
        mod netlink {
            use super::super::*;
            $(#[test]
            fn $case() {
                for family in Family::ALL {
                    in_netns_async(|| async move {
                        let mut world = $world;
                        fabric_tests::conformance::$suite::$case(&mut world, family).await;
                    });
                }
            })*
        }
        }
    };
}

on_both_kernels! { kernel in RealWorld::default() =>
    what_is_wanted_is_made_and_seen
    every_entry_changes_in_place
    route_changes_between_direct_and_encapsulated
    changed_port_makes_the_device_anew
    what_is_not_wanted_goes
    repeated_steps_are_no_error
    device_nexthop_or_route_that_is_there_is_not_made_again
    deleted_device_is_noticed_with_all_that_hung_on_it
    device_set_down_is_noticed_with_what_it_lost
    underlay_set_down_is_noticed_with_its_direct_routes
    deleted_nexthop_is_noticed_with_its_route
    deleted_fdb_entry_and_neighbour_are_noticed
    route_of_ours_in_a_strange_shape_is_put_right
    what_others_made_stays_theirs
    place_that_others_took_is_refused
    plain_route_of_others_is_replaced_in_place
    direct_route_of_flannels_kind_is_replaced_in_place
    wider_route_of_others_is_no_obstacle
    vxlan_of_others_with_our_vni_stays
    vxlan_with_our_name_as_its_alternative_one_is_ours
    step_without_its_base_is_refused_alone
    batch_of_600_reports_exactly_the_three_that_fail
    batch_in_which_all_fail_reports_all
    silence_wakes_nobody
    audits_find_what_is_known
}

on_both_kernels! { filter in RealWorld::default() =>
    tables_are_made_seen_and_go_again
    peer_that_comes_or_goes_changes_elements_alone
    transaction_is_refused_as_a_whole_and_for_one_reason
    chains_are_refused_without_their_sets
    steps_of_both_sections_are_answered_in_their_order
    flushed_ruleset_is_noticed_and_made_anew
}

on_both_kernels! { fast_path in RealWorld::with_fast_path() =>
    fast_path_is_made_seen_and_goes_again
    peer_that_moves_costs_three_steps
    pod_is_marked_before_it_is_taken
    another_network_takes_all_away_first
    steps_without_their_base_are_refused_alone
    way_to_a_peer_is_seen_once_its_fdb_entry_is
}

on_both_kernels! { maps in RealWorld::default() =>
    maps_ranges_and_verdicts_are_made_seen_and_go_again
    frontends_change_between_the_pool_that_comes_and_the_one_that_goes
    chain_that_changes_leaves_all_others
    map_that_is_declared_in_another_way_is_replaced_with_its_rules
    section_that_is_not_known_is_left_alone
    what_leads_nowhere_is_refused
    thousands_of_frontends_come_change_and_go
}

/// Once more where programs are filters of tc, as before 6.6.
mod fast_path_without_tcx {
    use super::*;

    macro_rules! by_filters {
        ($($case:ident)*) => {$(
            #[test]
            fn $case() {
                in_netns_async(|| async move {
                    let mut world = RealWorld::without_tcx();
                    fabric_tests::conformance::fast_path::$case(&mut world, Family::V4).await;
                });
            }
        )*};
    }

    by_filters! {
        fast_path_is_made_seen_and_goes_again
        pod_is_marked_before_it_is_taken
        another_network_takes_all_away_first
        steps_without_their_base_are_refused_alone
    }
}
