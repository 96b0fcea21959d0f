//! Which route a pod's packet takes: the kernel's answer, and the route or policy rule that is behind it.

use std::net::IpAddr;

use fabric_core::model::IfName;

use super::Hop;
use crate::diagnosis::Inspection;
use crate::kernel::routing::fib::{Decision, Packet};
use crate::kernel::{self, RouteLookup};

/// A packet of a pod of this node, as the kernel gets it.
#[derive(Clone, Copy, Debug)]
pub(super) struct FromPod {
    /// The pod's address.
    pub ip: IpAddr,
    /// The bridge that it comes in by.
    pub bridge: IfName,
}

/// The hop, and the device and router that the packet leaves by. It should be `expected`, if that is given.
pub(super) fn hop(
    inspection: &Inspection,
    pod: FromPod,
    to: IpAddr,
    expected: Option<IfName>,
) -> (Hop, Option<RouteLookup>) {
    let asked = format!("ip route get {to} from {} iif {}", pod.ip, pod.bridge);
    let taken = match kernel::route_of_packet(pod.ip, to, pod.bridge) {
        Ok(taken) => taken,
        Err(error) => return (Hop::unknown("route", format!("{asked}: {error}")), None),
    };
    let right = match (&taken, expected) {
        (RouteLookup::Out { device, .. }, Some(expected)) => *device == expected,
        (RouteLookup::Out { .. } | RouteLookup::Local, None) => true,
        _ => false,
    };
    if right {
        return (Hop::fine("route", format!("{asked}: {taken}")), Some(taken));
    }
    let iif = pod.bridge.to_string();
    let decision = inspection.fib.decide(&Packet { from: pod.ip, to, iif: &iif });
    let should = expected.map_or("a route".to_owned(), |device| format!("dev {device}"));
    (judge(&asked, &taken, decision.filter(|decision| explains(decision, &taken)), &should, &iif), Some(taken))
}

/// Whether what was read leads where the kernel goes.
fn explains(decision: &Decision<'_>, taken: &RouteLookup) -> bool {
    match (decision.route, taken) {
        (Some(route), RouteLookup::Out { device, .. }) => route.device.as_deref() == Some(device.as_str()),
        (Some(route), RouteLookup::Refused(_)) => route.kind != "unicast" && route.kind != "local",
        (Some(route), RouteLookup::Local) => route.kind == "local",
        (None, taken) => matches!(taken, RouteLookup::Refused(_)),
    }
}

fn judge(asked: &str, taken: &RouteLookup, decision: Option<Decision<'_>>, should: &str, iif: &str) -> Hop {
    let found = format!("{asked}: {taken}");
    let Some(Decision { rule, route }) = decision else {
        let fix = match taken {
            RouteLookup::Refused(why) if why.contains("reverse path") => {
                format!("sysctl -w net/ipv4/conf/{iif}/rp_filter=2")
            }
            _ => "ip rule show; ip route show table all".to_owned(),
        };
        return Hop::failed("route", found, format!("{should}\n{fix}"));
    };
    let by_route = route.map_or(String::new(), |route| format!(", by the route {route}"));
    if rule.is_usual() {
        let fix = route.map_or_else(|| rule.delete(), |route| route.delete());
        return Hop::failed(
            "route",
            format!("{found}{by_route}"),
            format!("{should}; this route overrides it:\n{fix}"),
        );
    }
    Hop::failed(
        "route",
        format!("{found}{by_route}, by the policy rule {rule}"),
        format!("{should}; this policy rule overrides it:\n{}", rule.delete()),
    )
}

#[cfg(test)]
mod tests {
    use fabric_core::model::Family;

    use super::*;
    use crate::diagnosis::Outcome;
    use crate::kernel::routing::fib::{Action, PolicyRule, Route};

    #[test]
    fn overriding_route_or_rule_is_named_with_the_command_that_takes_it_away() {
        let usual = PolicyRule::of_all(Family::V4, 32766, Action::Table(254));
        let vpn = PolicyRule { priority: 100, action: Action::Table(100), ..usual.clone() };
        let refusing = PolicyRule { priority: 7, action: Action::Refuse("prohibit"), ..usual.clone() };
        let lost = Route {
            dst: "10.244.2.2/32".parse().expect("valid"),
            table: 254,
            kind: "unreachable".into(),
            metric: 0,
            device: None,
            gateway: None,
            protocol: "bird".into(),
            ours: false,
        };
        let refused = RouteLookup::Refused("unreachable");
        for (decision, found, fix) in [
            (
                Some(Decision { rule: &usual, route: Some(&lost) }),
                "by the route unreachable 10.244.2.2/32 proto bird",
                "ip route del unreachable 10.244.2.2/32",
            ),
            (
                Some(Decision { rule: &vpn, route: Some(&lost) }),
                "by the policy rule 100: from all lookup 100",
                "ip rule del priority 100 from all lookup 100",
            ),
            (
                Some(Decision { rule: &refusing, route: None }),
                "by the policy rule 7: from all prohibit",
                "ip rule del priority 7 from all prohibit",
            ),
            (None, "unreachable", "ip rule show; ip route show table all"),
        ] {
            let hop = judge("ip route get 10.244.2.2", &refused, decision, "dev fabric.1", "cni0");
            assert_eq!((hop.outcome, hop.expected.lines().last()), (Outcome::Failed, Some(fix)));
            assert!(hop.found.ends_with(found), "{hop:?}");
        }
        let strict = judge("", &RouteLookup::Refused("the reverse path filter"), None, "dev fabric.1", "cni0");
        assert_eq!(strict.expected, "dev fabric.1\nsysctl -w net/ipv4/conf/cni0/rp_filter=2");
    }
}
