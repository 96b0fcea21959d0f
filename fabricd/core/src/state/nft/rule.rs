//! Rules: steps that are taken one after the other as long as each holds.
//!
//! A step reads fields side by side, as one key, and compares them, looks them up, or does something with them. What a
//! map gives are values that later steps of the same rule read as fields again ([`Field::Value`]). Where all that is kept
//! meanwhile is for the encoder to decide: `kernel/nft/expr.rs`.

use std::borrow::Cow;

use super::{Fields, Name};
use crate::model::{Family, IfName, Subnet, stable_hash};

/// `IPPROTO_UDP`.
pub(crate) const UDP: u32 = 17;

/// What `nft` allows for a comment is 128 bytes, with a zero.
const LONGEST_REASON: usize = 110;

/// A rule: steps, and why it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What is asked and done, in this order. A condition that doesn't hold ends the rule; so does a field that can't be
    /// read: a packet without a port, one without a connection.
    pub steps: Vec<Step>,
    /// Why, in a few words: the rule's comment.
    pub why: Cow<'static, str>,
}

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A condition.
    Match(Match),
    /// What a map says of these fields together: the values [`Field::Value`], counted through all look-ups of the rule. If it
    /// has no such element the rule ends.
    Lookup {
        /// What is looked up.
        key: Vec<Field>,
        /// Where.
        map: Name,
        /// What the map holds.
        data: Fields,
    },
    /// What a verdict map says of these fields together happens to the packet. If it has no such element the rule ends.
    VerdictMap {
        /// What is looked up.
        key: Vec<Field>,
        /// Where.
        map: Name,
    },
    /// An element of a set or map that packets add to.
    Update {
        /// What happens to it.
        how: Update,
        /// The set or map.
        set: Name,
        /// The element's key.
        key: Vec<Field>,
        /// What it leads to in a map. The kernel wants it even to delete it.
        data: Vec<Field>,
        /// Seconds after which it ends.
        timeout: Option<u32>,
    },
    /// The packet is counted.
    Count,
    /// Holds for so many packets in a second, and so many at once.
    Limit {
        /// Packets in a second.
        per_second: u32,
        /// Packets at once, beyond that.
        burst: u32,
    },
    /// The packet is shown to who listens to this group of nflog.
    Log {
        /// The group.
        group: u16,
        /// What it is shown with: 127 bytes at most.
        prefix: Cow<'static, str>,
    },
    /// Its connection's mark gets these bits.
    SetCtMark {
        /// Bits that change.
        mask: u32,
        /// What they are then.
        value: u32,
    },
    /// Its connection gets this label, beside those that it has (0 to 127).
    SetCtLabel(u8),
    /// No connection is remembered for it.
    Notrack,
    /// Its destination becomes this, for the whole connection.
    Dnat {
        /// Of which family the address is.
        family: Family,
        /// The address.
        address: Field,
        /// The port, if it becomes another.
        port: Option<Field>,
    },
    /// It gets the host's address, and a random port.
    Masquerade,
    /// It is thrown away, and its sender told.
    Reject(Reject),
    /// Where it goes on, if it does.
    Verdict(Verdict),
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may pass this chain.
    Accept,
    /// It is thrown away.
    Drop,
    /// It goes back to where the chain was entered.
    Return,
    /// It goes to this chain, and may come back.
    Jump(Name),
    /// It goes to this chain, and doesn't come back to this one.
    Goto(Name),
}

/// What happens to an element of a set that packets add to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// It is added, unless it is there.
    Add,
    /// It is added, or lives on from now.
    Refresh,
    /// It goes. On a map since kernel 5.4, as on a set.
    Delete,
}

/// What the sender of a packet is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reject {
    /// Port unreachable, in the ICMP of its family.
    PortUnreachable,
    /// Administratively prohibited, likewise.
    Prohibited,
    /// A reset; of TCP alone.
    TcpReset,
}

/// A condition on one field of a packet, or on several together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// What is looked at.
    pub fields: Vec<Field>,
    /// What it must be.
    pub test: Test,
}

/// Something that can be read off a packet or its connection, or is made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The interface that it came in by.
    InInterface,
    /// The interface that it leaves by.
    OutInterface,
    /// Its mark.
    Mark,
    /// Its address family, in a table that sees both.
    NetworkFamily,
    /// Its Ethernet type, in a table that sees frames; of a frame with a VLAN tag that behind the tag.
    EtherType,
    /// The Ethernet type that stands behind the addresses of a frame: of one with a VLAN tag that of the tag.
    FrameType,
    /// The Ethernet address that it claims to come from.
    SourceMac,
    /// The address that an ARP message claims.
    ArpSource,
    /// The address that a neighbour advertisement claims (RFC 4861 section 4.4).
    AdvertisedAddress,
    /// TCP, UDP, …: for IPv6 the protocol behind all extension headers.
    Protocol,
    /// Whether it is a fragment of an IPv6 packet.
    Fragment,
    /// Source address.
    Source(Family),
    /// Destination address.
    Target(Family),
    /// Hop limit of an IPv6 packet.
    HopLimit,
    /// Source port.
    SourcePort,
    /// Destination port.
    TargetPort,
    /// Type of an ICMP message.
    IcmpType,
    /// VNI of a VXLAN packet (RFC 7348 section 5: the UDP header, then four bytes of flags).
    Vni,
    /// Ethernet type of the packet inside.
    InnerType,
    /// Source address of the packet inside.
    InnerSource(Family),
    /// The first so many bits of it, and zeros.
    InnerSubnet(Family, u8),
    /// What its source address is to this host (`RTN_*`): see [`LOCAL`].
    SourceType,
    /// What its destination address is to this host.
    TargetType,
    /// The state of its connection, as bits: see [`ct_state`].
    CtState,
    /// Which way it goes in its connection: 0 as the first packet, 1 against it.
    CtDirection,
    /// What its connection has been through, as bits: see [`ct_status`].
    CtStatus,
    /// Its connection's mark.
    CtMark,
    /// Its connection's labels, of which a test sees the first 32.
    CtLabels,
    /// A part of its connection, as the packets of one direction have it. A packet without a connection has none.
    Ct(Direction, CtField),
    /// A number below this one, another for each packet.
    Random(u32),
    /// Numbers below this one by turns.
    Increment(u32),
    /// A number below `slots` that is always the same for one source address, on every host.
    SourceHash {
        /// Of which family the address is.
        family: Family,
        /// How many numbers there are.
        slots: u32,
        /// Another seed gives other numbers.
        seed: u32,
    },
    /// This number, in this machine's byte order.
    Number(u32),
    /// A value that the rule's look-ups have found, counted from 0 through all of them.
    Value(u8),
}

/// `RTN_LOCAL`: an address of this host.
pub const LOCAL: u32 = 2;

/// Bits of [`Field::CtState`] (`NF_CT_STATE_BIT`).
pub mod ct_state {
    /// Fits no connection.
    pub const INVALID: u32 = 1;
    /// Of a connection that was seen in both directions.
    pub const ESTABLISHED: u32 = 2;
    /// Begun by another connection, or an error about one.
    pub const RELATED: u32 = 4;
    /// The first of its connection, as far as is known.
    pub const NEW: u32 = 8;
    /// No connection is remembered for it.
    pub const UNTRACKED: u32 = 64;
}

/// Bits of [`Field::CtStatus`] (`IPS_*`).
pub mod ct_status {
    /// It was answered.
    pub const SEEN_REPLY: u32 = 1 << 1;
    /// It isn't thrown away early.
    pub const ASSURED: u32 = 1 << 2;
    /// It is in the table.
    pub const CONFIRMED: u32 = 1 << 3;
    /// Its source is translated.
    pub const SOURCE_NAT: u32 = 1 << 4;
    /// Its destination is translated.
    pub const DESTINATION_NAT: u32 = 1 << 5;
}

/// A direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// As its first packet went, before any translation.
    Original = 0,
    /// As the answers go, before they are translated back.
    Reply = 1,
}

/// A part of a connection's direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CtField {
    /// Source address.
    Source(Family),
    /// Destination address.
    Target(Family),
    /// Source port.
    SourcePort,
    /// Destination port.
    TargetPort,
}

/// What a field must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Test {
    /// This number.
    Is(u32),
    /// This name.
    Named(IfName),
    /// Any other number.
    IsNot(u32),
    /// A number with all these bits.
    Bits(u32),
    /// A number with one of these bits or more.
    AnyBit(u32),
    /// A number with none of these bits.
    NoBit(u32),
    /// An address of this prefix.
    Within(Subnet),
    /// An address beyond this prefix.
    Outside(Subnet),
    /// In this set, all fields together.
    In(Name),
    /// Not in this set, all fields together.
    NotIn(Name),
}

impl Rule {
    /// A rule that judges packets for which all of this holds.
    #[must_use]
    pub fn new(
        matches: impl IntoIterator<Item = Match>,
        then: impl Into<Step>,
        why: impl Into<Cow<'static, str>>,
    ) -> Self {
        let steps = matches.into_iter().map(Step::Match).chain([then.into()]).collect();
        Self { steps, why: why.into() }
    }

    /// A rule that drops, and counts what it drops.
    #[must_use]
    pub fn drop(matches: impl IntoIterator<Item = Match>, why: impl Into<Cow<'static, str>>) -> Self {
        let then = [Step::Count, Verdict::Drop.into()];
        Self { steps: matches.into_iter().map(Step::Match).chain(then).collect(), why: why.into() }
    }

    /// Its comment in the kernel. The number changes with the rule, and so tells whether the one that is there is this.
    #[must_use]
    pub fn comment(&self) -> String {
        let hash = stable_hash(self.to_string().as_bytes()) >> 32;
        let why = &self.why[..self.why.floor_char_boundary(LONGEST_REASON)];
        format!("{why} [{hash:08x}]")
    }

    /// The chains that it names.
    pub fn jumps(&self) -> impl Iterator<Item = Name> {
        self.steps.iter().filter_map(|step| match step {
            Step::Verdict(verdict) => verdict.chain(),
            _ => None,
        })
    }

    /// The sets and maps that it looks into.
    pub fn sets(&self) -> impl Iterator<Item = Name> {
        self.steps.iter().filter_map(|step| match step {
            Step::Match(Match { test: Test::In(set) | Test::NotIn(set), .. })
            | Step::Lookup { map: set, .. }
            | Step::VerdictMap { map: set, .. }
            | Step::Update { set, .. } => Some(*set),
            _ => None,
        })
    }
}

impl Step {
    /// The fields that it reads.
    pub fn fields(&self) -> impl Iterator<Item = Field> {
        let (one, other, port) = match self {
            Self::Match(Match { fields: key, .. }) | Self::Lookup { key, .. } | Self::VerdictMap { key, .. } => {
                (key.as_slice(), &[][..], None)
            }
            Self::Update { key, data, .. } => (key.as_slice(), data.as_slice(), None),
            Self::Dnat { address, port, .. } => (std::slice::from_ref(address), &[][..], *port),
            _ => (&[][..], &[][..], None),
        };
        one.iter().chain(other).copied().chain(port)
    }
}

impl Match {
    /// A condition on one field.
    #[must_use]
    pub fn new(field: Field, test: Test) -> Self {
        Self { fields: vec![field], test }
    }

    /// A field is this number.
    #[must_use]
    pub fn is(field: Field, number: u32) -> Self {
        Self::new(field, Test::Is(number))
    }

    /// It is a packet of this family.
    #[must_use]
    pub fn family(family: Family) -> Self {
        Self::is(Field::NetworkFamily, nfproto(family))
    }

    /// Together, in this set.
    #[must_use]
    pub fn all_in(fields: &[Field], set: impl Into<Name>) -> Self {
        Self { fields: fields.to_vec(), test: Test::In(set.into()) }
    }

    /// UDP to this port.
    #[must_use]
    pub fn udp_to(port: u16) -> [Self; 2] {
        [Self::is(Field::Protocol, UDP), Self::is(Field::TargetPort, port.into())]
    }
}

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const fn nfproto(family: Family) -> u32 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

impl Verdict {
    /// The chain that it names.
    #[must_use]
    pub fn chain(self) -> Option<Name> {
        match self {
            Self::Jump(chain) | Self::Goto(chain) => Some(chain),
            Self::Accept | Self::Drop | Self::Return => None,
        }
    }

    /// Its number in an element.
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Drop => 0,
            Self::Accept => 1,
            Self::Return => 2,
            Self::Jump(_) => 3,
            Self::Goto(_) => 4,
        }
    }

    /// The verdict of an element's number and chain.
    pub(super) fn of(code: u8, chain: &str) -> Option<Self> {
        let fine = (1..=Name::SIZE).contains(&chain.len()) && !chain.contains('\0');
        let chain = || fine.then(|| Name::new(chain));
        Some(match code {
            0 => Self::Drop,
            1 => Self::Accept,
            2 => Self::Return,
            3 => Self::Jump(chain()?),
            4 => Self::Goto(chain()?),
            _ => return None,
        })
    }
}

impl From<Verdict> for Step {
    fn from(verdict: Verdict) -> Self {
        Self::Verdict(verdict)
    }
}

impl From<Match> for Step {
    fn from(condition: Match) -> Self {
        Self::Match(condition)
    }
}
