//! The sets and maps of the table `fabric-services`, and their elements.
//!
//! | name (each once with 4, once with 6) | what |
//! |---|---|
//! | `svc4` | ip . protocol . port → service port . pool . class: where connections from inside go, and those from outside too unless `out4` says otherwise |
//! | `out4` | the same for connections from outside, where that differs |
//! | `pool4` | pool . slot → ip . port: endpoints. A pool never changes: other endpoints are another pool |
//! | `pick4`, `outpick4` | class → the chain that draws from a pool: of so many endpoints, by turns, or by the client's hash |
//! | `stick4` | client . service port → ip . port: session affinity, kept by packets |
//! | `live4` | pool . ip . port: the endpoints of pools with session affinity |
//! | `none4` | ip . protocol . port that nobody can serve: rejected |
//! | `hold4`, `shut4` | ip . protocol . port that others could serve, but not here: dropped; `shut4` if it comes from outside |
//! | `vip4` | ClusterIPs: what no rule translates is rejected |
//! | `guard4`, `range4` | ip . protocol . port → service port, and service port . range: who may come from where |
//! | `local4`, `hair4` | endpoints on this node; ip . ip for those that may reach themselves |

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::{Family, Subnet};
use crate::services::model::Protocol;
use crate::state::nft::{Datatype, Element, Field, Fields, Name, Order, Part, SetKind, Table};

/// As many clients are remembered in each family.
const MOST_CLIENTS: u32 = 65_536;

/// A set or map of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Map {
    Services,
    Outside,
    Pools,
    Picks,
    OutsidePicks,
    Clients,
    Live,
    Rejected,
    Held,
    Shut,
    ClusterIps,
    Guarded,
    Ranges,
    Local,
    Hairpin,
}

impl Map {
    pub(super) const ALL: [Self; 15] = [
        Self::Services,
        Self::Outside,
        Self::Pools,
        Self::Picks,
        Self::OutsidePicks,
        Self::Clients,
        Self::Live,
        Self::Rejected,
        Self::Held,
        Self::Shut,
        Self::ClusterIps,
        Self::Guarded,
        Self::Ranges,
        Self::Local,
        Self::Hairpin,
    ];

    pub(super) const fn name(self, family: Family) -> Name {
        let (v4, v6) = match self {
            Self::Services => ("svc4", "svc6"),
            Self::Outside => ("out4", "out6"),
            Self::Pools => ("pool4", "pool6"),
            Self::Picks => ("pick4", "pick6"),
            Self::OutsidePicks => ("outpick4", "outpick6"),
            Self::Clients => ("stick4", "stick6"),
            Self::Live => ("live4", "live6"),
            Self::Rejected => ("none4", "none6"),
            Self::Held => ("hold4", "hold6"),
            Self::Shut => ("shut4", "shut6"),
            Self::ClusterIps => ("vip4", "vip6"),
            Self::Guarded => ("guard4", "guard6"),
            Self::Ranges => ("range4", "range6"),
            Self::Local => ("local4", "local6"),
            Self::Hairpin => ("hair4", "hair6"),
        };
        Name::new(match family {
            Family::V4 => v4,
            Family::V6 => v6,
        })
    }

    pub(super) const fn kind(self, family: Family) -> SetKind {
        use Datatype::{Number, Port, Protocol};
        let ip = match family {
            Family::V4 => Datatype::V4,
            Family::V6 => Datatype::V6,
        };
        match self {
            Self::Services | Self::Outside => SetKind::of(&[ip, Protocol, Port]).to(&[Number, Number, Number]),
            Self::Pools => SetKind::of(&[Number, Number]).to(&[ip, Port]),
            Self::Picks | Self::OutsidePicks => SetKind::of(&[Number]).to_verdicts(),
            Self::Clients => SetKind::of(&[ip, Number]).to(&[ip, Port]).dynamic(MOST_CLIENTS),
            Self::Live => SetKind::of(&[Number, ip, Port]),
            Self::Rejected | Self::Held | Self::Shut => SetKind::of(&[ip, Protocol, Port]),
            Self::ClusterIps | Self::Local => SetKind::of(&[ip]),
            Self::Guarded => SetKind::of(&[ip, Protocol, Port]).to(&[Number]),
            Self::Ranges => SetKind::of(&[Number, ip]).of_ranges(),
            Self::Hairpin => SetKind::of(&[ip, ip]),
        }
    }

    /// Where connections go is known once all else is there: rules, endpoints, and who may not come. An endpoint goes from all
    /// maps once nothing leads to it: a pod that is sent to itself without the gateway's address never gets an answer.
    const fn order(self) -> Order {
        match self {
            Self::Services | Self::Outside => Order::AfterChains,
            Self::Pools | Self::Live | Self::Local | Self::Hairpin => Order::AroundChains,
            _ => Order::BeforeChains,
        }
    }

    /// Adds all of them to a table, empty.
    pub(super) fn declare(table: &mut Table) {
        for family in Family::ALL {
            for map in Self::ALL {
                table.set(map.name(family), map.kind(family), map.order(), []);
            }
        }
    }
}

/// Where a connection is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// The address.
    pub ip: IpAddr,
    /// The protocol.
    pub protocol: Protocol,
    /// The port; 0 for the address as a whole.
    pub port: u16,
}

impl FrontendKey {
    /// An address as a whole.
    pub(super) const fn whole(ip: IpAddr) -> Self {
        Self { ip, protocol: Protocol::Tcp, port: 0 }
    }

    /// Its family.
    #[must_use]
    pub fn family(self) -> Family {
        Family::of(self.ip)
    }

    fn parts(self) -> [Part; 3] {
        [Part::Ip(self.ip), Part::Protocol(self.protocol.number()), Part::Port(self.port)]
    }

    pub(super) fn element(self) -> Element {
        Element::new(self.parts())
    }

    pub(super) fn leads_to(self, target: Target) -> Element {
        let Target { id, pool, class } = target;
        self.element().to([Part::Number(id), Part::Number(pool), Part::Number(class)])
    }

    pub(super) fn guarded_by(self, id: u32) -> Element {
        self.element().to([Part::Number(id)])
    }
}

impl std::fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port {
            0 => self.ip.fmt(f),
            port => write!(f, "{}/{}", std::net::SocketAddr::new(self.ip, port), self.protocol),
        }
    }
}

/// What a frontend leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// The service port, for session affinity.
    pub id: u32,
    /// The endpoints.
    pub pool: u32,
    /// How one is drawn.
    pub class: u32,
}

/// How an endpoint is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Class {
    /// One of so many, at random.
    Random { endpoints: u32 },
    /// The same, and a client stays with it for so many seconds after its last connection.
    Sticky { endpoints: u32, timeout: u32 },
    /// One of so many by turns. Others would take its turns, so each pool has turns of its own.
    Turns { endpoints: u32, pool: u32 },
    /// The one that the client's address is hashed to.
    Hashed,
}

impl Class {
    /// As many endpoints can have affinity: 14 bits.
    pub(super) const MOST_STICKY: usize = (1 << 14) - 1;
    /// Of which numbers those with turns are; behind it is the pool.
    const TURNS: u32 = 1 << 30;
    const HASHED: u32 = 1 << 29;

    /// Its number: the same in every daemon, so that nothing has to be remembered. A timeout takes 17 bits.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Random { endpoints } => endpoints,
            Self::Sticky { endpoints, timeout } => 1 << 31 | timeout << 14 | endpoints,
            Self::Turns { pool, .. } => Self::TURNS | pool,
            Self::Hashed => Self::HASHED,
        }
    }
}

/// What a pool has a slot for, and who may share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Shape {
    /// For each endpoint one; whoever has these endpoints shares it.
    Shared,
    /// For each endpoint one, which have turns; it is of this service port alone.
    OfPort(u32),
    /// For each hash of a client.
    Hashed,
}

impl Target {
    /// Of which shape its pool is.
    pub(super) fn shape(self) -> Shape {
        match self.class {
            Class::HASHED => Shape::Hashed,
            class if class >> 30 == 1 => Shape::OfPort(self.id),
            _ => Shape::Shared,
        }
    }
}

/// Where connections end.
pub type Socket = (IpAddr, u16);

pub(super) fn slot(pool: u32, slot: u32, (ip, port): Socket) -> Element {
    Element::new([Part::Number(pool), Part::Number(slot)]).to([Part::Ip(ip), Part::Port(port)])
}

pub(super) fn live(pool: u32, (ip, port): Socket) -> Element {
    Element::new([Part::Number(pool), Part::Ip(ip), Part::Port(port)])
}

pub(super) fn range(id: u32, range: Subnet) -> Element {
    Element::range(&[Part::Number(id), Part::Net(range)])
}

/// The frontend of an element, and what it leads to.
pub(super) fn frontend(family: Family, element: &Element) -> Option<(FrontendKey, Target)> {
    let (key, data) = element.split(Map::Services.kind(family));
    let (ip, rest) = address(family, key)?;
    let protocol =
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|known| known.number() == rest[0])?;
    let port = u16::from_be_bytes(rest.get(4..6)?.try_into().ok()?);
    let number = |at: usize| Some(u32::from_ne_bytes(data.get(at * 4..at * 4 + 4)?.try_into().ok()?));
    Some((FrontendKey { ip, protocol, port }, Target { id: number(0)?, pool: number(1)?, class: number(2)? }))
}

/// The pool of an element, its slot, and the endpoint.
pub(super) fn endpoint(family: Family, element: &Element) -> Option<(u32, u32, Socket)> {
    let (key, data) = element.split(Map::Pools.kind(family));
    let number = |at: usize| Some(u32::from_ne_bytes(key.get(at..at + 4)?.try_into().ok()?));
    let (ip, port) = address(family, data)?;
    Some((number(0)?, number(4)?, (ip, u16::from_be_bytes(port.get(..2)?.try_into().ok()?))))
}

fn address(family: Family, bytes: &[u8]) -> Option<(IpAddr, &[u8])> {
    Some(match family {
        Family::V4 => bytes.split_first_chunk::<4>().map(|(ip, rest)| (Ipv4Addr::from(*ip).into(), rest))?,
        Family::V6 => bytes.split_first_chunk::<16>().map(|(ip, rest)| (Ipv6Addr::from(*ip).into(), rest))?,
    })
}

/// What the frontends are found by, as a packet has it.
pub(super) const fn frontend_fields(family: Family) -> [Field; 3] {
    [Field::Target(family), Field::Protocol, Field::TargetPort]
}

pub(super) const fn target_fields() -> Fields {
    Fields::of(&[Datatype::Number, Datatype::Number, Datatype::Number])
}

pub(super) const fn socket_fields(family: Family) -> Fields {
    match family {
        Family::V4 => Fields::of(&[Datatype::V4, Datatype::Port]),
        Family::V6 => Fields::of(&[Datatype::V6, Datatype::Port]),
    }
}
