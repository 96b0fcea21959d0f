//! What other people's firewalls do to packets of ours.
//!
//! ```text
//! kernel ──> Firewall (tables, chains, rules) ──┐
//!                                               ├── evaluate() ──> Verdict ──> remedy()
//! traffic (packets of ours) ──> Packet ─────────┘
//! ```
//!
//! A [`Rule`] is a list of [`Step`]s, as the kernel's own machine runs them: load a field into a register, mask it,
//! compare it, decide. nftables and iptables-nft are such lists already; a rule of iptables-legacy becomes one. The
//! evaluation has three values: what can't be read off the rules is [`Unknown`], and neither told as fine nor as
//! failed.
//!
//! | module | what |
//! |---|---|
//! | [`packet`] | a packet, of which some bits may be open, and where it passes |
//! | [`traffic`] | the packets of ours that are evaluated |
//! | [`evaluate`] | rules applied to a packet |
//! | [`bypass`] | what filters or changes the packets between pods, whatever these are |
//! | [`remedy`] | the commands that let it through, in the words of the firewall's owner |
//! | `text` | rules as `nft` would write them |
//!
//! Chains of type nat are left out: they translate, and see the first packet of a connection alone.

mod bits;
pub mod bypass;
pub mod evaluate;
mod evaluation;
mod fields;
pub mod packet;
pub mod remedy;
#[cfg(test)]
mod tests;
mod text;
pub mod traffic;

use std::collections::{BTreeMap, BTreeSet};

use crate::model::Family;

pub use self::bits::Unknown;
pub use self::evaluate::{Blocked, PossibleDrop, Verdict, evaluate, state_decides};
pub use self::evaluation::Evaluation;
pub use self::fields::state;
pub use self::packet::{Connection, Interface, Packet, Path};

/// All tables of others that packets of ours meet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    /// The tables.
    pub tables: Vec<Table>,
    /// Base chains of other families with rules or a policy that drops (`bridge`, `netdev`): they are not evaluated.
    pub unread: BTreeSet<String>,
}

/// Whose packets a table sees, and by which tool it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableKind {
    /// nftables, IPv4 and IPv6.
    Inet,
    /// nftables, IPv4. Tables of iptables-nft are such.
    Ip,
    /// nftables, IPv6. Tables of ip6tables-nft are such.
    Ip6,
    /// iptables-legacy.
    Iptables,
    /// ip6tables-legacy.
    Ip6tables,
}

impl TableKind {
    /// Whether packets of this family pass it.
    #[must_use]
    pub fn sees(self, family: Family) -> bool {
        match self {
            Self::Inet => true,
            Self::Ip | Self::Iptables => family == Family::V4,
            Self::Ip6 | Self::Ip6tables => family == Family::V6,
        }
    }

    /// Whether it is one of iptables-legacy.
    #[must_use]
    pub fn is_legacy(self) -> bool {
        matches!(self, Self::Iptables | Self::Ip6tables)
    }
}

/// A table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its kind.
    pub kind: TableKind,
    /// Its name.
    pub name: String,
    /// Base chains that our packets meet, and the chains that are reached from them.
    pub chains: BTreeMap<String, Chain>,
    /// Sets and maps that their rules look into.
    pub sets: BTreeMap<String, Set>,
}

/// A chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Where packets enter it; none for one that rules jump to.
    pub base: Option<Base>,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// Where packets enter a base chain, and what becomes of those that no rule decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// The hook.
    pub hook: Hook,
    /// The order among the chains of a hook: what is lower comes first.
    pub priority: i32,
    /// Its policy is drop.
    pub drops: bool,
}

/// A hook of netfilter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    /// Whatever comes in.
    Prerouting,
    /// What is for this host.
    Input,
    /// What passes through.
    Forward,
    /// What this host sends.
    Output,
    /// Whatever goes out.
    Postrouting,
}

/// A rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Its handle; iptables-legacy has none.
    pub handle: Option<u64>,
    /// Its comment.
    pub comment: Option<String>,
    /// What it does, one after the other, until one ends it.
    pub steps: Vec<Step>,
}

impl Rule {
    /// Whether packets may leave it other than they came. What can't be read and decides nothing is taken for such a rule.
    fn changes_packets(&self) -> bool {
        let decides = self.steps.iter().any(|step| matches!(step, Step::Decide(_)));
        self.steps.iter().any(|step| match step {
            Step::SetMark(_) | Step::ChangeMark { .. } | Step::Change(_) => true,
            Step::Opaque(_) => !decides,
            _ => false,
        })
    }
}

/// The registers: 64 bytes, named by their offset.
pub type Register = u8;

/// One expression of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A field of the packet goes to a register; what the packet doesn't have ends the rule.
    Load {
        /// What.
        field: Field,
        /// How many bytes.
        len: u8,
        /// Where to.
        to: Register,
    },
    /// A constant goes to a register.
    Constant {
        /// What.
        data: Vec<u8>,
        /// Where to.
        to: Register,
    },
    /// `to = from & mask ^ xor`, byte by byte.
    Bitwise {
        /// Where from.
        from: Register,
        /// Where to.
        to: Register,
        /// As long as the operands.
        mask: Vec<u8>,
        /// The same.
        xor: Vec<u8>,
    },
    /// The bytes of each number turned round.
    SwapBytes {
        /// Where from.
        from: Register,
        /// Where to.
        to: Register,
        /// How many bytes.
        len: u8,
        /// Bytes of one number.
        size: u8,
    },
    /// Ends the rule unless the comparison holds.
    Compare {
        /// What is compared.
        register: Register,
        /// How.
        how: Comparison,
        /// With what.
        with: Vec<u8>,
    },
    /// Ends the rule unless it lies between both, or beyond them.
    Range {
        /// What is compared.
        register: Register,
        /// The smallest.
        low: Vec<u8>,
        /// The largest.
        high: Vec<u8>,
        /// Whether it must lie outside.
        inverted: bool,
    },
    /// Ends the rule unless it is in the set. A map's value goes to a register, or is the rule's verdict.
    Lookup {
        /// The key.
        register: Register,
        /// The set's name.
        set: String,
        /// Whether it must not be in the set.
        inverted: bool,
        /// Where a map's value goes.
        to: Destination,
    },
    /// Ends the rule unless a match of iptables holds.
    Test {
        /// The match.
        test: Test,
        /// Whether it must not hold.
        inverted: bool,
    },
    /// Ends the rule or doesn't: a match that can't be read, in the words of its tool.
    Opaque(String),
    /// The packet's mark becomes what is in a register.
    SetMark(Register),
    /// `mark = mark & !clear ^ xor`.
    ChangeMark {
        /// Bits that are cleared.
        clear: u32,
        /// Bits that are turned.
        xor: u32,
    },
    /// The packet, or how it is queued, becomes another than rules look at. The words are those of its tool.
    Change(String),
    /// No connection is remembered for the packet.
    Notrack,
    /// Ends the rule with a decision.
    Decide(Decision),
}

/// Where the value of a map goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Nowhere: it is a set.
    Nowhere,
    /// To a register.
    Register(Register),
    /// It decides.
    Verdict,
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It has passed this base chain.
    Accept,
    /// It ends here. The words tell how: `drop`, `reject`.
    Drop(&'static str),
    /// It goes on behind the rule that led here.
    Return,
    /// It goes to a chain, and comes back.
    Jump(String),
    /// It goes to a chain, and does not come back.
    Goto(String),
    /// Somebody outside the rules decides (a queue, a proxy).
    Elsewhere(String),
    /// The next rule.
    Continue,
}

/// How two values are compared, as numbers whose first byte counts most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// Equal.
    Equal,
    /// Not equal.
    Different,
    /// Less.
    Less,
    /// Less or equal.
    LessOrEqual,
    /// Greater.
    Greater,
    /// Greater or equal.
    GreaterOrEqual,
}

/// Something that can be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field {
    /// From the IP header on.
    Network {
        /// The first byte.
        offset: u32,
    },
    /// From the header of TCP or UDP on.
    Transport {
        /// The first byte.
        offset: u32,
    },
    /// Whether an extension header of IPv6 is there.
    ExtensionHeader {
        /// Its number.
        kind: u8,
        /// Whether its presence is asked for, not its content.
        presence: bool,
    },
    /// `meta protocol`.
    EtherType,
    /// `meta nfproto`.
    NetworkFamily,
    /// `meta l4proto`.
    Protocol,
    /// `meta mark`.
    Mark,
    /// `meta iif`.
    InIndex,
    /// `meta oif`.
    OutIndex,
    /// `meta iifname`.
    InName,
    /// `meta oifname`.
    OutName,
    /// `meta iiftype`.
    InType,
    /// `meta oiftype`.
    OutType,
    /// `meta iifkind`.
    InKind,
    /// `meta oifkind`.
    OutKind,
    /// `meta pkttype`.
    PacketType,
    /// `meta skuid` and `meta skgid`.
    SocketOwner,
    /// `ct state`.
    ConnectionState,
    /// `ct direction`.
    ConnectionDirection,
    /// `ct status`.
    ConnectionStatus,
    /// `ct mark`.
    ConnectionMark,
    /// `ct helper`.
    ConnectionHelper,
    /// `fib … type`.
    AddressType {
        /// Whether the source is asked about, not the target.
        source: bool,
    },
    /// `fib saddr . iif oif`: whether the source is reached by the interface that the packet came in by.
    ReversePath {
        /// Whether only that is asked for, not by which interface.
        presence: bool,
        /// Whether the interface's name is asked for, not its index.
        name: bool,
    },
    /// Anything else, in the words of `nft`.
    Other(String),
}

/// One end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Where it comes from.
    Source,
    /// Where it goes to.
    Target,
}

/// A match of iptables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Test {
    /// `-s`, `-d`.
    Address {
        /// Which.
        end: End,
        /// The address.
        address: Vec<u8>,
        /// The bits that count.
        mask: Vec<u8>,
    },
    /// `-m iprange`.
    AddressRange {
        /// Which.
        end: End,
        /// The smallest.
        low: Vec<u8>,
        /// The largest.
        high: Vec<u8>,
    },
    /// `-i`, `-o`.
    Interface {
        /// Where it comes in, or goes out.
        end: End,
        /// The name, filled up with zeros.
        name: Vec<u8>,
        /// The bytes that count.
        mask: Vec<u8>,
    },
    /// `-p`.
    Protocol(u8),
    /// `-f`: behind the first part of what was cut into pieces.
    Fragment,
    /// Ports of TCP or UDP.
    Ports {
        /// Which end.
        end: End,
        /// First and last of each range.
        ranges: Vec<(u16, u16)>,
    },
    /// `-m multiport --ports`: either end.
    AnyPort(Vec<(u16, u16)>),
    /// `-m conntrack --ctstate`, `-m state`.
    State {
        /// The states, as bits of [`fields::state`].
        states: u32,
        /// With a destination that was translated as well (`DNAT`), or a source (`SNAT`).
        translated: bool,
    },
    /// `-m mark`.
    Mark {
        /// The value.
        mark: u32,
        /// The bits that count.
        mask: u32,
    },
    /// `-m addrtype`: bit 1 is unicast, 2 local (`1 << RTN_*`).
    AddressType {
        /// Which end.
        end: End,
        /// The types.
        types: u16,
    },
    /// `-m pkttype`.
    PacketType(u32),
    /// `-m rpfilter`: the source is reached by the interface that it came in by.
    ReversePath,
    /// Holds always (`-m comment`).
    Always,
}

/// A set or a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// Its elements, in their order; of a set without ranges each is a range of one.
    pub elements: Vec<Element>,
    /// What stands for all that no other element covers.
    pub catch_all: Option<Element>,
    /// Bytes of each field of the key, where ranges are of several fields: each is compared by itself. Empty otherwise.
    pub fields: Vec<u8>,
    /// Packets add to it and time takes away from it, without a word: what is not in it may be, a moment later.
    pub dynamic: bool,
}

/// One element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// The smallest key.
    pub low: Vec<u8>,
    /// The largest.
    pub high: Vec<u8>,
    /// What the map has for it.
    pub value: Option<Value>,
}

/// The value of a map's element.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Bytes.
    Data(Vec<u8>),
    /// A decision.
    Decision(Decision),
}
