//! Whether this node's kernel sends to the peer at all: what its routes and policy rules say, asked before anybody else is
//! accused. A route that a former overlay left behind (Calico's `blackhole 10.244.3.0/26 proto bird`) hides ours.

use fabric_core::model::{Family, Subnet};

use super::Target;
use crate::kernel::routing::fib::{Decision, Fib, Packet, Route};

/// A route or policy rule that leads packets elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// As `ip route` or `ip rule` prints it.
    pub line: String,
    /// The command that takes it away.
    pub remedy: String,
}

/// What leads packets for the peer's VTEP, its pods and its host elsewhere, the worst first; or why this node has no path
/// into the underlay.
#[must_use]
pub fn look(fib: &Fib, to: &Target) -> (Vec<Override>, Option<String>) {
    let mut found = vec![];
    let mut add = |decision: Option<Decision<'_>>| {
        let Some(decision) = decision else { return };
        let one = override_of(&decision);
        if !found.contains(&one) {
            found.push(one);
        }
    };
    let ours = &to.ours;
    let underlay = fib.decide(&Packet { from: ours.local, to: to.public_ip, iif: "lo" });
    // Any interface will do, but for the tunnel itself, and a route that refuses.
    let leads = |decision: &Decision<'_>| {
        decision.route.is_some_and(|r| r.kind == "unicast" && r.device.as_deref() != Some(ours.device.as_str()))
    };
    add(underlay.filter(|decision| !leads(decision)));
    // The VTEP first: it is what is probed. Then a pod's packet, which comes in by the bridge.
    if let Some(subnet) = to.lease.key.subnets().get(Family::of(to.overlay)).copied() {
        add(overriding(fib, &Packet { from: ours.overlay, to: to.overlay, iif: "lo" }, subnet));
        for bridge in &ours.pod_bridges {
            add(overriding(fib, &Packet { from: ours.overlay, to: subnet.gateway(), iif: bridge.as_str() }, subnet));
        }
    }
    let unrouted = underlay.is_none().then(|| format!("this node has no route to {}", to.public_ip));
    (found, unrouted)
}

/// What decides on a packet for the peer's subnet, unless it is ours. That ours is missing is the business of the reconcile
/// loop, which writes it: a wider route, which the packet meets then, is not to blame.
fn overriding<'a>(fib: &'a Fib, packet: &Packet<'_>, subnet: Subnet) -> Option<Decision<'a>> {
    let wider = |route: &Route| route.dst.prefix_len() < subnet.prefix_len();
    fib.decide(packet).filter(|decision| match decision.route {
        Some(route) if decision.rule.is_usual() => !route.ours && !wider(route),
        Some(route) => !route.ours,
        None => true,
    })
}

fn override_of(decision: &Decision<'_>) -> Override {
    match decision.route {
        Some(route) if decision.rule.is_usual() => Override { line: route.to_string(), remedy: route.delete() },
        Some(route) => {
            Override { line: format!("ip rule {}, and there {route}", decision.rule), remedy: decision.rule.delete() }
        }
        None => Override { line: format!("ip rule {}", decision.rule), remedy: decision.rule.delete() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::routing::fib::{Action, PolicyRule};
    use crate::mesh::tests::target;

    const MAIN: u32 = 254;

    fn route(dst: &str, kind: &str, table: u32, device: &str) -> Route {
        Route {
            dst: dst.parse().unwrap(),
            table,
            kind: kind.into(),
            metric: 0,
            device: Some(device.to_owned()).filter(|device| !device.is_empty()),
            gateway: None,
            protocol: "bird".into(),
            ours: device == "fabric.1",
        }
    }

    fn rule(priority: u32, to: Option<&str>, action: Action) -> PolicyRule {
        PolicyRule { to: to.map(|to| to.parse().unwrap()), ..PolicyRule::of_all(Family::V4, priority, action) }
    }

    #[test]
    fn what_overrides_the_route_to_a_peer_is_named_with_the_command_that_takes_it_away() {
        let usual = || vec![rule(0, None, Action::Table(255)), rule(32766, None, Action::Table(MAIN))];
        let ours =
            || vec![route("10.244.2.0/24", "unicast", MAIN, "fabric.1"), route("0.0.0.0/0", "unicast", MAIN, "eth0")];
        let with = |rules: Vec<PolicyRule>, routes: Vec<Route>| Fib {
            rules: [usual(), rules].concat(),
            routes: [ours(), routes].concat(),
        };
        let aside = rule(100, Some("10.244.0.0/16"), Action::Table(100));
        let refuse = rule(100, Some("10.244.0.0/16"), Action::Refuse("prohibit"));
        for (what, fib, want) in [
            ("nothing does", with(vec![], vec![]), &[][..]),
            (
                "Calico's blackhole",
                with(vec![], vec![route("10.244.2.0/26", "blackhole", MAIN, "")]),
                &["ip route del blackhole 10.244.2.0/26"],
            ),
            (
                "Calico's route to another node",
                with(vec![], vec![route("10.244.2.0/26", "unicast", MAIN, "eth0")]),
                &["ip route del 10.244.2.0/26 dev eth0"],
            ),
            ("one to other pods of it", with(vec![], vec![route("10.244.2.64/26", "blackhole", MAIN, "")]), &[]),
            (
                "a policy rule with a table",
                with(vec![aside], vec![route("0.0.0.0/0", "unicast", 100, "wg0")]),
                &["ip rule del priority 100 from all to 10.244.0.0/16 lookup 100"],
            ),
            (
                "a policy rule",
                with(vec![refuse], vec![]),
                &["ip rule del priority 100 from all to 10.244.0.0/16 prohibit"],
            ),
            (
                "a route to its host",
                with(vec![], vec![route("192.0.2.2/32", "unreachable", MAIN, "")]),
                &["ip route del unreachable 192.0.2.2/32"],
            ),
            (
                "its host inside of the tunnel",
                with(vec![], vec![route("192.0.2.0/24", "unicast", MAIN, "fabric.1")]),
                &["ip route del 192.0.2.0/24 dev fabric.1"],
            ),
        ] {
            let (found, unrouted) = look(&fib, &target());
            let remedies: Vec<&str> = found.iter().map(|found| found.remedy.as_str()).collect();
            assert_eq!((remedies.as_slice(), unrouted), (want, None), "{what}");
        }
    }

    #[test]
    fn route_of_ours_that_is_missing_is_nobodys_fault_and_no_route_at_all_is_this_nodes() {
        let rules = vec![rule(32766, None, Action::Table(MAIN))];
        let default = route("0.0.0.0/0", "unicast", MAIN, "eth0");
        assert_eq!(look(&Fib { rules: rules.clone(), routes: vec![default] }, &target()), (vec![], None));
        let (found, unrouted) = look(&Fib { rules, routes: vec![] }, &target());
        assert_eq!((found, unrouted.as_deref()), (vec![], Some("this node has no route to 192.0.2.2")));
    }
}
