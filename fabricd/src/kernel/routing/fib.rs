//! All routes and policy rules of this network namespace, and which of them a packet meets.
//!
//! The kernel answers where a packet goes (`ip route get`), not why, and of one that it refuses it names no route. So a
//! diagnosis reads `ip rule show` and `ip route show table all`, and looks the packet up as the kernel does: rules by
//! priority, in each table the longest prefix, of equal ones the smallest metric.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fabric_core::model::{Family, Subnet};
use fabric_core::state::ROUTE_PROTOCOL;
use fabric_netlink::{Frame, Request, RequestSocket};
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::route_message;
use super::routes::{device, ip, metric};
use super::tables::{self, Links, reading};
use crate::kernel::KernelError;

/// Tables that every host has.
const DEFAULT: u32 = 253;
const MAIN: u32 = 254;
const LOCAL: u32 = 255;

/// Routes and policy rules, as one look found them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fib {
    /// Policy rules.
    pub rules: Vec<PolicyRule>,
    /// Routes of all tables.
    pub routes: Vec<Route>,
}

/// A policy rule (`ip rule`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyRule {
    /// Address family.
    pub family: Family,
    /// Its priority: the smallest is asked first.
    pub priority: u32,
    /// Only packets from these addresses.
    pub from: Option<Subnet>,
    /// Only packets to these addresses.
    pub to: Option<Subnet>,
    /// Only packets that came in by this interface.
    pub iif: Option<String>,
    /// Only packets with this mark, under this mask.
    pub mark: Option<(u32, u32)>,
    /// It has a condition that a pod's packet doesn't meet: a user, ports, a tunnel.
    pub other: bool,
    /// It counts where its conditions don't hold.
    pub invert: bool,
    /// What it does.
    pub action: Action,
    /// Routes with a prefix no longer than this don't count.
    pub suppress: Option<u32>,
}

/// What a policy rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It looks into a table.
    Table(u32),
    /// It refuses: `blackhole`, `unreachable` or `prohibit`.
    Refuse(&'static str),
    /// It goes on at another rule.
    Goto(u32),
    /// Nothing.
    Nop,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it leads to.
    pub dst: Subnet,
    /// Its table.
    pub table: u32,
    /// `unicast`, `local`, `blackhole`, `unreachable`, `prohibit`, `throw` …
    pub kind: String,
    /// Its metric: of routes to one destination the smallest counts.
    pub metric: u32,
    /// The interface that it leads out of; of several the first.
    pub device: Option<String>,
    /// The router that it leads over; of several the first.
    pub gateway: Option<IpAddr>,
    /// Who made it: `kernel`, `boot`, `static`, `bird` …
    pub protocol: String,
    /// Whether it has our mark.
    pub ours: bool,
}

/// A packet to be looked up.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Its source.
    pub from: IpAddr,
    /// Its destination.
    pub to: IpAddr,
    /// The interface that it comes in by; `lo` when the host itself sends it.
    pub iif: &'a str,
}

/// What decides on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision<'a> {
    /// The rule that led there.
    pub rule: &'a PolicyRule,
    /// The route; `None` when the rule itself refuses.
    pub route: Option<&'a Route>,
}

impl Fib {
    /// What decides on a packet; `None` when there is no route for it.
    #[must_use]
    pub fn decide(&self, packet: &Packet<'_>) -> Option<Decision<'_>> {
        let family = Family::of(packet.to);
        let mut rules: Vec<&PolicyRule> = self.rules.iter().filter(|rule| rule.family == family).collect();
        rules.sort_by_key(|rule| rule.priority);
        let mut from = 0;
        for rule in rules {
            if rule.priority < from || !rule.matches(packet) {
                continue;
            }
            match rule.action {
                Action::Refuse(_) => return Some(Decision { rule, route: None }),
                Action::Goto(priority) => from = priority,
                Action::Nop => {}
                Action::Table(table) => {
                    let found = self.look_up(table, packet.to);
                    let counts = |route: &&Route| {
                        let short = rule.suppress.is_some_and(|length| u32::from(route.dst.prefix_len()) <= length);
                        route.kind != "throw" && !short
                    };
                    if let Some(route) = found.filter(counts) {
                        return Some(Decision { rule, route: Some(route) });
                    }
                }
            }
        }
        None
    }

    fn look_up(&self, table: u32, to: IpAddr) -> Option<&Route> {
        let fits = |route: &&Route| route.table == table && route.dst.contains(to);
        self.routes.iter().filter(fits).max_by_key(|route| (route.dst.prefix_len(), u32::MAX - route.metric))
    }
}

impl PolicyRule {
    /// A rule for all packets of a family.
    #[must_use]
    pub fn of_all(family: Family, priority: u32, action: Action) -> Self {
        let (from, to, iif, mark, suppress) = (None, None, None, None, None);
        Self { family, priority, from, to, iif, mark, other: false, invert: false, action, suppress }
    }

    fn matches(&self, packet: &Packet<'_>) -> bool {
        // A pod's packet carries no mark.
        let all = self.from.is_none_or(|from| from.contains(packet.from))
            && self.to.is_none_or(|to| to.contains(packet.to))
            && self.iif.as_deref().is_none_or(|iif| iif == packet.iif)
            && self.mark.is_none_or(|(mark, mask)| mark & mask == 0)
            && !self.other;
        all != self.invert
    }

    /// True for the rules that every host has: local, main and default for all packets.
    #[must_use]
    pub fn is_usual(&self) -> bool {
        let all = self.from.is_none() && self.to.is_none() && self.iif.is_none() && self.mark.is_none() && !self.other;
        all && matches!(self.action, Action::Table(DEFAULT | MAIN | LOCAL))
    }

    /// The command that takes it away.
    #[must_use]
    pub fn delete(&self) -> String {
        let ip = if self.family == Family::V6 { "ip -6" } else { "ip" };
        format!("{ip} rule del priority {} {}", self.priority, self.words())
    }

    fn words(&self) -> String {
        let mut text = if self.invert { "not ".to_owned() } else { String::new() };
        text += &self.from.map_or("from all".to_owned(), |from| format!("from {from}"));
        if let Some(to) = self.to {
            text += &format!(" to {to}");
        }
        if let Some(iif) = &self.iif {
            text += &format!(" iif {iif}");
        }
        match self.mark {
            Some((mark, u32::MAX)) => text += &format!(" fwmark {mark:#x}"),
            Some((mark, mask)) => text += &format!(" fwmark {mark:#x}/{mask:#x}"),
            None => {}
        }
        text += &match self.action {
            Action::Table(table) => format!(" lookup {}", table_name(table)),
            Action::Refuse(word) => format!(" {word}"),
            Action::Goto(priority) => format!(" goto {priority}"),
            Action::Nop => " nop".to_owned(),
        };
        text
    }
}

/// As `ip rule show` prints it.
impl fmt::Display for PolicyRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.priority, self.words())
    }
}

impl Route {
    /// The command that takes it away.
    #[must_use]
    pub fn delete(&self) -> String {
        format!("ip route del {}{}", self.path(), self.place())
    }

    fn path(&self) -> String {
        let mut text = if self.kind == "unicast" { String::new() } else { format!("{} ", self.kind) };
        text += &self.dst.to_string();
        if let Some(gateway) = self.gateway {
            text += &format!(" via {gateway}");
        }
        // iproute2 refuses a device for a route that leads nowhere; IPv6 shows `lo` there.
        if let Some(device) = self.device.as_ref().filter(|_| ["unicast", "local"].contains(&self.kind.as_str())) {
            text += &format!(" dev {device}");
        }
        text
    }

    fn place(&self) -> String {
        let metric = if self.metric == 0 { String::new() } else { format!(" metric {}", self.metric) };
        let table = if self.table == MAIN { String::new() } else { format!(" table {}", table_name(self.table)) };
        metric + &table
    }
}

/// As `ip route show table all` prints it.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} proto {}{}", self.path(), self.protocol, self.place())
    }
}

fn table_name(table: u32) -> String {
    match table {
        DEFAULT => "default".into(),
        MAIN => "main".into(),
        LOCAL => "local".into(),
        other => other.to_string(),
    }
}

/// `ip rule show` and `ip route show table all`, of both families, over a socket of its own.
///
/// # Errors
/// When the kernel can't be asked.
pub fn fib() -> Result<Fib, KernelError> {
    let socket = RequestSocket::open(NETLINK_ROUTE);
    let mut socket = socket.map_err(|error| KernelError::Disconnected(error.to_string()))?;
    let links = tables::links(&mut socket)?;
    let mut fib = Fib::default();
    for (family, number) in [(AddressFamily::Inet, libc::AF_INET), (AddressFamily::Inet6, libc::AF_INET6)] {
        // A kernel without IPv6 answers with all families.
        let of_family = |frame: &Frame<'_>| frame.body.first().is_some_and(|first| i32::from(*first) == number);
        let mut all = RuleMessage::default();
        all.header.family = family;
        let rules = socket.dump(&Request::new(&Rtnl::GetRule(all), 0), |frame| match route_message(frame)? {
            Rtnl::NewRule(rule) if of_family(frame) => Some(rule_of(&rule)),
            _ => None,
        });
        fib.rules.extend(nothing_if_missing(rules).map_err(reading("policy rules"))?);
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        let routes = socket.dump(&Request::new(&Rtnl::GetRoute(all), 0), |frame| match route_message(frame)? {
            Rtnl::NewRoute(route) if of_family(frame) => route_of(&route, &links),
            _ => None,
        });
        fib.routes.extend(nothing_if_missing(routes).map_err(reading("routes"))?);
    }
    Ok(fib)
}

/// A kernel may lack IPv6, or the tables of a family nobody has used yet.
fn nothing_if_missing<T>(rows: std::io::Result<Vec<T>>) -> std::io::Result<Vec<T>> {
    match rows {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT)) => {
            Ok(vec![])
        }
        rows => rows,
    }
}

fn rule_of(message: &RuleMessage) -> PolicyRule {
    let family = if message.header.family == AddressFamily::Inet6 { Family::V6 } else { Family::V4 };
    let mut rule = PolicyRule {
        other: message.header.tos != 0,
        invert: message.header.flags.contains(RuleFlags::Invert),
        ..PolicyRule::of_all(family, 0, Action::Nop)
    };
    let (mut table, mut goto, mut mask) = (u32::from(message.header.table), 0, u32::MAX);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Source(from) => rule.from = Subnet::holding(*from, message.header.src_len).ok(),
            RuleAttribute::Destination(to) => rule.to = Subnet::holding(*to, message.header.dst_len).ok(),
            RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
            RuleAttribute::FwMark(mark) => rule.mark = Some((*mark, u32::MAX)),
            RuleAttribute::FwMask(bits) => mask = *bits,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Goto(priority) => goto = *priority,
            // No suppression is written as -1.
            RuleAttribute::SuppressPrefixLen(length) => rule.suppress = Some(*length).filter(|l| *l != u32::MAX),
            RuleAttribute::Oifname(_)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_) => rule.other = true,
            RuleAttribute::TunId(id) => rule.other |= *id != 0,
            RuleAttribute::L3MDev(on) => rule.other |= *on,
            _ => {}
        }
    }
    rule.mark = rule.mark.map(|(mark, _)| (mark, mask)).filter(|(mark, mask)| (*mark, *mask) != (0, 0));
    rule.action = match message.header.action {
        RuleAction::ToTable => Action::Table(table),
        RuleAction::Goto => Action::Goto(goto),
        RuleAction::Blackhole => Action::Refuse("blackhole"),
        RuleAction::Unreachable => Action::Refuse("unreachable"),
        RuleAction::Prohibit => Action::Refuse("prohibit"),
        _ => Action::Nop,
    };
    rule
}

fn route_of(route: &RouteMessage, links: &Links) -> Option<Route> {
    if route.header.flags.intersects(RouteFlags::Cloned | RouteFlags::Dead) {
        return None;
    }
    let (mut dst, mut table, mut gateway) = (None, u32::from(route.header.table), None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(address) => dst = ip(address),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::MultiPath(hops) => {
                let attributes = hops.first().map(|hop| hop.attributes.as_slice()).unwrap_or_default();
                gateway = attributes.iter().find_map(|a| match a {
                    RouteAttribute::Gateway(address) => ip(address),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    // A default route names no destination.
    let any = match route.header.address_family {
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    let device =
        device(route).map(|index| links.get(&index).map_or_else(|| format!("if{index}"), |link| link.name.to_string()));
    Some(Route {
        dst: Subnet::holding(dst.unwrap_or(any), route.header.destination_prefix_length).ok()?,
        table,
        kind: kind(route.header.kind).to_owned(),
        metric: metric(route),
        device,
        gateway,
        protocol: protocol(route.header.protocol),
        ours: route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL)
            && table == u32::from(RouteHeader::RT_TABLE_MAIN),
    })
}

fn kind(kind: RouteType) -> &'static str {
    match kind {
        RouteType::Unicast => "unicast",
        RouteType::Local => "local",
        RouteType::Broadcast => "broadcast",
        RouteType::Anycast => "anycast",
        RouteType::Multicast => "multicast",
        RouteType::BlackHole => "blackhole",
        RouteType::Unreachable => "unreachable",
        RouteType::Prohibit => "prohibit",
        RouteType::Throw => "throw",
        _ => "unknown",
    }
}

/// The name that iproute2 has for it (`/etc/iproute2/rt_protos`).
fn protocol(protocol: RouteProtocol) -> String {
    match protocol {
        RouteProtocol::IcmpRedirect => "redirect".into(),
        RouteProtocol::Other(number) => number.to_string(),
        named => format!("{named:?}").to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(dst: &str, kind: &str, table: u32, metric: u32, device: &str) -> Route {
        Route {
            dst: dst.parse().unwrap(),
            table,
            kind: kind.into(),
            metric,
            device: Some(device.to_owned()).filter(|device| !device.is_empty()),
            gateway: None,
            protocol: "static".into(),
            ours: false,
        }
    }

    fn rule(priority: u32, action: Action) -> PolicyRule {
        PolicyRule::of_all(Family::V4, priority, action)
    }

    /// The rules of every host, and ours for a peer.
    fn host(rules: Vec<PolicyRule>, routes: Vec<Route>) -> Fib {
        let usual = [rule(0, Action::Table(LOCAL)), rule(32766, Action::Table(MAIN))];
        let ours = Route { ours: true, ..route("10.244.2.0/24", "unicast", MAIN, 0, "fabric.1") };
        let default = route("0.0.0.0/0", "unicast", MAIN, 0, "eth0");
        Fib { rules: [usual.to_vec(), rules].concat(), routes: [vec![ours, default], routes].concat() }
    }

    fn decided(fib: &Fib) -> String {
        let packet = Packet { from: "10.244.1.2".parse().unwrap(), to: "10.244.2.2".parse().unwrap(), iif: "cni0" };
        match fib.decide(&packet) {
            None => "nothing".into(),
            Some(Decision { route: Some(route), .. }) => route.to_string(),
            Some(Decision { rule, route: None }) => rule.to_string(),
        }
    }

    #[test]
    fn longest_prefix_then_smallest_metric_decides() {
        for (routes, want) in [
            (vec![], "10.244.2.0/24 dev fabric.1 proto static"),
            (vec![route("10.244.2.0/25", "blackhole", MAIN, 7, "")], "blackhole 10.244.2.0/25 proto static metric 7"),
            (vec![route("10.244.0.0/16", "unicast", MAIN, 0, "eth1")], "10.244.2.0/24 dev fabric.1 proto static"),
            (vec![route("10.244.2.0/24", "unicast", MAIN, 5, "eth1")], "10.244.2.0/24 dev fabric.1 proto static"),
            (vec![route("10.244.2.2/32", "unicast", 100, 0, "eth1")], "10.244.2.0/24 dev fabric.1 proto static"),
            (vec![route("10.244.2.2/32", "throw", MAIN, 0, "")], "nothing"),
        ] {
            assert_eq!(decided(&host(vec![], routes)), want);
        }
    }

    #[test]
    fn policy_rules_are_asked_by_priority_and_only_if_they_fit_a_pods_packet() {
        let to = |table| rule(100, Action::Table(table));
        let aside = || vec![route("0.0.0.0/0", "unicast", 100, 0, "wg0")];
        let (ours, other) = ("10.244.2.0/24 dev fabric.1 proto static", "0.0.0.0/0 dev wg0 proto static table 100");
        let from = |prefix: &str| PolicyRule { from: Some(prefix.parse().unwrap()), ..to(100) };
        for (rule, want) in [
            (to(100), other),
            (from("10.244.1.0/24"), other),
            (from("10.244.7.0/24"), ours),
            (PolicyRule { iif: Some("cni0".into()), ..to(100) }, other),
            (PolicyRule { iif: Some("eth0".into()), ..to(100) }, ours),
            (PolicyRule { mark: Some((0xca6c, u32::MAX)), ..to(100) }, ours),
            // What wg-quick writes.
            (PolicyRule { mark: Some((0xca6c, u32::MAX)), invert: true, ..to(100) }, other),
            (PolicyRule { suppress: Some(0), ..to(100) }, ours),
            (PolicyRule { other: true, ..to(100) }, ours),
            (rule(100, Action::Goto(32766)), ours),
            (rule(100, Action::Nop), ours),
            (rule(100, Action::Refuse("prohibit")), "100: from all prohibit"),
            (rule(40000, Action::Refuse("prohibit")), ours),
            (to(101), ours),
        ] {
            let words = rule.to_string();
            assert_eq!(decided(&host(vec![rule], aside())), want, "{words}");
        }
    }

    #[test]
    fn commands_take_away_what_they_name() {
        let wide = PolicyRule { from: Some("10.244.0.0/16".parse().unwrap()), ..rule(100, Action::Table(100)) };
        assert_eq!(wide.delete(), "ip rule del priority 100 from 10.244.0.0/16 lookup 100");
        assert!(!wide.is_usual() && rule(32766, Action::Table(MAIN)).is_usual());
        let lost = route("10.244.2.2/32", "unreachable", 100, 3, "");
        assert_eq!(lost.delete(), "ip route del unreachable 10.244.2.2/32 metric 3 table 100");
    }
}
