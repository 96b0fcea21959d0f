//! [`diff`]: the steps from what the kernel has to what it should have, over all sections of [`crate::state`].
//!
//! Every write of every section is an [`Op`]: it names what it writes ([`Op::key`]) and what it builds on
//! ([`Op::needs`]), and belongs to a [`Stage`]. Stages keep packets flowing: data before what looks into it, and what a
//! peer needs from the bottom up; what is no longer wanted goes from the top down, after that. When a step fails only
//! those that build on it wait: see [`Gate`]. The writers of a stage know no order.

pub mod docker_user;
pub mod fast_path;
pub mod nft;
pub mod routing;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use crate::derived::Dirty;
use crate::model::{Family, IfName, MacAddr, Subnet};
use crate::state::nft::{Name, Section, TableKey};
use crate::state::{Found, NexthopId, State, Sysctl};

/// What happens to one entry of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change<T> {
    /// It is missing.
    Create(T),
    /// It is there with another value. Only what was just seen as ours is replaced.
    Replace {
        /// The value it has.
        was: T,
        /// The value it should have.
        now: T,
    },
    /// It should not be there.
    Delete(T),
}

impl<T> Change<T> {
    /// The value that should be there afterwards.
    #[must_use]
    pub fn wanted(&self) -> Option<&T> {
        match self {
            Self::Create(now) | Self::Replace { now, .. } => Some(now),
            Self::Delete(_) => None,
        }
    }

    /// The value that was there before.
    #[must_use]
    pub fn found(&self) -> Option<&T> {
        match self {
            Self::Create(_) => None,
            Self::Replace { was, .. } | Self::Delete(was) => Some(was),
        }
    }

    /// What is done to it.
    #[must_use]
    pub fn verb(&self) -> Verb {
        match self {
            Self::Create(_) => Verb::Create,
            Self::Replace { .. } => Verb::Replace,
            Self::Delete(_) => Verb::Delete,
        }
    }
}

/// What is done to something in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    /// It was missing.
    Create,
    /// It had another value.
    Replace,
    /// It is not wanted.
    Delete,
}

impl Verb {
    /// As metrics call it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Replace => "replace",
            Self::Delete => "delete",
        }
    }

    /// In front of a line: `+` (made), `~` (changed) or `-` (removed).
    #[must_use]
    pub const fn sign(self) -> char {
        match self {
            Self::Create => '+',
            Self::Replace => '~',
            Self::Delete => '-',
        }
    }
}

/// A table of the kernel, as metrics and events call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableName {
    /// Devices.
    Link,
    /// Addresses of devices.
    Address,
    /// Forwarding database.
    Fdb,
    /// ARP and neighbour discovery.
    Neighbour,
    /// Nexthop objects.
    Nexthop,
    /// Routes.
    Route,
    /// Settings.
    Sysctl,
    /// The packet filter, rules in `DOCKER-USER` included.
    Filter,
    /// Maps, programs and links of the fast path.
    FastPath,
}

impl TableName {
    /// The name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Sysctl => "sysctl",
            Self::Address => "address",
            Self::Fdb => "fdb",
            Self::Neighbour => "neighbour",
            Self::Nexthop => "nexthop",
            Self::Route => "route",
            Self::Filter => "filter",
            Self::FastPath => "fast_path",
        }
    }
}

/// One write to the kernel. Applying it twice does no more than once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// To links, addresses, neighbours, FDB, nexthop objects, routes or settings.
    Routing(routing::Op),
    /// To the packet filter.
    Filter(nft::Op),
    /// To the fast path.
    FastPath(fast_path::Op),
}

impl From<routing::Op> for Op {
    fn from(op: routing::Op) -> Self {
        Self::Routing(op)
    }
}

impl From<fast_path::Op> for Op {
    fn from(op: fast_path::Op) -> Self {
        Self::FastPath(op)
    }
}

impl From<nft::Op> for Op {
    fn from(op: nft::Op) -> Self {
        Self::Filter(op)
    }
}

/// What names something that is written, over all sections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A device.
    Link(IfName),
    /// A setting.
    Sysctl(Sysctl),
    /// An address.
    Address(IfName, Subnet),
    /// An FDB entry.
    Fdb(IfName, MacAddr),
    /// A neighbour.
    Neighbour(IfName, IpAddr),
    /// A nexthop object.
    Nexthop(NexthopId),
    /// A route.
    Route(Subnet),
    /// A table of the packet filter.
    Table(TableKey),
    /// A set, with its elements.
    Set(TableKey, Name),
    /// All chains of a table.
    Chains(TableKey),
    /// Chains and sets of a table that nobody wants any more.
    Removal(TableKey),
    /// The chain that judges who may send encapsulated packets. It is written with all chains of its table.
    SendersChain,
    /// Our rules in Docker's chain for rules of others.
    DockerUser(Family),
    /// A part of the fast path.
    FastPath(fast_path::Part),
}

/// The stages of a plan, in their order. Steps of one stage don't depend on each other, and may go to the kernel together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Programs of the fast path are detached: packets take the kernel's path, which is still whole.
    FastLinkGoes,
    /// Addresses of pods go from the fast path, before anything else of theirs does.
    FastAddressGoes,
    /// Pods go.
    FastPodGoes,
    /// Subnets of peers go from the fast path's index.
    FastIndexGoes,
    /// Sets and their elements: data before the rules that look into them.
    Sets,
    /// Chains of our tables.
    Chains,
    /// Elements of verdict maps, which name chains.
    Verdicts,
    /// Elements that lead to chains and to elements of other sets.
    Entries,
    /// Elements go that nothing leads to any more.
    ElementsGo,
    /// Chains and sets go that nothing leads to any more.
    ChainsGo,
    /// Rules in `DOCKER-USER`.
    DockerUser,
    /// Devices that stand where others of the same name are to be made. The kernel takes along what hangs on them.
    Outgrown,
    /// Devices.
    Link,
    /// Settings.
    Sysctl,
    /// Addresses.
    Address,
    /// FDB entries.
    Fdb,
    /// Neighbours.
    Neighbour,
    /// Nexthop objects.
    Nexthop,
    /// Routes: from here on packets pass.
    Route,
    /// Maps of the fast path, which is built once the kernel's path is there.
    FastMaps,
    /// This node's own end in them.
    FastNode,
    /// Peers in them.
    FastPeer,
    /// The index that names peers.
    FastIndex,
    /// Programs are loaded.
    FastProgram,
    /// Programs are attached.
    FastLink,
    /// Pods, at first only marked in the NAT guard.
    FastPod,
    /// Their addresses.
    FastAddress,
    /// Connections that are translated already are marked.
    FastGuard,
    /// Pods whose packets are taken: from here on they pass fast.
    FastPodTaken,
    /// What nothing wants any more goes last: until then packets may still pass it.
    RouteGoes,
    /// Nexthop objects go.
    NexthopGoes,
    /// Neighbours go.
    NeighbourGoes,
    /// FDB entries go.
    FdbGoes,
    /// Addresses go.
    AddressGoes,
    /// Devices go.
    LinkGoes,
    /// Rules in `DOCKER-USER` go.
    DockerUserGoes,
    /// Tables of the packet filter go: while there is a device, not everybody may send to it.
    TableGoes,
    /// Peers of the fast path go: nothing names them any more.
    FastPeerGoes,
    /// This node's own end goes.
    FastNodeGoes,
    /// Programs go.
    FastProgramGoes,
    /// Maps go.
    FastMapsGo,
}

impl Op {
    /// What this step writes.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::Routing(op) => op.key(),
            Self::Filter(op) => op.key(),
            Self::FastPath(op) => op.key(),
        }
    }

    /// What must be right before this step makes sense.
    #[must_use]
    pub fn needs(&self) -> Vec<Key> {
        match self {
            Self::Routing(op) => op.needs(),
            Self::Filter(op) => op.needs(),
            Self::FastPath(op) => op.needs(),
        }
    }

    /// What the value that was there before still uses: it must stay when this step fails.
    #[must_use]
    pub fn holds(&self) -> Vec<Key> {
        match self {
            Self::Routing(op) => op.holds(),
            Self::Filter(_) => vec![],
            Self::FastPath(op) => op.holds(),
        }
    }

    /// What is written along with [`Op::key`], under a name of its own.
    fn makes(&self) -> Option<Key> {
        match self {
            Self::Routing(_) | Self::FastPath(_) => None,
            Self::Filter(op) => op.makes(),
        }
    }

    /// When it is taken.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match self {
            Self::Routing(op) => op.stage(),
            Self::Filter(op) => op.stage(),
            Self::FastPath(op) => op.stage(),
        }
    }

    /// The table that it writes.
    #[must_use]
    pub fn table(&self) -> TableName {
        match self {
            Self::Routing(op) => op.table(),
            Self::Filter(_) => TableName::Filter,
            Self::FastPath(_) => TableName::FastPath,
        }
    }

    /// What is done there. Of elements that come and go in one step it is a replacement.
    #[must_use]
    pub fn verb(&self) -> Verb {
        match self {
            Self::Routing(op) => op.verb(),
            Self::Filter(op) => op.verb(),
            Self::FastPath(op) => op.verb(),
        }
    }

    /// How many entries it writes in which way: one, but for a step that carries elements of a set or several rules.
    #[must_use]
    pub fn counts(&self) -> [(Verb, usize); 3] {
        match self {
            Self::Filter(op) => op.counts(),
            Self::Routing(_) | Self::FastPath(_) => {
                [Verb::Create, Verb::Replace, Verb::Delete].map(|verb| (verb, usize::from(verb == self.verb())))
            }
        }
    }

    /// True for a step by which something goes.
    #[must_use]
    pub fn is_delete(&self) -> bool {
        self.verb() == Verb::Delete
    }

    /// The same without what may go only because a source of what is wanted is not known; `None` when nothing is left.
    fn without_deletes(self) -> Option<Self> {
        match self {
            Self::Filter(op) => op.without_deletes().map(Self::Filter),
            Self::FastPath(op) => {
                Some(op).filter(|op| op.verb() != Verb::Delete || !op.is_decided_by_leases()).map(Self::FastPath)
            }
            op => Some(op).filter(|op| !op.is_delete()),
        }
    }
}

impl fmt::Display for Op {
    /// The step as a line of iproute2 or `nft` behind its sign; two lines for elements that come and go.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Routing(op) => op.fmt(f),
            Self::Filter(op) => op.fmt(f),
            Self::FastPath(op) => op.fmt(f),
        }
    }
}

/// Steps in the order in which they are to be taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    ops: Vec<Op>,
}

impl Plan {
    fn new(mut ops: Vec<Op>) -> Self {
        ops.sort_by_key(Op::stage);
        Self { ops }
    }

    /// All steps.
    #[must_use]
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// True when nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// The steps stage by stage.
    pub fn stages(&self) -> impl Iterator<Item = &[Op]> {
        self.ops.chunk_by(|a, b| a.stage() == b.stage())
    }

    /// The same, but nothing goes that leases decide on: when they are only remembered, a peer may be newer than that.
    #[must_use]
    pub fn without_deletes(self) -> Self {
        Self { ops: self.ops.into_iter().filter_map(Op::without_deletes).collect() }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ops.iter().try_for_each(|op| writeln!(f, "{op}"))
    }
}

/// The steps from `have` to `want`. Of a section whose source is not known nothing is compared. Over the union of both: what nobody wants any more goes too.
#[must_use]
pub fn diff<'a>(want: impl Into<State<'a>>, have: impl Into<Found<'a>>) -> Plan {
    diff_of(want, have, &Dirty::Everything)
}

/// The same, where of the routing section only these entries can differ. The other sections are compared whole: they find
/// what differs in what they don't share.
#[must_use]
pub fn diff_of<'a>(want: impl Into<State<'a>>, have: impl Into<Found<'a>>, dirty: &Dirty<Key>) -> Plan {
    // All sections by name: one more has to be compared too.
    let State { routing, filter, services, policy, docker_user, fast_path } = want.into();
    let have: Found<'a> = have.into();
    let Found {
        routing: found_routing,
        filter: found_filter,
        docker_user: found_docker_user,
        fast_path: found_fast_path,
    } = &have;
    let few = match dirty {
        Dirty::Everything => None,
        Dirty::Keys(keys) => routing::diff_of(routing, found_routing, keys),
    };
    let of_routing = few.unwrap_or_else(|| routing::diff(routing, found_routing).collect());
    let mut ops: Vec<Op> = of_routing.into_iter().map(Op::Routing).collect();
    let sections = [(Section::Filter, Some(filter)), (Section::Services, services), (Section::Policy, policy)];
    for (section, wanted) in sections {
        let steps = wanted.map(|wanted| nft::diff(section, wanted, found_filter));
        ops.extend(steps.into_iter().flatten().map(Op::Filter));
    }
    ops.extend(docker_user::diff(docker_user, found_docker_user).map(|change| nft::Op::DockerUser(change).into()));
    ops.extend(fast_path::diff(fast_path, found_fast_path).into_iter().map(Op::FastPath));
    Plan::new(ops)
}

/// Decides which steps still make sense after some have failed.
#[derive(Debug, Default)]
pub struct Gate {
    broken: BTreeSet<Key>,
    held: BTreeSet<Key>,
}

impl Gate {
    /// Whether `op` should be taken; an op that is turned away counts as failed.
    ///
    /// # Errors
    /// What it lacks: something that it builds on has failed, or what still uses it could not be changed.
    pub fn admits(&mut self, op: &Op) -> Result<(), Key> {
        let lacks = match op {
            _ if self.broken.is_empty() => None,
            _ => op.needs().into_iter().find(|key| self.broken.contains(key)),
        };
        let is_held = || !self.held.is_empty() && op.is_delete() && self.held.contains(&op.key());
        match lacks.or_else(|| is_held().then(|| op.key())) {
            Some(key) => {
                self.failed(op);
                Err(key)
            }
            None => Ok(()),
        }
    }

    /// Takes note that `op` failed.
    pub fn failed(&mut self, op: &Op) {
        self.broken.insert(op.key());
        self.broken.extend(op.makes());
        self.held.extend(op.holds());
    }
}
