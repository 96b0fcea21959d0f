//! Every situation is put before the decision, and one step is expected.

mod assigned;
mod identity;

use std::net::IpAddr;
use std::time::Duration;

use super::*;
use crate::leases::{Entry, LeaseSet};
use crate::model::PerFamily;

struct Node {
    name: NodeName,
    instance: Instance,
    network: NetworkConfig,
    public_ips: PerFamily<IpAddr>,
    held: Option<Held>,
    previous: Option<Previous>,
    overruled: Option<Instance>,
    findings: Vec<Findings>,
    pods: Vec<Subnet>,
    leave: Option<LeaseKey>,
    left: Vec<Subnet>,
    settling: bool,
    expired: Vec<ExpiredLease>,
    assigned: Option<Assigned>,
}

impl Node {
    fn new() -> Self {
        Self {
            name: "node-1".parse().expect("valid"),
            instance: run("boot"),
            network: config("10.244.0.0/16"),
            public_ips: PerFamily { v4: Some("192.0.2.1".parse().expect("ip")), v6: None },
            held: None,
            previous: None,
            overruled: None,
            findings: vec![],
            pods: vec![],
            leave: None,
            left: vec![],
            settling: false,
            expired: vec![],
            assigned: None,
        }
    }

    /// One that held `10.244.9.0-24` by a write at revision 5, and lost it.
    fn that_had_a_lease() -> Self {
        let vtep_macs = PerFamily { v4: Some("c6:d2:32:6f:8f:44".parse().expect("a MAC")), v6: None };
        let previous =
            Previous { key: key(NINE), vtep_macs, epoch: 4, written: Some(5), formerly: None, this_boot: true };
        Self { previous: Some(previous), ..Self::new() }
    }

    /// One that holds it.
    fn with_a_lease() -> Self {
        let held = Held { key: key(NINE), mod_revision: 5, run_out: false };
        Self { held: Some(held), ..Self::that_had_a_lease() }
    }

    fn step(&self, leases: &LeaseSet) -> Step {
        next_step(&Situation {
            node: &self.name,
            instance: &self.instance,
            network: &self.network,
            leases,
            public_ips: &self.public_ips,
            held: self.held,
            previous: self.previous.as_ref(),
            since: 1_790_000_000,
            overruled: self.overruled.as_ref(),
            findings: &self.findings,
            pods: &self.pods,
            leave: self.leave,
            left: &self.left,
            settling: self.settling,
            expired: &self.expired,
            assigned: self.assigned.as_ref(),
        })
    }

    fn claim(&self, leases: &LeaseSet) -> ClaimRequest {
        match self.step(leases) {
            Step::Claim(claim) => claim,
            other => panic!("{other:?}"),
        }
    }

    fn obstacle(&self, leases: &LeaseSet) -> String {
        match self.step(leases) {
            Step::Wait(obstacle) | Step::Ask(_, obstacle) => obstacle.to_string(),
            other => panic!("{other:?}"),
        }
    }
}

/// A run of a node in one boot of its machine.
fn run(boot: &str) -> Instance {
    Instance { boot: boot.into(), netns: 7 }
}

/// What is known of a record at revision 5 whose writer has said nothing for so long.
fn silent_for(silent: Duration) -> Vec<Findings> {
    vec![Findings { revision: 5, silent, ..Findings::default() }]
}

/// Addresses of attached pods, or subnets of their bridges.
fn pods(all: &[&str]) -> Vec<Subnet> {
    let one = |text: &&str| text.parse().unwrap_or_else(|_| Subnet::host(text.parse().expect("an address")));
    all.iter().map(one).collect()
}

const NINE: &str = "10.244.9.0-24";

fn config(network: &str) -> NetworkConfig {
    let json = format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#);
    NetworkConfig::decode(json.as_bytes()).expect("valid")
}

fn empty() -> LeaseSet {
    set(&[], 6)
}

fn key(text: &str) -> LeaseKey {
    LeaseKey::decode(text).expect(text)
}

fn set(entries: &[(&str, Vec<u8>, i64)], revision: i64) -> LeaseSet {
    let entry = |(key, value, revision): &(&str, Vec<u8>, i64)| Entry {
        key: (*key).into(),
        value: value.clone(),
        create_revision: *revision,
        mod_revision: *revision,
    };
    LeaseSet::snapshot(&LeaseSet::default(), entries.iter().map(entry).collect(), revision)
}

fn flannel(ip: &str) -> Vec<u8> {
    format!(r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}}}"#)
        .into()
}

/// A record of this very run of the node.
fn fabric(node: &str, ip: &str) -> Vec<u8> {
    fabric_of("boot", node, ip)
}

fn fabric_of(boot: &str, node: &str, ip: &str) -> Vec<u8> {
    let owner = format!(r#","Fabric":{{"v":1,"node":"{node}","boot":"{boot}","netns":7,"epoch":4}}}}"#);
    let flannel = String::from_utf8(flannel(ip)).expect("text");
    (flannel[..flannel.len() - 1].to_owned() + &owner).into()
}

#[test]
fn first_claim_is_for_a_free_subnet_that_only_the_name_decides() {
    let node = Node::new();
    let claim = node.claim(&LeaseSet::default());
    assert_eq!(claim, node.claim(&LeaseSet::default()));
    assert_eq!(claim.expect, Expect::Absent);
    let owner = claim.record.owner.expect("named");
    assert_eq!((owner.epoch, owner.boot.as_str()), (1, "boot"));
}

#[test]
fn restarted_node_takes_its_own_record_over_and_keeps_subnet_and_mac() {
    let node = Node { findings: silent_for(QUICK), ..Node::new() };
    let claim = node.claim(&set(&[("10.244.9.0-24", fabric("node-1", "192.0.2.99"), 5)], 5));
    assert_eq!((claim.key, claim.expect), (key("10.244.9.0-24"), Expect::Revision(5)));
    let endpoint = claim.record.endpoints().v4.expect("IPv4");
    assert_eq!(endpoint.vtep_mac.to_string(), "c6:d2:32:6f:8f:44");
    assert_eq!(endpoint.public_ip.to_string(), "192.0.2.1", "the underlay address is today's");
    assert_eq!(claim.record.owner.expect("named").epoch, 5);
}

#[test]
fn flannels_record_of_this_address_is_taken_over() {
    let claim = Node::new().claim(&set(&[("10.244.9.0-24", flannel("192.0.2.1"), 5)], 5));
    assert_eq!((claim.key, claim.expect), (key("10.244.9.0-24"), Expect::Revision(5)));
    assert_eq!(claim.record.endpoints().v4.expect("IPv4").vtep_mac.to_string(), "c6:d2:32:6f:8f:44");
}

#[test]
fn two_nodes_with_one_address_are_both_named() {
    let step = Node::new().step(&set(&[("10.244.9.0-24", fabric_of("other", "node-2", "192.0.2.1"), 5)], 5));
    let Step::Wait(obstacle) = step else { panic!("{step:?}") };
    let text = obstacle.to_string();
    assert!(text.contains("192.0.2.1") && text.contains("node-1") && text.contains("node-2"), "{text}");
}

#[test]
fn record_that_no_longer_fits_the_config_is_withdrawn_first() {
    let step = Node::new().step(&set(&[("10.99.9.0-24", fabric("node-1", "192.0.2.1"), 5)], 5));
    let Step::Withdraw(claim) = step else { panic!("{step:?}") };
    assert_eq!((claim.key, claim.expect), (key("10.99.9.0-24"), Expect::Revision(5)));
}

#[test]
fn subnet_of_before_is_asked_for_again() {
    let node = Node::that_had_a_lease();
    let claim = node.claim(&empty());
    assert_eq!((claim.key, claim.expect), (key(NINE), Expect::Absent));
    assert_eq!(claim.record.endpoints().v4.expect("IPv4").vtep_mac.to_string(), "c6:d2:32:6f:8f:44", "the MAC too");
    assert_eq!(claim.record.owner.expect("named").epoch, 5, "the count goes on though the store forgot it");
}

#[test]
fn exhausted_address_space_is_a_clear_error() {
    let mut node = Node::new();
    node.network = NetworkConfig::decode(br#"{"Network":"192.0.2.0/24","SubnetLen":26,"Backend":{"Type":"vxlan"}}"#)
        .expect("valid");
    let full = [("192.0.2.64-26", "n2"), ("192.0.2.128-26", "n3"), ("192.0.2.192-26", "n4")];
    let full: Vec<_> = full.iter().map(|(key, name)| (*key, fabric(name, "198.51.100.1"), 3)).collect();
    let Step::Wait(obstacle) = node.step(&set(&full, 3)) else { panic!("expected to wait") };
    assert!(
        obstacle.to_string().starts_with("all 3 IPv4 subnets of 192.0.2.0/24 are leased or reserved"),
        "{obstacle}"
    );
}

#[test]
fn held_lease_is_kept_while_it_stands_and_rewritten_when_the_address_moves() {
    let mut node = Node::with_a_lease();
    let leases = set(&[(NINE, fabric("node-1", "192.0.2.1"), 5)], 6);
    assert_eq!(node.step(&leases), Step::Keep);
    node.public_ips.v4 = Some("192.0.2.100".parse().expect("ip"));
    let step = node.step(&leases);
    let Step::Rewrite(record) = step else { panic!("{step:?}") };
    assert_eq!(record.endpoints().v4.expect("IPv4").public_ip.to_string(), "192.0.2.100");
    assert_eq!(record.owner.expect("named").epoch, 4, "moving is no new claim");
}

#[test]
fn held_lease_that_is_gone_or_changed_by_another_or_run_out_is_lost() {
    let mut node = Node::with_a_lease();
    assert_eq!(node.step(&set(&[], 6)), Step::Lost(Loss::Gone(key(NINE))));
    let stolen = set(&[(NINE, flannel("192.0.2.1"), 6)], 6);
    assert!(matches!(node.step(&stolen), Step::Lost(Loss::Taken(..))));
    // A set from before our write proves nothing.
    assert_eq!(node.step(&set(&[], 4)), Step::Keep);
    node.held.as_mut().expect("held").run_out = true;
    let stands = set(&[(NINE, fabric("node-1", "192.0.2.1"), 5)], 6);
    assert_eq!(node.step(&stands), Step::Lost(Loss::RunOut(key(NINE))), "whatever the store says");
}

#[test]
fn restart_with_nothing_changed_adopts_the_record_as_it_is() {
    let node = Node::that_had_a_lease();
    let leases = set(&[(NINE, fabric("node-1", "192.0.2.1"), 5)], 9);
    assert!(matches!(node.step(&leases), Step::Adopt(held, _) if held.key == key(NINE) && held.mod_revision == 5));
    for changed in ["another address", "another write", "another boot"] {
        let mut node = Node { findings: silent_for(QUICK), ..Node::that_had_a_lease() };
        match changed {
            "another address" => node.public_ips.v4 = Some("192.0.2.100".parse().expect("ip")),
            "another write" => node.previous.as_mut().expect("had").written = Some(3),
            _ => node.instance.boot = "new".into(),
        }
        assert_eq!(node.claim(&leases).expect, Expect::Revision(5), "{changed}");
    }
}

#[test]
fn subnet_that_another_has_is_waited_for_while_pods_are_in_it() {
    let taken = set(&[(NINE, fabric("node-2", "192.0.2.2"), 6)], 6);
    let mut node = Node { pods: pods(&["10.244.9.2"]), ..Node::that_had_a_lease() };
    let told = node.obstacle(&taken);
    assert!(told.contains("node-2") && told.contains("fabricctl lease renumber --force"), "{told}");
    assert_eq!(node.claim(&empty()).key, key(NINE), "free again");
    // A person may insist; without pods nobody has to.
    node.leave = Some(key(NINE));
    assert_ne!(node.claim(&taken).key, key(NINE));
    node = Node { pods: vec![], leave: None, ..node };
    assert_ne!(node.claim(&taken).key, key(NINE));
}

#[test]
fn node_that_is_told_to_leave_its_subnet_gives_it_back_and_takes_another() {
    let mut node = Node { leave: Some(key(NINE)), pods: pods(&["10.244.9.2"]), ..Node::with_a_lease() };
    let leases = set(&[(NINE, fabric("node-1", "192.0.2.1"), 5)], 6);
    assert_eq!(node.step(&leases), Step::GiveBack);
    node.held = None;
    assert!(matches!(node.step(&leases), Step::Withdraw(_)), "its record is still there");
    assert_ne!(node.claim(&empty()).key, key(NINE));

    let json =
        br#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","SubnetMax":"10.244.9.0","Backend":{"Type":"vxlan"}}"#;
    node.network = NetworkConfig::decode(json).expect("valid");
    assert_eq!(node.claim(&empty()).key, key(NINE), "better than none");
}

#[test]
fn config_without_room_for_the_lease_ends_it_but_new_limits_do_not() {
    let mut node = Node::with_a_lease();
    let leases = set(&[(NINE, fabric("node-1", "192.0.2.1"), 5)], 6);
    let json = br#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.100.0","Backend":{"Type":"vxlan"}}"#;
    node.network = NetworkConfig::decode(json).expect("valid");
    assert_eq!(node.step(&leases), Step::Keep, "a node keeps what it has");
    node.network = config("10.99.0.0/16");
    assert_eq!(node.step(&leases), Step::GiveBack);
    // After a restart nobody has said that the pods may be cut off.
    node = Node { held: None, pods: pods(&["10.244.9.2"]), ..node };
    assert!(node.obstacle(&leases).contains("no subnet of the network config any more"));
    node.pods = vec![];
    assert!(matches!(node.step(&leases), Step::Withdraw(_)));
}

#[test]
fn after_a_wipe_those_that_had_a_subnet_come_first() {
    let new = Node { settling: true, ..Node::new() };
    assert!(new.obstacle(&empty()).contains("two minutes"));
    let held = Node { settling: true, ..Node::that_had_a_lease() };
    assert_eq!(held.claim(&empty()).key, key(NINE));
    // An old record of another node, which will go: no reason to move.
    let stale = set(&[(NINE, fabric("node-2", "192.0.2.2"), 6)], 6);
    assert!(held.obstacle(&stale).contains("two minutes"));
}

#[test]
fn record_from_before_a_rollback_is_withdrawn_and_the_present_subnet_kept() {
    let node = Node::that_had_a_lease();
    let older = set(&[("10.244.3.0-24", fabric("node-1", "192.0.2.1"), 2)], 3);
    let step = node.step(&older);
    let Step::Withdraw(claim) = step else { panic!("{step:?}") };
    assert_eq!(claim.key, key("10.244.3.0-24"));
    assert_eq!(node.claim(&empty()).key, key(NINE));
}

#[test]
fn resting_subnet_is_left_alone_unless_it_is_our_own_or_there_is_no_other() {
    let mut node = Node::new();
    let first = node.claim(&empty()).key;
    let rest = |key: LeaseKey, name: &str, mod_revision| ExpiredLease {
        subnet: key.subnets().v4.expect("IPv4"),
        node: name.parse().ok(),
        mod_revision,
    };
    node.expired = vec![rest(first, "node-2", 3)];
    let claim = node.claim(&empty());
    assert!(claim.key != first && claim.evict.is_empty());
    node.expired = vec![rest(first, "node-1", 3)];
    assert_eq!(node.claim(&empty()).key, first);

    let json = br#"{"Network":"192.0.2.0/24","SubnetLen":26,"Backend":{"Type":"vxlan"}}"#;
    node.network = NetworkConfig::decode(json).expect("valid");
    node.expired = vec![rest(key("192.0.2.64-26"), "n2", 8), rest(key("192.0.2.128-26"), "n3", 9)];
    assert_eq!(node.claim(&empty()).key, key("192.0.2.192-26"));
    let full = set(
        &[("192.0.2.64-26", fabric("n2", "198.51.100.1"), 3), ("192.0.2.192-26", fabric("n4", "198.51.100.1"), 3)],
        3,
    );
    let claim = node.claim(&full);
    assert_eq!((claim.key, claim.evict), (key("192.0.2.128-26"), vec![9]));
}

#[test]
fn reserved_subnet_is_for_its_node_alone() {
    let node = Node::new();
    let free = node.claim(&empty()).key;
    let mut leases = empty();
    leases.reserve(&free.encode(), Some(b"node-2"), 7);
    assert_ne!(node.claim(&leases).key, free);
    leases.reserve("10.244.77.0-24", Some(b"node-1"), 8);
    assert_eq!(node.claim(&leases).key, key("10.244.77.0-24"));

    let placeholder = Record::placeholder(&node.name, &key("10.244.77.0-24")).encode();
    let claim = node.claim(&set(&[("10.244.77.0-24", placeholder, 9)], 9));
    assert_eq!((claim.key, claim.expect), (key("10.244.77.0-24"), Expect::Revision(9)));
    assert!(!claim.record.is_placeholder());
}

#[test]
fn placeholder_of_a_node_that_went_away_is_put_back_by_a_few_of_the_others() {
    let mut leases = set(&[(NINE, fabric("node-1", "192.0.2.1"), 5)], 6);
    leases.reserve("10.244.77.0-24", Some(b"node-7"), 6);
    let step = Node::with_a_lease().step(&leases);
    assert!(
        matches!(&step, Step::HoldPlace(place, record) if *place == key("10.244.77.0-24")
        && record.is_placeholder() && record.node().is_some_and(|node| node.as_str() == "node-7")),
        "{step:?}"
    );

    let nodes: Vec<String> = (1..=20).map(|n| format!("node-{n}")).collect();
    let entries: Vec<(String, Vec<u8>, i64)> = (1..)
        .zip(&nodes)
        .map(|(n, node)| (format!("10.244.{n}.0-24"), fabric(node, &format!("192.0.2.{n}")), 5))
        .collect();
    let entries: Vec<(&str, Vec<u8>, i64)> = entries.iter().map(|(k, v, r)| (k.as_str(), v.clone(), *r)).collect();
    let mut all = set(&entries, 6);
    all.reserve("10.244.77.0-24", Some(b"node-77"), 6);
    let holds_the_place = |(n, name): &(i32, &String)| {
        let mut node = Node { name: name.parse().expect("valid"), ..Node::with_a_lease() };
        node.public_ips.v4 = format!("192.0.2.{n}").parse().ok();
        node.held.as_mut().expect("held").key = key(&format!("10.244.{n}.0-24"));
        matches!(node.step(&all), Step::HoldPlace(..))
    };
    assert_eq!((1..).zip(&nodes).filter(holds_the_place).count(), KEEPERS_OF_A_PLACE);
}

/// At a first start, with a memory, with a record, told by the attachments or by the bridge alone.
#[test]
fn node_takes_the_subnet_that_its_attached_pods_live_in_if_it_can_be_had() {
    let elsewhere = set(&[("10.244.3.0-24", fabric("node-1", "192.0.2.1"), 5)], 5);
    for living in
        [pods(&["10.244.9.2", "10.244.9.7"]), pods(&["10.244.9.0/24"]), pods(&["10.244.9.0/24", "10.244.9.2"])]
    {
        let mut node = Node { pods: living, ..Node::new() };
        assert_eq!(node.claim(&empty()).key, key(NINE), "nothing is known");
        assert!(matches!(node.step(&elsewhere), Step::Withdraw(claim) if claim.key == key("10.244.3.0-24")));
        node.previous = Node::that_had_a_lease().previous;
        assert_eq!(node.claim(&empty()).key, key(NINE));
        let other = Previous { key: key("10.244.3.0-24"), ..node.previous.clone().expect("had") };
        node.previous = Some(other);
        assert_eq!(node.claim(&empty()).key, key(NINE), "the disk remembers another");
        // Its guard rests for another name: as that of a node that was renamed and released.
        node.expired =
            vec![ExpiredLease { subnet: "10.244.9.0/24".parse().expect("valid"), node: None, mod_revision: 8 }];
        assert_eq!(node.claim(&empty()).evict, [8]);
    }
}

#[test]
fn node_is_never_ready_with_another_subnet_than_its_attached_pods_have() {
    let theirs = (NINE, fabric("node-2", "192.0.2.2"), 4);
    let ours = ("10.244.3.0-24", fabric("node-1", "192.0.2.1"), 5);
    let mut node = Node { pods: pods(&["10.244.9.2"]), ..Node::new() };
    let mut reserved = empty();
    reserved.reserve(NINE, Some(b"node-2"), 7);
    for leases in [set(std::slice::from_ref(&theirs), 5), reserved] {
        let told = node.obstacle(&leases);
        assert!(told.contains("10.244.9.0/24 is held by node-2") && told.contains("lease renumber --force"), "{told}");
    }
    // Nor does it keep another, though it had that before its start.
    node.previous = Node::that_had_a_lease().previous.map(|had| Previous { key: key("10.244.3.0-24"), ..had });
    let both = set(&[theirs, ours], 5);
    assert!(!matches!(node.step(&both), Step::Claim(_) | Step::Adopt(..)), "{:?}", node.step(&both));
    let only = set(&[("10.244.3.0-24", fabric("node-1", "192.0.2.1"), 5)], 5);
    node.pods = pods(&["10.244.9.2", "10.244.8.2"]);
    let told = node.obstacle(&only);
    assert!(told.contains("addresses in 10.244.8.2, 10.244.9.2, outside of 10.244.3.0/24"), "{told}");
    // A person has said that they may be cut off, now or before a restart; or they are of another network.
    for (leave, left, pods) in [
        (Some(key(NINE)), vec![], pods(&["10.244.9.2"])),
        (None, pods(&["10.244.9.0/24"]), pods(&["10.244.9.2"])),
        (None, vec![], pods(&["10.88.0.2", "10.244.3.7", "10.244.3.0/24"])),
    ] {
        let node = Node { leave, left, pods, ..Node { previous: node.previous.clone(), ..Node::new() } };
        assert!(matches!(node.step(&only), Step::Adopt(held, _) if held.key == key("10.244.3.0-24")));
    }
}

#[test]
fn family_without_pods_follows_the_one_that_has_some() {
    let json = br#"{"Network":"10.244.0.0/16","IPv6Network":"fd00::/48","EnableIPv6":true,"Backend":{"Type":"vxlan"}}"#;
    let mut node = Node { network: NetworkConfig::decode(json).expect("valid"), ..Node::new() };
    node.public_ips.v6 = "2001:db8::1".parse().ok();
    node.pods = pods(&["10.244.9.2"]);
    assert_eq!(node.claim(&empty()).key.subnets().v4, "10.244.9.0/24".parse().ok());
    let had = key("10.244.9.0-24&fd00:0:0:7::-64");
    node.previous = Node::that_had_a_lease().previous.map(|previous| Previous { key: had, ..previous });
    assert_eq!(node.claim(&empty()).key, had);
}
