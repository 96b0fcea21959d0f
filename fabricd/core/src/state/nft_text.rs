//! Tables, chains, rules and sets as text, in the words of `nft`: what tests and the debug log show, and by what is told
//! whether a rule or a set that is there is the one that is wanted.

use std::fmt;

use super::nft::{
    ChainKind, Element, Field, Hook, KeyField, Match, Part, Place, Rule, Set, Table, TableFamily, Test, UDP, Verdict,
};
use crate::model::Family;

impl Set {
    /// Its kind, as `nft` writes it: `type ipv4_addr . ipv4_addr; flags interval;`.
    #[must_use]
    pub fn declaration(&self) -> String {
        let words = self.key.iter().map(|field| match field {
            KeyField::V4 => "ipv4_addr",
            KeyField::V6 => "ipv6_addr",
            KeyField::Interface => "ifname",
            KeyField::Mac => "ether_addr",
        });
        let words: Vec<&str> = words.collect();
        format!("type {};{}", words.join(" . "), if self.ranges { " flags interval;" } else { "" })
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

impl fmt::Display for Table {
    /// As `nft list table` shows it, but for its family and name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, set) in &self.sets {
            write!(f, "set {name} {{ {}", set.declaration())?;
            let elements: Vec<String> = set.elements.keys().map(ToString::to_string).collect();
            if !elements.is_empty() {
                write!(f, " elements = {{ {} }}", elements.join(", "))?;
            }
            writeln!(f, " }}")?;
        }
        for (name, chain) in &self.chains {
            writeln!(f, "chain {name} {{")?;
            if let Some(hook) = chain.hook {
                writeln!(f, "  {hook}")?;
            }
            for rule in &chain.rules {
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
        for condition in &self.matches {
            write!(f, "{condition} ")?;
        }
        if self.counted {
            f.write_str("counter ")?;
        }
        match self.verdict {
            Verdict::Accept => f.write_str("accept"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Return => f.write_str("return"),
            Verdict::Jump(chain) => write!(f, "jump {chain}"),
            Verdict::Masquerade => f.write_str("masquerade fully-random"),
            Verdict::Notrack => f.write_str("notrack"),
        }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, field) in self.fields.iter().enumerate() {
            write!(f, "{}{field}", if position == 0 { "" } else { " . " })?;
        }
        match &self.test {
            Test::Is(_) if self.fields == [Field::Fragment] => f.write_str(" exists"),
            Test::Is(number) => write!(f, " {}", Spelled(self.fields.first().copied(), *number)),
            Test::IsNot(number) => write!(f, " != {}", Spelled(self.fields.first().copied(), *number)),
            Test::Named(name) => write!(f, " {:?}", name.as_str()),
            Test::Bits(bits) => write!(f, " & {bits:#x} == {bits:#x}"),
            Test::Within(prefix) => write!(f, " {prefix}"),
            Test::Outside(prefix) => write!(f, " != {prefix}"),
            Test::In(set) => write!(f, " @{set}"),
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
            (Some(Field::EtherType | Field::InnerType), number) => write!(f, "{number:#06x}"),
            (_, number) => number.fmt(f),
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Self::InnerSubnet(family, length) = self {
            return write!(f, "{}/{length}", Self::InnerSource(*family));
        }
        f.write_str(match self {
            Self::InInterface => "iifname",
            Self::Mark => "meta mark",
            Self::NetworkFamily => "meta nfproto",
            Self::EtherType => "meta protocol",
            Self::SourceMac => "ether saddr",
            Self::ArpSource => "arp saddr ip",
            Self::AdvertisedAddress => "@th,64,128",
            Self::Protocol => "meta l4proto",
            Self::Fragment => "exthdr frag",
            Self::Source(Family::V4) => "ip saddr",
            Self::Source(Family::V6) => "ip6 saddr",
            Self::Target(Family::V4) => "ip daddr",
            Self::Target(Family::V6) => "ip6 daddr",
            Self::TargetPort => "th dport",
            Self::IcmpType => "@th,0,8",
            Self::Vni => "@th,96,24",
            Self::InnerType => "@th,224,16",
            Self::InnerSource(Family::V4) | Self::InnerSubnet(Family::V4, _) => "@th,336,32",
            Self::InnerSource(Family::V6) | Self::InnerSubnet(Family::V6, _) => "@th,304,128",
        })
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, part) in self.parts().enumerate() {
            f.write_str(if position == 0 { "" } else { " . " })?;
            match part {
                Part::Net(net) if net.prefix_len() == net.family().bits() => net.base().fmt(f)?,
                Part::Net(net) => net.fmt(f)?,
                Part::Interface(name) => write!(f, "{:?}", name.as_str())?,
                Part::Mac(mac) => mac.fmt(f)?,
            }
        }
        Ok(())
    }
}
