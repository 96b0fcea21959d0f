use super::*;
use crate::diff::{Gate, Plan, diff as plan};
use crate::model::PerFamily;
use crate::state::fast_path::{Hook, Role};

fn v<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} in a test is wrong"))
}

fn peer(n: u8) -> Peer {
    Peer {
        underlay: v(&format!("192.0.2.{n}")),
        vtep_mac: v(&format!("02:42:c0:00:02:{n:02x}")),
        path: UnderlayPath { ifindex: 2, gateway: v(&format!("192.0.2.{n}")) },
        direct: false,
        mtu: 1450,
    }
}

fn program(role: Role) -> Program {
    Program { role, fingerprint: 0xfab }
}

/// A node with one peer and one pod.
fn whole() -> FastPath {
    let end = |network, subnet, local| End {
        vtep_mac: v("02:42:c0:00:02:01"),
        local: v(local),
        network: v(network),
        subnet: v(subnet),
    };
    let ends = PerFamily {
        v4: Some(end("10.64.0.0/12", "10.64.1.0/24", "192.0.2.1")),
        v6: Some(end("2001:db8::/48", "2001:db8:0:1::/64", "2001:db8:ff::1")),
    };
    let own = LocalVtep { vni: 1_u32.try_into().expect("a VNI"), port: 8472, guard: true, ends };
    let pod =
        Pod { ifindex: 7, mac: v("02:42:0a:40:01:05"), gateway_mac: v("02:42:0a:40:01:01"), mtu: 1450, fast: true };
    FastPath {
        maps: Some(MapSizes { subnets4: 4096, subnets6: 65_536, peers: 1024, addresses4: 256, pods: 128 }),
        node: Some(own),
        peers: [(PeerSlot(1), peer(2))].into(),
        index: [(v("10.64.2.0/24"), PeerSlot(1))].into(),
        pods: [(PodSlot(1), pod)].into(),
        addresses: [(v("10.64.1.5"), PodSlot(1))].into(),
        programs: [program(Role::PodOut), program(Role::WireIn)].into(),
        links: [
            (Place { ifindex: 7, hook: Hook::Ingress }, program(Role::PodOut)),
            (Place { ifindex: 2, hook: Hook::Ingress }, program(Role::WireIn)),
        ]
        .into(),
        former: false,
    }
}

/// Takes all steps, and gives what is there then.
fn taken(plan: &Plan, have: &FastPath) -> FastPath {
    let mut there = have.clone();
    for op in plan.ops() {
        let super::super::Op::FastPath(op) = op else { panic!("{op}") };
        op.apply_to(&mut there);
    }
    there
}

#[test]
fn a_fast_path_is_made_from_the_data_up_and_a_pod_is_taken_last() {
    let (want, nothing) = (whole(), FastPath::new());
    let made = plan(&want, &nothing);
    assert_eq!(
        made.to_string(),
        "+ fast path: maps for 4096 subnets of IPv4 and 65536 of IPv6, 1024 peers, 256 addresses of IPv4, 128 pods\n\
         + fast path: own subnet 10.64.1.0/24 of 10.64.0.0/12 local 192.0.2.1 lladdr 02:42:c0:00:02:01, \
         own subnet 2001:db8:0:1::/64 of 2001:db8::/48 local 2001:db8:ff::1 lladdr 02:42:c0:00:02:01, \
         vni 1 port 8472 nat guard\n\
         + fast path: peer 1, 192.0.2.2 lladdr 02:42:c0:00:02:02 vxlan via 192.0.2.2 interface 2 mtu 1450\n\
         + fast path: 10.64.2.0/24 is of peer 1\n\
         + fast path: program pod_out_0000000000000fab\n\
         + fast path: program wire_in_0000000000000fab\n\
         + fast path: link at ingress of interface 2 to wire_in_0000000000000fab\n\
         + fast path: link at ingress of interface 7 to pod_out_0000000000000fab\n\
         + fast path: pod 1, interface 7 lladdr 02:42:0a:40:01:05 mtu 1450 gateway 02:42:0a:40:01:01, marked only\n\
         + fast path: 10.64.1.5 is of pod 1\n\
         ~ fast path: translated connections of 1 addresses are marked\n\
         ~ fast path: pod 1, interface 7 lladdr 02:42:0a:40:01:05 mtu 1450 gateway 02:42:0a:40:01:01, taken\n"
    );
    assert_eq!(taken(&made, &nothing), want);
    assert!(plan(&want, &want).is_empty());
}

#[test]
fn it_goes_from_the_other_end_with_the_links_first() {
    let (nothing, have) = (FastPath::new(), whole());
    let gone = plan(&nothing, &have);
    assert_eq!(
        gone.to_string(),
        "- fast path: link at ingress of interface 2\n\
         - fast path: link at ingress of interface 7\n\
         - fast path: 10.64.1.5\n\
         - fast path: pod 1, interface 7\n\
         - fast path: 10.64.2.0/24\n\
         - fast path: peer 1, 192.0.2.2\n\
         - fast path: this node's own end\n\
         - fast path: program pod_out_0000000000000fab\n\
         - fast path: program wire_in_0000000000000fab\n\
         - fast path: maps\n"
    );
    assert_eq!(taken(&gone, &have), nothing);
}

#[test]
fn another_own_end_or_other_maps_take_everything_away_first() {
    let have = whole();
    let mut moved = whole();
    moved.node.as_mut().expect("there").ends.v4.as_mut().expect("IPv4").local = v("192.0.2.9");
    let first = plan(&moved, &have);
    assert!(first.ops().iter().all(super::super::Op::is_delete), "{first}");
    let there = taken(&first, &have);
    assert_eq!((there.programs.len(), there.maps, there.node), (2, have.maps, None), "programs and maps stay");
    assert_eq!(taken(&plan(&moved, &there), &there), moved);

    let mut larger = whole();
    larger.maps.as_mut().expect("there").subnets4 = 65_536;
    let there = taken(&plan(&larger, &have), &have);
    assert_eq!(there, FastPath::new());
    assert_eq!(taken(&plan(&larger, &there), &there), larger);
}

#[test]
fn another_layout_gives_way_when_all_is_there_beside_it() {
    let unknown = |(place, program): (&Place, &Program)| (*place, Program { fingerprint: 0, ..*program });
    let links = whole().links.iter().map(unknown).collect();
    let have = FastPath { links, former: true, ..FastPath::new() };
    let steps = plan(&whole(), &have);
    let text = steps.to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.last(), Some(&"- fast path: maps and programs of another layout"), "{text}");
    let at = |words: &str| lines.iter().position(|line| line.contains(words)).expect(words);
    assert!(at("+ fast path: 10.64.2.0/24") < at("~ fast path: link at ingress of interface 7"), "{text}");
    assert_eq!(lines.iter().filter(|line| line.starts_with('-')).count(), 1, "{text}");
    assert_eq!(taken(&steps, &have), whole());
    // One that could not be replaced still has its maps.
    let mut gate = Gate::default();
    let stays = |op: &super::super::Op| match gate.admits(op) {
        Ok(()) if op.to_string().contains("interface 7 to") => {
            gate.failed(op);
            false
        }
        admitted => admitted.is_err() && op.is_delete(),
    };
    assert_eq!(steps.ops().iter().filter(|op| Some(*op) == steps.ops().last()).count(), 1);
    assert!(steps.ops().iter().map(stays).last().expect("a step"), "{text}");
}

#[test]
fn a_pod_of_another_port_is_marked_only_before_it_is_taken_again() {
    let have = whole();
    let mut want = whole();
    want.pods.get_mut(&PodSlot(1)).expect("there").ifindex = 8;
    let steps = plan(&want, &have).to_string();
    let pods: Vec<&str> = steps.lines().filter(|line| line.contains("pod 1,") || line.contains("translated")).collect();
    assert_eq!(pods.len(), 3, "{steps}");
    assert!(pods[0].contains("interface 8") && pods[0].ends_with("marked only"), "{steps}");
    assert!(pods[1].contains("are marked") && pods[2].ends_with("taken"), "{steps}");

    let mut half = whole();
    half.pods.get_mut(&PodSlot(1)).expect("there").fast = false;
    assert_eq!(plan(&whole(), &half).ops().len(), 2, "what was cut off goes on where it was");
}

#[test]
fn link_that_comes_back_has_what_was_not_marked_meanwhile_marked() {
    let mut have = whole();
    have.links.remove(&Place { ifindex: 7, hook: Hook::Ingress });
    let steps = plan(&whole(), &have).to_string();
    assert_eq!(
        steps,
        "+ fast path: link at ingress of interface 7 to pod_out_0000000000000fab\n\
         ~ fast path: translated connections of 1 addresses are marked\n"
    );
}

#[test]
fn nothing_is_taken_while_what_it_leads_to_has_failed() {
    let made = plan(&whole(), &FastPath::new());
    let turned_away = |fails: &str| {
        let mut gate = Gate::default();
        let mut away = vec![];
        for op in made.ops() {
            match gate.admits(op) {
                Ok(()) if op.to_string().contains(fails) => gate.failed(op),
                Ok(()) => {}
                Err(_) => away.push(op.to_string()),
            }
        }
        away
    };
    assert_eq!(turned_away("maps for").len(), made.ops().len() - 1);
    assert_eq!(turned_away("peer 1, "), ["+ fast path: 10.64.2.0/24 is of peer 1"]);
    let away = turned_away("translated");
    assert!(away.len() == 1 && away[0].ends_with("taken"), "{away:?}");
    let away = turned_away("program pod_out");
    assert_eq!(away.len(), 2, "{away:?}");
    assert_eq!(away[0], "+ fast path: link at ingress of interface 7 to pod_out_0000000000000fab");
    assert!(away[1].ends_with("taken"), "what nothing marks is not taken: {away:?}");
    let away = turned_away("link at ingress of interface 7");
    assert!(away.len() == 1 && away[0].ends_with("taken"), "{away:?}");

    let gone = plan(&FastPath::new(), &whole());
    let mut gate = Gate::default();
    let kept: Vec<String> = (gone.ops().iter())
        .filter(|op| match gate.admits(op) {
            Ok(()) if op.to_string().contains("ingress of interface 7") => {
                gate.failed(op);
                true
            }
            admitted => admitted.is_err(),
        })
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        kept,
        [
            "- fast path: link at ingress of interface 7",
            "- fast path: this node's own end",
            "- fast path: program pod_out_0000000000000fab",
            "- fast path: maps"
        ],
        "what a link still uses stays"
    );
}

#[test]
fn remembered_leases_take_no_peer_away_but_a_pod_that_went_goes() {
    let kept = plan(&FastPath::new(), &whole()).without_deletes().to_string();
    let lines: Vec<&str> = kept.lines().collect();
    assert_eq!(
        lines,
        [
            "- fast path: link at ingress of interface 2",
            "- fast path: link at ingress of interface 7",
            "- fast path: 10.64.1.5",
            "- fast path: pod 1, interface 7",
        ]
    );
}
