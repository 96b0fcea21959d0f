//! Tables, chains, rules and sets as text, in the words of `nft` as far as it has any: what tests and the debug log show,
//! and by what is told whether a rule that is there is the one that is wanted. Values that a map gives `nft` has no word
//! for; here they are `$0`, `$1` and so on.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::{
    ChainKind, CtField, Data, Datatype, Direction, Element, Field, Fields, Hook, Match, Place, Reject, Rule, SetKind,
    Step, Table, TableFamily, TableKey, Test, UDP, Update, Verdict, ct_state,
};
use crate::model::{Family, Subnet, from_bits, to_bits};

impl fmt::Display for SetKind {
    /// As `nft` writes it: `type ipv4_addr . ipv4_addr; flags interval;`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "type {}", self.key)?;
        match self.data {
            Data::None => {}
            Data::Fields(data) => write!(f, " : {data}")?,
            Data::Verdict => f.write_str(" : verdict")?,
        }
        f.write_str(";")?;
        if self.ranges {
            f.write_str(" flags interval;")?;
        }
        match self.dynamic {
            None => Ok(()),
            Some(dynamic) => {
                write!(f, " size {}; flags dynamic{};", dynamic.most, if dynamic.timeout { ",timeout" } else { "" })
            }
        }
    }
}

impl SetKind {
    /// What `nft` calls it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        if self.data == Data::None { "set" } else { "map" }
    }
}

impl fmt::Display for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        joined(f, self.as_slice().iter())
    }
}

impl fmt::Display for Datatype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "ipv4_addr",
            Self::V6 => "ipv6_addr",
            Self::Protocol => "inet_proto",
            Self::Port => "inet_service",
            Self::Number => "mark",
            Self::Interface => "ifname",
            Self::Mac => "ether_addr",
        })
    }
}

/// Parts with a dot between, as `nft` joins them.
fn joined<T: fmt::Display>(f: &mut fmt::Formatter<'_>, parts: impl Iterator<Item = T>) -> fmt::Result {
    for (position, part) in parts.enumerate() {
        write!(f, "{}{part}", if position == 0 { "" } else { " . " })?;
    }
    Ok(())
}

/// Fields with a dot between.
struct Key<'a>(&'a [Field]);

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        joined(f, self.0.iter())
    }
}

impl fmt::Display for TableFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
        })
    }
}

impl fmt::Display for TableKey {
    /// Family and name, as commands of `nft` take them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family(), self.name())
    }
}

impl fmt::Display for Table {
    /// As `nft list table` shows it, but for its family and name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, set) in &self.sets {
            write!(f, "{} {name} {{ {}", set.kind.word(), set.kind)?;
            let elements: Vec<String> =
                set.elements.keys().map(|element| element.shown(set.kind).to_string()).collect();
            if !elements.is_empty() {
                write!(f, " elements = {{ {} }}", elements.join(", "))?;
            }
            writeln!(f, " }}")?;
        }
        for (name, chain) in &self.chains {
            writeln!(f, "chain {name} {{")?;
            if let Some(hook) = chain.hook() {
                writeln!(f, "  {hook}")?;
            }
            for rule in chain.rules() {
                writeln!(f, "  {rule} comment \"{}\"", rule.why)?;
            }
            writeln!(f, "}}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        };
        let place = match self.place {
            Place::Prerouting => "prerouting",
            Place::Input => "input",
            Place::Forward => "forward",
            Place::Output => "output",
            Place::Postrouting => "postrouting",
        };
        write!(f, "type {kind} hook {place} priority {}; policy accept;", self.priority)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut found = 0;
        for (position, step) in self.steps.iter().enumerate() {
            write!(f, "{}{step}", if position == 0 { "" } else { " " })?;
            if let Step::Lookup { data, .. } = step {
                let values = found..found + data.as_slice().len();
                found = values.end;
                f.write_str(" : ")?;
                joined(f, values.map(|value| format!("${value}")))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Match(condition) => condition.fmt(f),
            Self::Lookup { key, map, .. } => write!(f, "{} map @{map}", Key(key)),
            Self::VerdictMap { key, map } => write!(f, "{} vmap @{map}", Key(key)),
            Self::Update { how, set, key, data, timeout } => {
                let word = match how {
                    Update::Add => "add",
                    Update::Refresh => "update",
                    Update::Delete => "delete",
                };
                write!(f, "{word} @{set} {{ {}", Key(key))?;
                if let Some(timeout) = timeout {
                    write!(f, " timeout {timeout}s")?;
                }
                if !data.is_empty() {
                    write!(f, " : {}", Key(data))?;
                }
                f.write_str(" }")
            }
            Self::Count => f.write_str("counter"),
            Self::Limit { per_second, burst } => write!(f, "limit rate {per_second}/second burst {burst} packets"),
            Self::Log { group, prefix } => write!(f, "log prefix {prefix:?} group {group}"),
            Self::SetCtMark { mask, value } => write!(f, "ct mark set ct mark & {:#x} | {value:#x}", !mask),
            Self::SetCtLabel(bit) => write!(f, "ct label set {bit}"),
            Self::Notrack => f.write_str("notrack"),
            Self::Dnat { family, address, port } => {
                let family = if *family == Family::V4 { "ip" } else { "ip6" };
                write!(f, "dnat {family} to {address}")?;
                port.map_or(Ok(()), |port| write!(f, " : {port}"))
            }
            Self::Masquerade => f.write_str("masquerade fully-random"),
            Self::Reject(how) => f.write_str(match how {
                Reject::PortUnreachable => "reject with icmpx port-unreachable",
                Reject::Prohibited => "reject with icmpx admin-prohibited",
                Reject::TcpReset => "reject with tcp reset",
            }),
            Self::Verdict(verdict) => verdict.fmt(f),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
        }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = self.fields.first().copied();
        Key(&self.fields).fmt(f)?;
        match &self.test {
            Test::Is(_) if first == Some(Field::Fragment) => f.write_str(" exists"),
            Test::Is(number) => write!(f, " {}", Spelled(first, *number)),
            Test::IsNot(number) => write!(f, " != {}", Spelled(first, *number)),
            Test::Named(name) => write!(f, " {:?}", name.as_str()),
            Test::Bits(bits) => write!(f, " & {bits:#x} == {bits:#x}"),
            Test::AnyBit(bits) if first == Some(Field::CtState) => write!(f, " {}", States(*bits)),
            Test::NoBit(bits) if first == Some(Field::CtState) => write!(f, " ! {}", States(*bits)),
            Test::AnyBit(bits) => write!(f, " & {bits:#x} != 0x0"),
            Test::NoBit(bits) => write!(f, " & {bits:#x} == 0x0"),
            Test::Within(prefix) => write!(f, " {prefix}"),
            Test::Outside(prefix) => write!(f, " != {prefix}"),
            Test::In(set) => write!(f, " @{set}"),
            Test::NotIn(set) => write!(f, " != @{set}"),
        }
    }
}

/// A number as `nft` writes it for this field.
struct Spelled(Option<Field>, u32);

impl fmt::Display for Spelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0, self.1) {
            (Some(Field::NetworkFamily), 2) => f.write_str("ipv4"),
            (Some(Field::NetworkFamily), 10) => f.write_str("ipv6"),
            (Some(Field::Protocol), UDP) => f.write_str("udp"),
            (Some(Field::SourceType | Field::TargetType), super::LOCAL) => f.write_str("local"),
            (Some(Field::CtDirection), 0) => f.write_str("original"),
            (Some(Field::CtDirection), 1) => f.write_str("reply"),
            (Some(Field::EtherType | Field::FrameType | Field::InnerType), number) => write!(f, "{number:#06x}"),
            (_, number) => number.fmt(f),
        }
    }
}

/// States of connections.
struct States(u32);

impl fmt::Display for States {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = [
            (ct_state::INVALID, "invalid"),
            (ct_state::ESTABLISHED, "established"),
            (ct_state::RELATED, "related"),
            (ct_state::NEW, "new"),
            (ct_state::UNTRACKED, "untracked"),
        ];
        let words = known.iter().filter(|(bit, _)| self.0 & bit != 0).map(|(_, word)| *word);
        f.write_str(&words.collect::<Vec<_>>().join(","))
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InnerSubnet(family, length) => return write!(f, "{}/{length}", Self::InnerSource(*family)),
            Self::Ct(direction, field) => {
                let direction = if *direction == Direction::Original { "original" } else { "reply" };
                let field = match field {
                    CtField::Source(Family::V4) => "ip saddr",
                    CtField::Source(Family::V6) => "ip6 saddr",
                    CtField::Target(Family::V4) => "ip daddr",
                    CtField::Target(Family::V6) => "ip6 daddr",
                    CtField::SourcePort => "proto-src",
                    CtField::TargetPort => "proto-dst",
                };
                return write!(f, "ct {direction} {field}");
            }
            Self::Random(below) => return write!(f, "numgen random mod {below}"),
            Self::Increment(below) => return write!(f, "numgen inc mod {below}"),
            Self::SourceHash { family, slots, seed } => {
                return write!(f, "jhash {} mod {slots} seed {seed:#x}", Self::Source(*family));
            }
            Self::Number(number) => return number.fmt(f),
            Self::Value(value) => return write!(f, "${value}"),
            Self::InInterface => "iifname",
            Self::OutInterface => "oifname",
            Self::Mark => "meta mark",
            Self::NetworkFamily => "meta nfproto",
            Self::EtherType => "meta protocol",
            Self::FrameType => "ether type",
            Self::SourceMac => "ether saddr",
            Self::ArpSource => "arp saddr ip",
            Self::AdvertisedAddress => "@th,64,128",
            Self::Protocol => "meta l4proto",
            Self::Fragment => "exthdr frag",
            Self::Source(Family::V4) => "ip saddr",
            Self::Source(Family::V6) => "ip6 saddr",
            Self::Target(Family::V4) => "ip daddr",
            Self::Target(Family::V6) => "ip6 daddr",
            Self::HopLimit => "ip6 hoplimit",
            Self::SourcePort => "th sport",
            Self::TargetPort => "th dport",
            Self::IcmpType => "@th,0,8",
            Self::Vni => "@th,96,24",
            Self::InnerType => "@th,224,16",
            Self::InnerSource(Family::V4) => "@th,336,32",
            Self::InnerSource(Family::V6) => "@th,304,128",
            Self::SourceType => "fib saddr type",
            Self::TargetType => "fib daddr type",
            Self::CtState => "ct state",
            Self::CtDirection => "ct direction",
            Self::CtStatus => "ct status",
            Self::CtMark => "ct mark",
            Self::CtLabels => "ct label",
        })
    }
}

impl Element {
    /// The element as `nft` writes it: `192.0.2.7 . 10.64.2.0/24`, `203.0.113.1 . 6 . 80 : 7 . 3 . 1`.
    #[must_use]
    pub fn shown(&self, kind: SetKind) -> Shown<'_> {
        Shown { element: self, kind }
    }
}

/// An element with what it takes to read it.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a> {
    element: &'a Element,
    kind: SetKind,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (lowest, highest) = self.element.ends(self.kind);
        values(f, self.kind.key, lowest, highest)?;
        match self.kind.data {
            Data::None => Ok(()),
            Data::Fields(fields) => {
                let (_, data) = self.element.split(self.kind);
                f.write_str(" : ")?;
                values(f, fields, data, data)
            }
            Data::Verdict => match self.element.verdict(self.kind) {
                Some(verdict) => write!(f, " : {verdict}"),
                None => f.write_str(" : ?"),
            },
        }
    }
}

fn values(f: &mut fmt::Formatter<'_>, fields: Fields, lowest: &[u8], highest: &[u8]) -> fmt::Result {
    let mut at = 0;
    let parts = fields.as_slice().iter().map(|field| {
        let bytes = at..at + field.width();
        at += field.padded();
        match (lowest.get(bytes.clone()), highest.get(bytes)) {
            (Some(low), Some(high)) => value(*field, low, high),
            _ => "?".to_owned(),
        }
    });
    joined(f, parts)
}

/// A value, or from one to another.
fn value(field: Datatype, low: &[u8], high: &[u8]) -> String {
    let one = |bytes: &[u8]| match field {
        Datatype::V4 => <[u8; 4]>::try_from(bytes).map(|bytes| Ipv4Addr::from(bytes).to_string()).unwrap_or_default(),
        Datatype::V6 => <[u8; 16]>::try_from(bytes).map(|bytes| Ipv6Addr::from(bytes).to_string()).unwrap_or_default(),
        Datatype::Protocol | Datatype::Port => bytes.iter().fold(0, |n, byte| n << 8 | u32::from(*byte)).to_string(),
        Datatype::Number => <[u8; 4]>::try_from(bytes).map(|n| u32::from_ne_bytes(n).to_string()).unwrap_or_default(),
        Datatype::Interface => format!("{:?}", String::from_utf8_lossy(bytes).trim_end_matches('\0')),
        Datatype::Mac => bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"),
    };
    if low == high {
        return one(low);
    }
    match field {
        Datatype::V4 | Datatype::V6 => match prefix(low, high) {
            Some(prefix) => prefix.to_string(),
            None => format!("{}-{}", one(low), one(high)),
        },
        _ => format!("{}-{}", one(low), one(high)),
    }
}

/// The prefix that begins and ends there, if it is one.
fn prefix(low: &[u8], high: &[u8]) -> Option<Subnet> {
    let family = if low.len() == 4 { Family::V4 } else { Family::V6 };
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u128::from(*byte));
    let (first, last) = (number(low), number(high));
    let length = family.bits() - u8::try_from((first ^ last).checked_ilog2().map_or(0, |bit| bit + 1)).ok()?;
    let net = Subnet::holding(from_bits(family, first), length).ok()?;
    (to_bits(net.base()) == first && to_bits(net.last()) == last).then_some(net)
}
