//! [`bypass`]: what of others the fast path would pass by, for which `--fast-path=auto` leaves it off.
//!
//! On the kernel's path the packets between pods meet chains of the packet filter, queueing disciplines and IPsec policies,
//! ours and everybody's. The programs do what ours do. So the fast path changes nothing for as long as nobody else has
//! anything there that filters, changes, delays or encrypts these packets. What is shaped at a single pod's port concerns that
//! pod alone, and keeps it alone from the fast path: see [`shaped`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::fast_path::Port;
use crate::firewall::Evaluation;
use crate::firewall::bypass::Bypassed;
use crate::model::IfName;

/// What others have beside the packet filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shaping {
    /// Queueing disciplines, without those that every interface begins with and that only pass packets on.
    pub qdiscs: BTreeSet<Qdisc>,
    /// How many IPsec policies are installed, in any direction.
    pub ipsec_policies: u32,
    /// Why chains, queueing disciplines or policies can't be read: then nobody knows.
    pub unread: Option<String>,
}

/// A queueing discipline (`tc qdisc show`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Qdisc {
    /// At which interface.
    pub dev: IfName,
    /// Which side of it: filters and policers have a place on receiving too.
    pub side: Side,
    /// Its kind, as in `tbf`.
    pub kind: String,
}

/// A side of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// What it receives; `clsact` is here, though it has filters on both sides.
    Ingress,
    /// What it sends.
    Egress,
}

/// Something of others that packets of pods would pass by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bypass {
    /// Nobody knows.
    Unread(String),
    /// A chain of bridges or devices, which is not evaluated.
    Chain(String),
    /// A rule or a policy of the packet filter, and how many more.
    Rule(Bypassed, usize),
    /// IPsec.
    Ipsec(u32),
    /// A queueing discipline.
    Qdisc(Qdisc),
}

impl fmt::Display for Bypass {
    /// What, and how to look at it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unread(why) => write!(f, "it is not known what else filters packets between pods: {why}"),
            Self::Chain(chain) => {
                write!(f, "the chain {chain} may drop or change packets between pods (nft list chain {chain})")
            }
            Self::Rule(bypassed, 0) => bypassed.fmt(f),
            Self::Rule(bypassed, more) => write!(f, "{bypassed}, and so do {more} more rules"),
            Self::Ipsec(1) => f.write_str("an IPsec policy is installed (ip xfrm policy)"),
            Self::Ipsec(count) => write!(f, "{count} IPsec policies are installed (ip xfrm policy)"),
            Self::Qdisc(Qdisc { dev, kind, side }) => {
                let side = if *side == Side::Ingress { "ingress" } else { "root" };
                write!(f, "{dev} has the {side} queueing discipline {kind} (tc qdisc show dev {dev})")
            }
        }
    }
}

/// The first that would be passed by. `through` are the bridges and VXLAN devices that packets are led past, in both
/// directions; an uplink's own queue is not passed by, only what it has on receiving.
#[must_use]
pub fn bypass(
    evaluation: &Evaluation,
    shaping: &Shaping,
    through: &BTreeSet<IfName>,
    uplinks: &BTreeSet<IfName>,
) -> Option<Bypass> {
    let Shaping { qdiscs, ipsec_policies, unread } = shaping;
    let on_the_way =
        |qdisc: &&Qdisc| through.contains(&qdisc.dev) || qdisc.side == Side::Ingress && uplinks.contains(&qdisc.dev);
    let unread = unread.clone().map(Bypass::Unread);
    let rule = || Some(Bypass::Rule(evaluation.bypassed.first()?.clone(), evaluation.bypassed.len() - 1));
    let chain = || evaluation.unread.first().cloned().map(Bypass::Chain);
    let ipsec = || (*ipsec_policies > 0).then_some(Bypass::Ipsec(*ipsec_policies));
    let qdisc = || qdiscs.iter().find(on_the_way).cloned().map(Bypass::Qdisc);
    unread.or_else(rule).or_else(chain).or_else(ipsec).or_else(qdisc)
}

/// The ports of pods whose traffic is shaped, as the CNI plugin `bandwidth` does it.
#[must_use]
pub fn shaped(shaping: &Shaping, ports: &BTreeMap<IfName, Port>) -> BTreeSet<u32> {
    shaping.qdiscs.iter().filter_map(|qdisc| ports.get(&qdisc.dev)).map(|port| port.ifindex).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::bypass::Does;
    use crate::firewall::{Blocked, Hook, TableKind};

    fn v<T: std::str::FromStr>(text: &str) -> T {
        text.parse().unwrap_or_else(|_| panic!("{text} in a test is wrong"))
    }

    fn said(evaluation: &Evaluation, shaping: &Shaping) -> String {
        let names = |names: &[&str]| names.iter().map(|name| v(name)).collect();
        let found = bypass(evaluation, shaping, &names(&["cni0", "fabric.1"]), &names(&["eth0"]));
        found.map(|found| found.to_string()).unwrap_or_default()
    }

    fn qdisc(dev: &str, side: Side, kind: &str) -> Shaping {
        Shaping { qdiscs: [Qdisc { dev: v(dev), side, kind: kind.to_owned() }].into(), ..Shaping::default() }
    }

    #[test]
    fn all_that_packets_are_led_past_is_told_and_nothing_else() {
        use Side::{Egress, Ingress};
        let nothing = Evaluation::default();
        for (shaping, want) in [
            (Shaping::default(), ""),
            (qdisc("eth0", Egress, "fq"), ""),
            (qdisc("eth1", Ingress, "clsact"), ""),
            (qdisc("veth1", Egress, "tbf"), ""),
            (
                qdisc("eth0", Ingress, "clsact"),
                "eth0 has the ingress queueing discipline clsact (tc qdisc show dev eth0)",
            ),
            (
                qdisc("fabric.1", Egress, "tbf"),
                "fabric.1 has the root queueing discipline tbf (tc qdisc show dev fabric.1)",
            ),
            (Shaping { ipsec_policies: 3, ..Shaping::default() }, "3 IPsec policies are installed (ip xfrm policy)"),
            (
                Shaping { unread: Some("no".to_owned()), ipsec_policies: 3, ..Shaping::default() },
                "it is not known what else filters packets between pods: no",
            ),
        ] {
            assert_eq!(said(&nothing, &shaping), want);
        }
        let bridge = Evaluation { unread: vec!["bridge filter forward".to_owned()], ..Evaluation::default() };
        let want = "the chain bridge filter forward may drop or change packets between pods (nft list chain bridge filter forward)";
        assert_eq!(said(&bridge, &Shaping::default()), want);
        let by = Blocked {
            kind: TableKind::Ip,
            table: "filter".to_owned(),
            base: "FORWARD".to_owned(),
            hook: Hook::Forward,
            chain: "FORWARD".to_owned(),
            rule: None,
        };
        let bypassed = vec![Bypassed { by, does: Does::Drops }; 2];
        let want = "ip filter FORWARD policy drop may drop packets between pods, and so do 1 more rules";
        assert_eq!(said(&Evaluation { bypassed, ..Evaluation::default() }, &Shaping::default()), want);
    }

    #[test]
    fn shaped_ports_are_those_of_pods() {
        let port = |ifindex| Port { ifindex, mtu: 1450, bridge_mac: v("02:42:0a:f4:00:01") };
        let ports = [(v("veth1"), port(11)), (v("veth2"), port(12))].into();
        assert_eq!(shaped(&qdisc("veth2", Side::Egress, "tbf"), &ports), [12].into());
        assert_eq!(shaped(&qdisc("eth0", Side::Egress, "fq"), &ports), BTreeSet::new());
    }
}
