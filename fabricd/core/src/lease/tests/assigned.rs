//! Where the cluster assigns the subnets.

use super::*;

const SEVEN: &str = "10.244.7.0-24";

fn assigned(subnet: &str) -> Option<Assigned> {
    let v4 = (!subnet.is_empty()).then(|| subnet.parse().expect(subnet));
    Some(Assigned { subnets: PerFamily { v4, v6: None }, public_ips: PerFamily::default(), boot: None })
}

/// One that holds `10.244.9.0-24`, and what the store shows then.
fn holder() -> (Node, LeaseSet) {
    let node = Node { assigned: assigned("10.244.9.0/24"), ..Node::with_a_lease() };
    (node, set(&[(NINE, fabric("node-1", "192.0.2.1"), 5)], 6))
}

#[test]
fn node_takes_what_it_is_assigned_and_nothing_else() {
    let mut node = Node { assigned: assigned(""), ..Node::new() };
    assert!(node.obstacle(&empty()).contains("no IPv4 subnet is assigned to this node; does the controller manager"));
    node.assigned = assigned("192.0.2.0/24");
    assert!(node.obstacle(&empty()).contains("lies outside the network 10.244.0.0/16"));
    // Its size is not the network config's to say.
    node.assigned = assigned("10.244.7.0/26");
    let claim = node.claim(&empty());
    assert_eq!((claim.key, claim.expect), (key("10.244.7.0-26"), Expect::Absent));
}

#[test]
fn flannels_mac_is_kept_and_an_address_that_a_person_wants_published() {
    let mut node = Node { assigned: assigned("10.244.9.0/24"), ..Node::new() };
    let flannels = set(&[(NINE, fabric("node-1", "192.0.2.1"), 5)], 6);
    let published = |node: &Node| node.claim(&flannels).record.endpoints().v4.expect("IPv4");
    assert_eq!(published(&node).vtep_mac.to_string(), "c6:d2:32:6f:8f:44");
    node.assigned.as_mut().expect("assigned").public_ips.v4 = Some("203.0.113.1".parse().expect("ip"));
    assert_eq!(published(&node).public_ip.to_string(), "203.0.113.1");
}

#[test]
fn held_lease_is_kept_as_long_as_the_record_says_so_whoever_wrote_it() {
    let (node, leases) = holder();
    assert_eq!(node.step(&leases), Step::Keep);
    let rewritten = set(&[(NINE, fabric("node-1", "192.0.2.1"), 9)], 9);
    assert_eq!(node.step(&rewritten), Step::Keep, "a later revision says the same");
    assert_eq!(node.step(&set(&[], 4)), Step::Keep, "the set is older than our write");
}

#[test]
fn record_that_was_erased_or_changed_is_written_again() {
    let (node, leases) = holder();
    let said = leases.get(&key(NINE)).expect("there").record.endpoints();
    let half =
        Entry { key: NINE.into(), value: br#"{"BackendType":"vxlan"}"#.to_vec(), create_revision: 5, mod_revision: 9 };
    let unreadable = LeaseSet::snapshot(&leases, vec![half], 9);
    for leases in [set(&[(NINE, fabric("node-1", "192.0.2.99"), 9)], 9), set(&[], 9), unreadable] {
        let Step::Rewrite(record) = node.step(&leases) else { panic!("{:?}", node.step(&leases)) };
        assert_eq!(record.endpoints(), said);
    }
}

#[test]
fn other_assignment_is_a_loss_and_waits_for_the_pods_of_the_old_subnet() {
    let (mut node, leases) = holder();
    node.assigned = assigned("");
    assert_eq!(node.step(&leases), Step::Lost(Loss::Unassigned(key(NINE))));
    node.assigned = assigned("10.244.7.0/24");
    assert_eq!(node.step(&leases), Step::Lost(Loss::Reassigned(key(NINE), key(SEVEN))));

    (node.held, node.pods) = (None, pods(&["10.244.9.2"]));
    assert!(node.obstacle(&empty()).contains("its pods still have addresses in 10.244.9.0/24"));
    node.leave = Some(key(NINE));
    assert_eq!(node.claim(&empty()).key, key(SEVEN), "told to cut them off");
    (node.leave, node.pods) = (None, vec![]);
    assert_eq!(node.claim(&empty()).key, key(SEVEN));
}

#[test]
fn address_of_another_node_is_refused() {
    let node = Node { assigned: assigned("10.244.9.0/24"), ..Node::new() };
    let other = set(&[(SEVEN, fabric("node-7", "192.0.2.1"), 5)], 6);
    assert!(node.obstacle(&other).contains("192.0.2.1 of this node, node-1, is also that of node-7"));
}

#[test]
fn pods_of_another_subnet_are_seen_without_a_memory_too() {
    let node = Node { assigned: assigned("10.244.7.0/24"), pods: pods(&["10.244.9.0/24"]), ..Node::new() };
    let told = node.obstacle(&empty());
    assert!(told.contains("addresses in 10.244.9.0/24, outside of 10.244.7.0/24"), "{told}");
    let left = Node { left: pods(&["10.244.9.0/24"]), ..node };
    assert_eq!(left.claim(&empty()).key, key(SEVEN));
}

#[test]
fn machine_that_the_cluster_does_not_mean_by_this_nodes_name_waits() {
    let mut node = Node { assigned: assigned("10.244.7.0/24"), ..Node::new() };
    let says = |node: &mut Node, boot: &str| node.assigned.as_mut().expect("assigned").boot = Some(boot.into());
    says(&mut node, "another");
    let told = node.obstacle(&empty());
    assert!(told.contains("boot id another") && told.contains("this machine's boot id is boot"), "{told}");
    says(&mut node, "boot");
    assert_eq!(node.claim(&empty()).key, key(SEVEN));
    // One that has its lease doesn't lose it to whatever a second kubelet writes.
    let (mut held, leases) = holder();
    says(&mut held, "another");
    assert_eq!(held.step(&leases), Step::Keep);
}
