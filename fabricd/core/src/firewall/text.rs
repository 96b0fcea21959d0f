//! Rules and places as text, in the words of `nft` and `iptables`.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::evaluate::{Blocked, PossibleDrop};
use super::fields::state;
use super::{Comparison, Decision, Destination, End, Field, Hook, Register, Rule, Step, TableKind, Test};

impl fmt::Display for TableKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Iptables => "iptables-legacy",
            Self::Ip6tables => "ip6tables-legacy",
        })
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
        })
    }
}

impl fmt::Display for Blocked {
    /// `inet firewalld filter_FORWARD rule 3 (handle 12): reject`, `ip filter FORWARD policy drop`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, table, chain, .. } = self;
        write!(f, "{kind} {table} {chain} ")?;
        match &self.rule {
            None => f.write_str("policy drop"),
            Some(rule) => {
                write!(f, "rule {}", rule.number)?;
                if let Some(handle) = rule.handle {
                    write!(f, " (handle {handle})")?;
                }
                write!(f, ": {}", rule.text)
            }
        }
    }
}

impl fmt::Display for PossibleDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; it depends on {}", self.by, self.because)
    }
}

/// What is in a register, for what follows.
struct Loaded<'a> {
    field: &'a Field,
    len: u8,
    mask: Option<&'a [u8]>,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut registers: BTreeMap<Register, Loaded<'_>> = BTreeMap::new();
        let mut words: Vec<String> = vec![];
        for step in &self.steps {
            match step {
                Step::Load { field, len, to } => {
                    registers.insert(*to, Loaded { field, len: *len, mask: None });
                }
                Step::Bitwise { from, mask, .. } => {
                    if let Some(loaded) = registers.get_mut(from) {
                        loaded.mask = Some(mask);
                    }
                }
                Step::Compare { register, how, with } => {
                    words.extend(registers.get(register).map(|loaded| loaded.compared(*how, with)));
                }
                Step::Range { register, low, high, inverted } => words.extend(registers.get(register).map(|loaded| {
                    let not = if *inverted { "!= " } else { "" };
                    format!("{} {not}{}-{}", loaded.name(), loaded.value(low), loaded.value(high))
                })),
                Step::Lookup { register, set, inverted, to } => {
                    let keys: Vec<String> = registers.range(register..).map(|(_, loaded)| loaded.name()).collect();
                    let not = if *inverted { "!= " } else { "" };
                    let map = match to {
                        Destination::Nowhere => "",
                        Destination::Register(_) => "map ",
                        Destination::Verdict => "vmap ",
                    };
                    words.push(format!("{} {not}{map}@{set}", keys.join(" . ")));
                }
                Step::Test { test, inverted } => {
                    words.extend(test.words().map(|test| if *inverted { format!("! {test}") } else { test }));
                }
                Step::Opaque(text) | Step::Change(text) => words.push(text.clone()),
                Step::SetMark(_) | Step::ChangeMark { .. } => words.push("meta mark set".to_owned()),
                Step::Notrack => words.push("notrack".to_owned()),
                Step::Decide(decision) => words.push(decision.to_string()),
                Step::Constant { .. } | Step::SwapBytes { .. } => {}
            }
        }
        f.write_str(&words.join(" "))
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Accept => f.write_str("accept"),
            Self::Drop(words) => f.write_str(words),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Elsewhere(words) => f.write_str(words),
            Self::Continue => f.write_str("continue"),
        }
    }
}

/// How a value is written.
enum Form {
    Address,
    Number,
    Name,
    Mark,
    States,
    Protocol,
    Family,
}

impl Loaded<'_> {
    fn name(&self) -> String {
        match (self.field, self.len) {
            (Field::Network { offset: 12 }, 4) => "ip saddr".to_owned(),
            (Field::Network { offset: 16 }, 4) => "ip daddr".to_owned(),
            (Field::Network { offset: 9 }, 1) => "ip protocol".to_owned(),
            // A prefix whose length is a number of whole bytes is compared without a mask.
            (Field::Network { offset: 12 }, 1..4) => "ip saddr".to_owned(),
            (Field::Network { offset: 16 }, 1..4) => "ip daddr".to_owned(),
            (Field::Network { offset: 6 }, 1) => "ip6 nexthdr".to_owned(),
            (Field::Network { offset: 8 }, 2..=16) => "ip6 saddr".to_owned(),
            (Field::Network { offset: 24 }, 2..=16) => "ip6 daddr".to_owned(),
            (Field::Network { offset }, len) => format!("@nh,{},{}", offset * 8, u32::from(len) * 8),
            (Field::Transport { offset: 0 }, 2) => "th sport".to_owned(),
            (Field::Transport { offset: 2 }, 2) => "th dport".to_owned(),
            (Field::Transport { offset }, len) => format!("@th,{},{}", offset * 8, u32::from(len) * 8),
            (Field::ExtensionHeader { kind, .. }, _) => format!("exthdr {kind}"),
            (field, _) => field.words().to_owned(),
        }
    }

    fn form(&self) -> Form {
        match (self.field, self.len) {
            (Field::Network { offset: 9 }, 1) | (Field::Network { offset: 6 }, 1) | (Field::Protocol, _) => {
                Form::Protocol
            }
            (Field::Network { offset: 12 | 16 }, ..=4) | (Field::Network { offset: 8 | 24 }, _) => Form::Address,
            (Field::InName | Field::OutName | Field::InKind | Field::OutKind, _) => Form::Name,
            (Field::Mark | Field::ConnectionMark | Field::ConnectionStatus, _) => Form::Mark,
            (Field::ConnectionState, _) => Form::States,
            (Field::NetworkFamily, _) => Form::Family,
            _ => Form::Number,
        }
    }

    fn value(&self, bytes: &[u8]) -> String {
        let number = bytes.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
        let own = || bytes.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        match self.form() {
            Form::Address => self.address(bytes),
            Form::Name => {
                let text = String::from_utf8_lossy(bytes);
                // A name that is shorter than the field is the beginning of one.
                let star = if text.contains('\0') { "" } else { "*" };
                format!("\"{}{star}\"", text.trim_end_matches('\0'))
            }
            Form::Mark => format!("{:#x}", own()),
            Form::States => states(own()),
            Form::Protocol => protocol(number),
            Form::Family => if number == 2 { "ipv4" } else { "ipv6" }.to_owned(),
            Form::Number if matches!(self.field, Field::InIndex | Field::OutIndex | Field::AddressType { .. }) => {
                own().to_string()
            }
            Form::Number => number.to_string(),
        }
    }

    /// An address; of one that is cut the rest is zero.
    fn address(&self, bytes: &[u8]) -> String {
        let is_v6 = matches!(self.field, Field::Network { offset: 8 | 24 });
        let len = if is_v6 { 16 } else { 4 };
        address(&bytes.iter().copied().chain(std::iter::repeat(0)).take(len).collect::<Vec<u8>>())
    }

    fn compared(&self, how: Comparison, with: &[u8]) -> String {
        let name = self.name();
        let sign = match how {
            Comparison::Equal => "",
            Comparison::Different => "!= ",
            Comparison::Less => "< ",
            Comparison::LessOrEqual => "<= ",
            Comparison::Greater => "> ",
            Comparison::GreaterOrEqual => ">= ",
        };
        match (self.form(), self.mask) {
            // `ct state established`: a mask, and a comparison with nothing.
            (Form::States, Some(mask)) if how == Comparison::Different && with.iter().all(|byte| *byte == 0) => {
                format!("{name} {}", self.value(mask))
            }
            (Form::Address, Some(mask)) => {
                let length: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
                format!("{name} {sign}{}/{length}", self.address(with))
            }
            (Form::Address, None) if !matches!(with.len(), 4 | 16) => {
                format!("{name} {sign}{}/{}", self.address(with), with.len() * 8)
            }
            (_, Some(mask)) => {
                let sign = if sign.is_empty() { "== " } else { sign };
                format!("{name} & {} {sign}{}", self.value(mask), self.value(with))
            }
            (_, None) => format!("{name} {sign}{}", self.value(with)),
        }
    }
}

impl Field {
    /// As `nft` names it.
    fn words(&self) -> &str {
        match self {
            Self::Network { .. } => "@nh",
            Self::Transport { .. } => "@th",
            Self::ExtensionHeader { .. } => "exthdr",
            Self::EtherType => "meta protocol",
            Self::NetworkFamily => "meta nfproto",
            Self::Protocol => "meta l4proto",
            Self::Mark => "meta mark",
            Self::InIndex => "iif",
            Self::OutIndex => "oif",
            Self::InName => "iifname",
            Self::OutName => "oifname",
            Self::InType => "iiftype",
            Self::OutType => "oiftype",
            Self::InKind => "meta iifkind",
            Self::OutKind => "meta oifkind",
            Self::PacketType => "meta pkttype",
            Self::SocketOwner => "meta skuid",
            Self::ConnectionState => "ct state",
            Self::ConnectionDirection => "ct direction",
            Self::ConnectionStatus => "ct status",
            Self::ConnectionMark => "ct mark",
            Self::ConnectionHelper => "ct helper",
            Self::AddressType { source: true } => "fib saddr type",
            Self::AddressType { source: false } => "fib daddr type",
            Self::ReversePath { .. } => "fib saddr . iif oif",
            Self::Other(words) => words,
        }
    }
}

impl Test {
    /// As `iptables` writes it; nothing for what always holds.
    fn words(&self) -> Option<String> {
        let end = |end: &End, source: &str, target: &str| match end {
            End::Source => source.to_owned(),
            End::Target => target.to_owned(),
        };
        Some(match self {
            Self::Address { end: which, address: base, mask } => {
                let length: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
                format!("{} {}/{length}", end(which, "-s", "-d"), address(base))
            }
            Self::AddressRange { end: which, low, high } => {
                format!("{} {}-{}", end(which, "--src-range", "--dst-range"), address(low), address(high))
            }
            Self::Interface { end: which, name, mask } => {
                let plus = if mask.last() == Some(&0) && !mask.iter().zip(name).any(|(m, n)| *m != 0 && *n == 0) {
                    "+"
                } else {
                    ""
                };
                let name = String::from_utf8_lossy(name);
                format!("{} {}{plus}", end(which, "-i", "-o"), name.trim_end_matches('\0'))
            }
            Self::Protocol(number) => format!("-p {}", protocol((*number).into())),
            Self::Fragment => "-f".to_owned(),
            Self::Ports { end: which, ranges } => format!("{} {}", end(which, "--sport", "--dport"), ports(ranges)),
            Self::AnyPort(ranges) => format!("--ports {}", ports(ranges)),
            Self::State { states: bits, translated } => {
                let translated = if *translated { ",DNAT" } else { "" };
                format!("--ctstate {}{translated}", states(*bits).to_uppercase())
            }
            Self::Mark { mark, mask } => format!("--mark {mark:#x}/{mask:#x}"),
            Self::AddressType { end: which, types } => {
                let names = ["UNSPEC", "UNICAST", "LOCAL", "BROADCAST", "ANYCAST", "MULTICAST"];
                let names = names.iter().enumerate().filter(|(bit, _)| types & (1 << bit) != 0).map(|(_, name)| *name);
                format!("{} {}", end(which, "--src-type", "--dst-type"), names.collect::<Vec<_>>().join(","))
            }
            Self::PacketType(kind) => format!("--pkt-type {kind}"),
            Self::ReversePath => "-m rpfilter".to_owned(),
            Self::Always => return None,
        })
    }
}

fn ports(ranges: &[(u16, u16)]) -> String {
    let range = |(low, high): &(u16, u16)| if low == high { low.to_string() } else { format!("{low}:{high}") };
    ranges.iter().map(range).collect::<Vec<_>>().join(",")
}

fn address(bytes: &[u8]) -> String {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).to_string());
    let v6 = || <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).to_string());
    v4().or_else(v6).unwrap_or_default()
}

fn protocol(number: u64) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "ipv6-icmp".to_owned(),
        132 => "sctp".to_owned(),
        other => other.to_string(),
    }
}

fn states(bits: u32) -> String {
    let names = [
        (state::INVALID, "invalid"),
        (state::ESTABLISHED, "established"),
        (state::RELATED, "related"),
        (state::NEW, "new"),
        (state::UNTRACKED, "untracked"),
    ];
    let names = names.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name);
    names.collect::<Vec<_>>().join(",")
}
