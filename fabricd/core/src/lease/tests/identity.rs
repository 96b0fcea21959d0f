//! Which machine a lease is of: newcomers of a name, reinstalled and renamed machines, copied disks.

use super::*;
use crate::inquiry::Party;
use crate::model::MacAddr;

/// Every newcomer that finds a record of another run in its name, and for how long it has to hear nothing; `None` for
/// as long as that record's lease lasts.
fn newcomers() -> Vec<(&'static str, Node, &'static str, Option<Duration>)> {
    let remembers = |node: Node| Node { previous: Node::that_had_a_lease().previous, ..node };
    let rebooted = || Node { instance: run("reboot"), ..Node::new() };
    let moved = || Node { instance: Instance { netns: 8, ..run("boot") }, ..Node::new() };
    vec![
        ("another machine", rebooted(), "192.0.2.9", None),
        ("another namespace", moved(), "192.0.2.9", None),
        ("a reinstalled machine", rebooted(), "192.0.2.1", Some(QUICK)),
        ("a rebooted machine", remembers(rebooted()), "192.0.2.1", Some(QUICK)),
        ("a namespace made anew", remembers(moved()), "192.0.2.1", Some(QUICK)),
        ("another address after a reboot, or a copied disk", remembers(rebooted()), "192.0.2.9", Some(REMEMBERED)),
        ("another address without a reboot, or a copied memory", Node::new(), "192.0.2.9", Some(QUICK)),
    ]
}

#[test]
fn newcomer_never_takes_the_lease_of_a_node_that_lives() {
    for (who, mut node, ip, _) in newcomers() {
        let leases = set(&[(NINE, fabric("node-1", ip), 5)], 5);
        let asks = |node: &Node| matches!(node.step(&leases), Step::Ask(question, _) if question.revision == 5);
        assert!(asks(&node), "{who}");
        let told = node.obstacle(&leases);
        assert!(told.contains(ip) && told.contains("asking whether"), "{who}: {told}");
        let holder = Party { instance: run("boot"), addresses: vec![ip.parse().expect("ip")], since: 1_780_000_000 };
        let answered = Findings { revision: 5, answer: Some(holder), silent: REMEMBERED, ..Findings::default() };
        node.findings = vec![answered];
        assert!(asks(&node), "{who}");
        let told = node.obstacle(&leases);
        for word in [
            "another machine that lives is called node-1 too",
            &format!("10.244.9.0/24 at {ip} (boot id boot, fabricd started 2026-05-28 20:26 UTC)"),
            "this machine is at 192.0.2.1",
            "fabricd started 2026-09-21 14:13 UTC",
            "--node-name",
        ] {
            assert!(told.contains(word), "{who}: {word:?} is not in {told:?}");
        }
    }
}

#[test]
fn silence_gives_a_machine_its_subnet_back_where_nobody_else_can_have_it() {
    let just_before = |time: Duration| time.saturating_sub(Duration::from_millis(1));
    for (who, mut node, ip, patience) in newcomers() {
        let leases = set(&[(NINE, fabric("node-1", ip), 5)], 5);
        node.findings = silent_for(patience.map_or(Duration::from_secs(86_400), just_before));
        let told = node.obstacle(&leases);
        if let Some(patience) = patience {
            node.findings = silent_for(patience);
            assert_eq!(node.claim(&leases).key, key(NINE), "{who}");
            // Silence about another record says nothing about this one.
            node.findings[0].revision = 4;
            assert!(matches!(node.step(&leases), Step::Ask(..)), "{who}");
        } else {
            assert!(
                told.contains("doesn't answer") && told.contains("fabricctl lease release node-1"),
                "{who}: {told}"
            );
            node.findings[0].ends = Some(1_790_003_600);
            let told = node.obstacle(&leases);
            assert!(told.ends_with("is taken when that lease ends, 2026-09-21 15:13 UTC"), "{who}: {told}");
        }
    }
}

#[test]
fn machine_that_answers_at_the_address_of_before_is_waited_for_unless_it_is_another_node() {
    let previous = Node::that_had_a_lease().previous;
    let answers = Findings { revision: 5, silent: REMEMBERED, host_answers: true, ..Findings::default() };
    let mut node = Node { instance: run("reboot"), previous, findings: vec![answers], ..Node::new() };
    let mut leases = vec![(NINE, fabric("node-1", "192.0.2.9"), 5)];
    let Step::Ask(question, obstacle) = node.step(&set(&leases, 5)) else { panic!("it may be a living machine's") };
    assert_eq!(question.probe, ["192.0.2.9".parse::<IpAddr>().expect("ip")]);
    assert!(obstacle.to_string().contains("where a machine answers though its fabricd doesn't"), "{obstacle}");
    leases.push(("10.244.3.0-24", fabric("node-2", "192.0.2.9"), 4));
    assert_eq!(node.claim(&set(&leases, 5)).key, key(NINE), "the address is node-2's by now");
    node.findings = vec![];
    let Step::Ask(question, _) = node.step(&set(&leases, 5)) else { panic!("nobody was asked") };
    assert_eq!(question.probe, [] as [IpAddr; 0], "node-2 would answer");
}

#[test]
fn node_whose_lease_was_taken_takes_it_back_and_says_whom_it_took_one_from() {
    let node = Node::with_a_lease();
    let usurped = set(&[(NINE, fabric_of("thief", "node-1", "192.0.2.9"), 6)], 6);
    let Step::Lost(Loss::Twin { by, there, .. }) = node.step(&usurped) else { panic!("{:?}", node.step(&usurped)) };
    assert_eq!((by, there.as_str()), (run("thief"), "192.0.2.9"));
    let node = Node { held: None, overruled: Some(run("thief")), ..node };
    let claim = node.claim(&usurped);
    let owner = claim.record.owner.clone().expect("named");
    assert_eq!((claim.expect, owner.taken_from, owner.taken_back), (Expect::Revision(6), None, true));
    // So the thief, which may have found the key absent, knows that it must not take it back in turn.
    let thief = Node { instance: run("thief"), ..Node::with_a_lease() };
    let told = set(&[(NINE, claim.record.encode(), 7)], 7);
    assert!(matches!(thief.step(&told), Step::Lost(Loss::Twin { back: true, .. })), "{:?}", thief.step(&told));
    // The other one, in its turn, would have said whom it took it from.
    let thief = Node { instance: run("thief"), findings: silent_for(QUICK), ..Node::new() };
    let claim = thief.claim(&set(&[(NINE, fabric("node-1", "192.0.2.1"), 5)], 5));
    assert_eq!(claim.record.owner.expect("named").taken_from, Some(run("boot")));
}

#[test]
fn renamed_machine_keeps_its_subnet() {
    let ours = set(&[(NINE, fabric("other-name", "192.0.2.1"), 5)], 5);
    let claim = Node::new().claim(&ours);
    assert_eq!((claim.key, claim.expect), (key(NINE), Expect::Revision(5)), "the same boot wrote it");
    assert_eq!(claim.formerly.expect("guards have that name").as_str(), "other-name");
    assert_eq!(claim.record.node().expect("named").as_str(), "node-1");

    // Renamed at a reboot: the disk remembers, and nobody of the former name answers.
    let formerly = "other-name".parse().ok();
    let remembered = Previous { formerly, this_boot: false, ..Node::that_had_a_lease().previous.expect("had") };
    let mut node = Node { instance: run("reboot"), previous: Some(remembered), ..Node::new() };
    assert!(matches!(node.step(&ours), Step::Ask(question, _) if question.node.as_str() == "other-name"));
    node.findings = silent_for(QUICK);
    assert_eq!(node.claim(&ours).key, key(NINE));
}

#[test]
fn copied_disk_of_a_node_with_another_name_is_no_claim_to_its_subnet() {
    let formerly = "other-name".parse().ok();
    let remembered = Previous { formerly, this_boot: false, ..Node::that_had_a_lease().previous.expect("had") };
    let node =
        Node { instance: run("clone"), previous: Some(remembered), findings: silent_for(REMEMBERED), ..Node::new() };
    for leases in [set(&[(NINE, fabric("other-name", "192.0.2.9"), 5)], 5), empty()] {
        let claim = node.claim(&leases);
        assert_ne!(claim.key, key(NINE));
        assert_eq!(claim.formerly, None);
        let mac = claim.record.endpoints().v4.expect("IPv4").vtep_mac;
        assert_eq!(mac, MacAddr::derived(&node.name, node.network.vxlan.vni, Family::V4), "nor to its VTEP's address");
    }
    // This very boot held it under that name, and it is free.
    let mut renamed = node;
    renamed.previous.as_mut().expect("had").this_boot = true;
    let claim = renamed.claim(&empty());
    assert_eq!((claim.key, claim.formerly.expect("its guards").as_str()), (key(NINE), "other-name"));
}
