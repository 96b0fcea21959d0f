//! The table of decisions, a case a test. Endpoints are letters: `a` is 192.0.2.1 or 2001:db8::1, and so on to `z`. What
//! stands behind one says where it is (`@here`, `@there`) and what is said of it:
//!
//! ```text
//! unready        it takes no connections                zones=x+y     hints: for nodes of these zones
//! leaving        it is going, and serves                nodes=here    hints: for these nodes
//! stopped        it is going, and serves no more        pod=1         whose address it is
//! published      it is going, and said to be ready      slice=2       the slice that tells of it; a higher one is newer
//! ```
//!
//! This node is `here`, in zone `x`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::balance::Algorithm;
use super::choose::{Answer, Frontend, Here, Origin, choose};
use super::model::{
    Endpoint, Hints, ObjectName, Policy, Protocol, Service, ServicePort, ServiceType, Slice, SlicePort, SourceRanges,
};
use super::slices::backends;
use crate::model::Family;

fn ip(letter: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 0, 2, letter - b'a' + 1).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(letter - b'a' + 1)).into(),
    }
}

fn letter(ip: IpAddr) -> char {
    let last = match ip {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(ip) => ip.octets()[15],
    };
    char::from(b'a' + last - 1)
}

fn names(list: &str) -> Box<[Arc<str>]> {
    list.split('+').filter(|name| !name.is_empty()).map(Arc::from).collect()
}

/// An endpoint, and the number of its slice.
fn endpoint(text: &str, family: Family) -> (Endpoint, usize) {
    let mut words = text.split_whitespace();
    let place = words.next().unwrap();
    let node = place.split_once('@').map(|(_, node)| Arc::from(node));
    let (ready, serving, terminating) = (true, true, false);
    let mut endpoint =
        Endpoint { ip: ip(place.as_bytes()[0], family), ready, serving, terminating, node, pod: 0, hints: None };
    let (mut slice, mut hints) = (1, Hints::default());
    for word in words {
        match word.split_once('=').unwrap_or((word, "")) {
            ("unready", _) => (endpoint.ready, endpoint.serving) = (false, false),
            ("leaving", _) => (endpoint.ready, endpoint.terminating) = (false, true),
            ("stopped", _) => (endpoint.ready, endpoint.serving, endpoint.terminating) = (false, false, true),
            ("published", _) => endpoint.terminating = true,
            ("zones", list) => hints.zones = names(list),
            ("nodes", list) => hints.nodes = names(list),
            ("pod", number) => endpoint.pod = number.parse().unwrap(),
            ("slice", number) => slice = number.parse().unwrap(),
            other => panic!("{other:?}"),
        }
    }
    endpoint.hints = (hints != Hints::default()).then(|| Box::new(hints));
    (endpoint, slice)
}

fn slices(text: &str, family: Family) -> Vec<Slice> {
    let mut slices: Vec<Slice> = (1..=3)
        .map(|number| Slice {
            name: ObjectName::new("default", &format!("web-{number}")),
            service: ObjectName::new("default", "web"),
            revision: number,
            triggered: None,
            family,
            ports: [SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }].into(),
            endpoints: Box::default(),
        })
        .collect();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (endpoint, slice) = endpoint(part, family);
        let of = &mut slices[slice - 1].endpoints;
        *of = of.iter().cloned().chain([endpoint]).collect();
    }
    slices
}

fn web() -> Service {
    Service {
        name: ObjectName::new("default", "web"),
        created: 20_261_128_100_000,
        kind: ServiceType::NodePort,
        cluster_ips: [IpAddr::from([198, 51, 100, 1])].into(),
        external_ips: Box::default(),
        balancer_ips: Box::default(),
        ports: [ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: Some(30_080) }].into(),
        internal: Policy::Cluster,
        external: Policy::Cluster,
        affinity: None,
        algorithm: Algorithm::default(),
        health_check_port: None,
        source_ranges: SourceRanges::default(),
        refused: Box::default(),
    }
}

const HERE: Here<'_> = Here { node: "here", zone: Some("x") };

fn letters<'a>(list: impl IntoIterator<Item = &'a super::Backend<'a>>) -> String {
    list.into_iter().map(|backend| letter(backend.endpoint.ip)).collect()
}

/// `ab/a` is: cluster a and b, local a; `nobody` that nobody anywhere could take a connection.
fn lists(text: &str, here: Here<'_>, family: Family) -> String {
    let (service, slices) = (web(), slices(text, family));
    let backends = backends(&service, &service.ports[0], family, &slices);
    let choice = choose(&backends, here);
    if !choice.any {
        assert!(choice.cluster.is_empty() && choice.local.is_empty());
        return "nobody".to_owned();
    }
    format!("{}/{}", letters(&choice.cluster), letters(&choice.local))
}

/// Both families decide alike.
macro_rules! lists {
    ($($name:ident: $endpoints:literal => $lists:literal;)*) => { $(
        #[test]
        fn $name() {
            for family in Family::ALL {
                assert_eq!(lists($endpoints, HERE, family), $lists, "{family:?}");
            }
        }
    )* };
}

lists! {
    no_endpoints_are_nobody: "" => "nobody";
    ready_endpoint_here_is_in_both_lists: "a@here" => "a/a";
    ready_endpoint_elsewhere_is_in_the_clusters_list: "a@there" => "a/";
    ready_endpoints_of_all_nodes_are_the_clusters: "a@here, b@there, c@yonder" => "abc/a";
    endpoint_without_a_node_is_not_local: "a, b@here" => "ab/b";
    only_endpoint_without_a_node_serves_the_cluster: "a" => "a/";
    unready_endpoint_takes_nothing: "a@here unready" => "nobody";
    unready_endpoint_beside_a_ready_one_takes_nothing: "a@here unready, b@there" => "b/";
    several_local_ones_are_all_local: "a@here, b@here, c@there" => "abc/ab";

    // Those that are going.
    leaving_endpoint_serves_where_there_is_no_other: "a@here leaving" => "a/a";
    leaving_endpoints_all_serve_where_there_is_no_other: "a@here leaving, b@there leaving" => "ab/a";
    ready_endpoint_goes_before_a_leaving_one: "a@there leaving, b@there" => "b/";
    leaving_one_here_serves_the_local_list_beside_a_ready_one_elsewhere: "a@here leaving, b@there" => "b/a";
    ready_one_here_keeps_a_leaving_one_here_out: "a@here leaving, b@here" => "b/b";
    ready_one_here_serves_both_lists_beside_one_leaving_elsewhere: "a@there leaving, b@here" => "b/b";
    stopped_endpoint_takes_nothing: "a@here stopped" => "nobody";
    stopped_endpoint_takes_nothing_beside_a_leaving_one: "a@here stopped, b@there leaving" => "b/";
    stopped_endpoint_takes_nothing_beside_a_ready_one: "a@here stopped, b@here" => "b/b";
    unready_endpoint_takes_nothing_beside_a_leaving_one: "a@here unready, b@here leaving" => "b/b";
    published_endpoint_that_is_going_counts_as_ready: "a@here published, b@there" => "ab/a";
    published_endpoint_keeps_a_leaving_one_out: "a@here published, b@there leaving" => "a/a";

    // Hints for zones.
    hints_for_our_zone_are_followed: "a@here zones=x, b@there zones=y" => "a/a";
    endpoint_for_our_zone_may_be_anywhere: "a@there zones=x, b@yonder zones=y" => "a/";
    endpoint_for_several_zones_is_for_each: "a@there zones=x+y, b@there zones=y+z" => "a/";
    one_ready_endpoint_without_hints_turns_them_off: "a@there zones=x, b@there" => "ab/";
    hints_for_other_zones_alone_are_not_followed: "a@there zones=y, b@there zones=z" => "ab/";
    unready_endpoint_without_hints_turns_nothing_off: "a@there zones=x, b@there zones=y, c@there unready" => "a/";
    leaving_endpoint_without_hints_turns_nothing_off: "a@there zones=x, b@there zones=y, c@there leaving" => "a/";
    hint_of_an_unready_endpoint_for_us_counts_for_nothing: "a@there zones=x unready, b@there zones=y" => "b/";
    hints_cut_nothing_off_the_local_list: "a@here zones=y, b@there zones=x" => "b/a";
    hints_are_not_followed_among_those_that_are_leaving: "a@there zones=x leaving, b@there zones=y leaving" => "ab/";
    all_ready_ones_for_our_zone_are_kept: "a@there zones=x, b@there zones=x, c@there zones=y" => "ab/";

    // Hints for nodes go first.
    hints_for_this_node_are_followed: "a@here nodes=here, b@there nodes=there" => "a/a";
    hints_for_this_node_go_before_those_for_our_zone: "a@here nodes=here zones=y, b@there nodes=there zones=x" => "a/a";
    hints_for_other_nodes_leave_it_to_the_zones: "a@there nodes=there zones=x, b@yonder nodes=yonder zones=y" => "a/";
    hints_for_other_nodes_alone_are_not_followed: "a@there nodes=there, b@yonder nodes=yonder" => "ab/";
    one_without_a_node_hint_leaves_it_to_the_zones: "a@here nodes=here zones=y, b@there zones=x" => "b/a";
    endpoint_elsewhere_may_be_meant_for_this_node: "a@there nodes=here, b@yonder nodes=yonder" => "a/";
    hint_for_several_nodes_is_for_each: "a@there nodes=here+there, b@yonder nodes=yonder" => "a/";

    // One address in several slices.
    address_in_two_slices_is_one_endpoint: "a@here pod=1, a@here pod=1 slice=2" => "a/a";
    newer_slice_tells_of_a_pod_that_is_ready: "a@here pod=1 unready, a@here pod=1 slice=2" => "a/a";
    newer_slice_tells_of_a_pod_that_is_going: "a@here pod=1, a@here pod=1 slice=2 stopped" => "nobody";
    older_slice_behind_the_newer_one_tells_nothing: "a@here pod=1 slice=2 unready, a@here pod=1" => "nobody";
    ready_pod_that_has_a_former_pods_address_counts: "a@here pod=1 slice=2 leaving, a@there pod=2" => "a/";
    ready_pod_counts_however_old_its_slice_is: "a@there pod=2, a@here pod=1 slice=3 stopped" => "a/";
    of_two_ready_pods_with_one_address_the_newer_slice_tells: "a@here pod=1, a@there pod=2 slice=2" => "a/";
    three_entries_are_judged_by_pod_first: "a@here pod=1, a@here pod=1 slice=3 unready, a@there pod=2 slice=2" => "a/";
    endpoint_without_a_pod_in_two_slices_is_as_the_newer_tells: "a@here, a@here slice=2 unready" => "nobody";
    endpoints_of_all_slices_are_one_list: "a@here, b@here slice=2, c@there slice=3" => "abc/ab";
    pod_that_moves_between_slices_is_there_all_the_while: "a@here pod=1, a@here pod=1 slice=2, b@there slice=2" => "ab/a";
}

#[test]
fn node_without_a_zone_follows_no_hints_for_zones() {
    let here = Here { node: "here", zone: None };
    assert_eq!(lists("a@here zones=x, b@there zones=y", here, Family::V4), "ab/a");
}

#[test]
fn node_in_another_zone_follows_its_own() {
    let here = Here { node: "here", zone: Some("y") };
    assert_eq!(lists("a@here zones=x, b@there zones=y", here, Family::V4), "b/a");
}

#[test]
fn node_without_a_zone_follows_hints_for_itself() {
    let here = Here { node: "here", zone: None };
    assert_eq!(lists("a@here nodes=here zones=x, b@there nodes=there zones=y", here, Family::V4), "a/a");
}

#[test]
fn endpoint_that_is_the_services_own_address_is_passed_over() {
    let mut service = web();
    service.balancer_ips = [ip(b'b', Family::V4)].into();
    let slices = slices("a@here, b@here", Family::V4);
    let backends = backends(&service, &service.ports[0], Family::V4, &slices);
    assert_eq!(letters(&backends), "a");
}

#[test]
fn families_are_two_services() {
    let both: Vec<Slice> = Family::ALL.into_iter().flat_map(|family| slices("a@here, b@there", family)).collect();
    let service = web();
    for family in Family::ALL {
        let backends = backends(&service, &service.ports[0], family, &both);
        assert!(backends.len() == 2 && backends.iter().all(|backend| Family::of(backend.endpoint.ip) == family));
    }
}

#[test]
fn slices_port_of_another_name_or_protocol_is_another_ports() {
    let service = web();
    let with = |name: &str, protocol| {
        let mut slices = slices("a@here", Family::V4);
        slices[0].ports = [SlicePort { name: name.into(), protocol, port: 1 }].into();
        backends(&service, &service.ports[0], Family::V4, &slices).len()
    };
    assert_eq!([with("http", Protocol::Tcp), with("https", Protocol::Tcp), with("http", Protocol::Udp)], [1, 0, 0]);
}

#[test]
fn named_port_may_have_another_number_in_each_slice() {
    let service = web();
    let mut slices = slices("a@here, b@here slice=2", Family::V4);
    slices[1].ports = [SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 9090 }].into();
    let backends = backends(&service, &service.ports[0], Family::V4, &slices);
    let sockets: Vec<_> = backends.iter().map(|backend| (letter(backend.endpoint.ip), backend.port)).collect();
    assert_eq!(sockets, [('a', 8080), ('b', 9090)]);
}

#[test]
fn one_pod_may_serve_a_port_with_two_numbers() {
    let service = web();
    let mut slices = slices("a@here, a@here slice=2", Family::V4);
    slices[1].ports = [SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 9090 }].into();
    assert_eq!(backends(&service, &service.ports[0], Family::V4, &slices).len(), 2);
}

/// What becomes of a connection to a frontend from somewhere, by `internalTrafficPolicy` and `externalTrafficPolicy`.
fn answer(internal: Policy, external: Policy, frontend: Frontend, origin: Origin, endpoints: &str) -> String {
    let service = Service { internal, external, ..web() };
    let slices = slices(endpoints, Family::V4);
    let backends = backends(&service, &service.ports[0], Family::V4, &slices);
    let choice = choose(&backends, HERE);
    match choice.answer(service.policy(frontend, origin)) {
        Answer::To(list) => letters(list),
        Answer::Reject => "reject".to_owned(),
        Answer::Drop => "drop".to_owned(),
    }
}

macro_rules! answers {
    ($($name:ident: $internal:ident/$external:ident, $frontend:ident from $origin:ident, $endpoints:literal => $answer:literal;)*) => { $(
        #[test]
        fn $name() {
            let (internal, external) = (Policy::$internal, Policy::$external);
            assert_eq!(answer(internal, external, Frontend::$frontend, Origin::$origin, $endpoints), $answer);
        }
    )* };
}

answers! {
    cluster_ip_leads_to_all: Cluster/Cluster, ClusterIp from Inside, "a@here, b@there" => "ab";
    cluster_ip_of_a_local_service_leads_to_those_here: Local/Cluster, ClusterIp from Inside, "a@here, b@there" => "a";
    cluster_ip_of_a_local_service_with_none_here_is_dropped: Local/Cluster, ClusterIp from Inside, "b@there" => "drop";
    cluster_ip_of_a_local_service_with_none_anywhere_is_rejected: Local/Cluster, ClusterIp from Inside, "" => "reject";
    cluster_ip_of_a_local_service_leads_to_one_leaving_here: Local/Cluster, ClusterIp from Inside, "a@here leaving, b@there" => "a";
    cluster_ip_of_a_local_service_with_one_leaving_elsewhere_is_dropped: Local/Cluster, ClusterIp from Inside, "b@there leaving" => "drop";
    cluster_ip_with_unready_ones_alone_is_rejected: Cluster/Cluster, ClusterIp from Inside, "a@here unready" => "reject";
    cluster_ip_with_stopped_ones_alone_is_rejected: Cluster/Cluster, ClusterIp from Inside, "a@here stopped" => "reject";
    external_policy_says_nothing_of_the_cluster_ip: Cluster/Local, ClusterIp from Inside, "b@there" => "b";
    cluster_ip_from_outside_is_under_the_internal_policy: Local/Cluster, ClusterIp from Outside, "a@here, b@there" => "a";
    external_frontend_leads_to_all: Cluster/Cluster, External from Outside, "a@here, b@there" => "ab";
    external_frontend_with_none_anywhere_is_rejected: Cluster/Cluster, External from Outside, "" => "reject";
    local_external_frontend_leads_to_those_here: Cluster/Local, External from Outside, "a@here, b@there" => "a";
    local_external_frontend_with_none_here_is_dropped: Cluster/Local, External from Outside, "b@there" => "drop";
    local_external_frontend_with_none_anywhere_is_rejected: Cluster/Local, External from Outside, "" => "reject";
    local_external_frontend_leads_to_one_leaving_here: Cluster/Local, External from Outside, "a@here leaving, b@there" => "a";
    local_external_frontend_from_inside_leads_to_all: Cluster/Local, External from Inside, "a@here, b@there" => "ab";
    local_external_frontend_from_inside_leads_elsewhere_too: Cluster/Local, External from Inside, "b@there" => "b";
    internal_policy_says_nothing_of_external_frontends: Local/Cluster, External from Inside, "b@there" => "b";
    hints_hold_for_what_comes_from_inside_to_a_local_external_frontend: Cluster/Local, External from Inside, "a@here zones=y, b@there zones=x" => "b";
}
