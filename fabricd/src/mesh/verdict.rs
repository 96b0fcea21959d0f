//! [`Cause`]: why a peer isn't reached, by the [`Evidence`] of one round of probes. Pure: every situation is put before
//! it in a test. What is told of it, and when, is [`confirm`](super::confirm)'s; the text is [`messages`](super::messages)'s.

use super::probe::Reply;
use super::routes::Override;

/// Why a peer isn't reached, or not fully.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// Not probed yet.
    #[default]
    Unknown,
    /// Nothing is wrong.
    Fine,
    /// The tunnel is fine, but no fabricd answers.
    NoDaemon,
    /// The host is reached, its VXLAN port isn't.
    PortBlocked,
    /// Small packets come through, large ones don't.
    MtuBlackHole,
    /// Packets without a checksum come through, those with one don't.
    ChecksumOffload,
    /// The peer's VTEP has another MAC address than it has published.
    StaleMac,
    /// Our kernel doesn't send as the lease says.
    StaleFdb,
    /// Our own packet filter throws its packets away.
    OwnFilter,
    /// Nothing answers, in the tunnel or outside of it.
    PeerDown,
    /// One-way: we receive from it, and don't reach it.
    Asymmetric,
    /// It isn't reached, and the cause has not been confirmed.
    UnknownYet,
    /// It is reached, and many packets are lost.
    Lossy,
    /// A route or policy rule of somebody else leads packets for it elsewhere.
    RouteOverride,
    /// A firewall rule of this very node drops the packets.
    LocalFirewall,
    /// Its host answers that nobody listens at the VXLAN port.
    PortClosed,
    /// This node itself has no way into the underlay.
    UnderlayDown,
}

impl Cause {
    /// All of them, in the order of the page's letters.
    pub const ALL: [Self; 17] = [
        Self::Unknown,
        Self::Fine,
        Self::NoDaemon,
        Self::PortBlocked,
        Self::MtuBlackHole,
        Self::ChecksumOffload,
        Self::StaleMac,
        Self::StaleFdb,
        Self::OwnFilter,
        Self::PeerDown,
        Self::Asymmetric,
        Self::UnknownYet,
        Self::Lossy,
        Self::RouteOverride,
        Self::LocalFirewall,
        Self::PortClosed,
        Self::UnderlayDown,
    ];

    /// A word for it: metrics and the page use it too.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Fine => "fine",
            Self::NoDaemon => "no_daemon",
            Self::PortBlocked => "port_blocked",
            Self::MtuBlackHole => "mtu_black_hole",
            Self::ChecksumOffload => "checksum_offload",
            Self::StaleMac => "stale_mac",
            Self::StaleFdb => "stale_fdb",
            Self::OwnFilter => "own_filter",
            Self::PeerDown => "peer_down",
            Self::Asymmetric => "asymmetric",
            Self::UnknownYet => "unknown_yet",
            Self::Lossy => "lossy",
            Self::RouteOverride => "route_override",
            Self::LocalFirewall => "local_firewall",
            Self::PortClosed => "port_closed",
            Self::UnderlayDown => "underlay_down",
        }
    }

    /// Whether packets of pods are lost by it.
    #[must_use]
    pub fn hurts(self) -> bool {
        !matches!(self, Self::Unknown | Self::Fine | Self::NoDaemon)
    }

    /// Whether one round shows it beyond doubt: an answer came, or this node's own kernel says so.
    #[must_use]
    pub fn is_certain(self) -> bool {
        matches!(
            self,
            Self::Fine | Self::NoDaemon | Self::Lossy | Self::RouteOverride | Self::LocalFirewall | Self::UnderlayDown
        )
    }

    /// Whether it accuses what lies between the nodes, or the peer's settings. A peer that has only just got its lease,
    /// and doesn't let us in yet, looks the same.
    #[must_use]
    pub fn accuses(self) -> bool {
        matches!(
            self,
            Self::PortBlocked
                | Self::ChecksumOffload
                | Self::StaleMac
                | Self::StaleFdb
                | Self::OwnFilter
                | Self::Asymmetric
        )
    }
}

/// What a round of probes showed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The daemon of the peer answered small and large packets.
    Both,
    /// Its kernel answered both: nobody listens there.
    KernelBoth,
    /// Small packets only. `largest` is the largest that was answered, `full` what should have been.
    SmallOnly {
        /// In bytes.
        largest: u32,
        /// In bytes.
        full: u32,
    },
    /// Nothing came back, however often it was tried.
    Nothing(Box<Evidence>),
}

/// What was looked at when nothing came back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// What leads packets for the peer elsewhere, on this node.
    pub overriding: Vec<Override>,
    /// Why this node can't send into the underlay at all.
    pub underlay: Option<String>,
    /// What of this node's own firewall drops them.
    pub local: Option<LocalDrop>,
    /// Packets without a checksum were answered, twice, and those with one between them were not.
    pub no_checksum: bool,
    /// Its kernel answered through the tunnel.
    pub kernel: bool,
    /// A packet that was encapsulated by hand, per its lease, was answered.
    pub by_hand: bool,
    /// One to every MAC address was; `None` when that can't be tried.
    pub any_mac: Option<bool>,
    /// What its host said of a port in the underlay at which nobody listens.
    pub host: Reply,
    /// What its host said of the VXLAN port.
    pub vxlan: Reply,
    /// Its own probes have come since ours are not answered.
    pub received: bool,
    /// … and it said that its filter throws packets of ours away.
    pub it_drops: bool,
    /// Packets of its that our filter threw away, as often as it was probed.
    pub dropped: u64,
}

/// A firewall rule of this node, in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalDrop {
    /// Which one, or where it is.
    pub rule: String,
    /// What lets the packets through.
    pub remedy: String,
}

impl Evidence {
    /// Whether its host is alive: it answered something in the underlay, if only a refusal.
    #[must_use]
    pub fn host_alive(&self) -> bool {
        self.host.is_from_host() || self.vxlan.is_from_host()
    }
}

impl Seen {
    /// What it amounts to, if it is so again.
    #[must_use]
    pub fn cause(&self) -> Cause {
        let evidence = match self {
            Self::Both => return Cause::Fine,
            Self::KernelBoth => return Cause::NoDaemon,
            Self::SmallOnly { .. } => return Cause::MtuBlackHole,
            Self::Nothing(evidence) => evidence,
        };
        // What this node itself says comes first, then what was answered, then what was not.
        match &**evidence {
            e if e.underlay.is_some() => Cause::UnderlayDown,
            e if !e.overriding.is_empty() => Cause::RouteOverride,
            e if e.local.is_some() => Cause::LocalFirewall,
            e if e.no_checksum => Cause::ChecksumOffload,
            e if e.kernel => Cause::NoDaemon,
            e if e.dropped > 0 => Cause::OwnFilter,
            e if e.by_hand => Cause::StaleFdb,
            e if e.any_mac == Some(true) => Cause::StaleMac,
            e if !e.host_alive() && !e.received => Cause::PeerDown,
            e if e.received => Cause::Asymmetric,
            e if matches!(e.vxlan, Reply::Refused) => Cause::PortClosed,
            _ => Cause::PortBlocked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was seen of a peer that doesn't answer.
    fn nothing(change: impl FnOnce(&mut Evidence)) -> Seen {
        let mut evidence = Evidence { any_mac: Some(false), ..Evidence::default() };
        change(&mut evidence);
        Seen::Nothing(Box::new(evidence))
    }

    #[test]
    fn every_situation_has_its_cause() {
        let line = || Override { line: "blackhole 10.244.2.0/26".into(), remedy: "ip route del".into() };
        let rule = || LocalDrop { rule: "inet fw input".into(), remedy: "nft insert rule".into() };
        let rejected = || Reply::Rejected { by: "192.0.2.2".parse().unwrap(), why: "host prohibited" };
        for (seen, cause) in [
            (Seen::Both, Cause::Fine),
            (Seen::KernelBoth, Cause::NoDaemon),
            (Seen::SmallOnly { largest: 1300, full: 1450 }, Cause::MtuBlackHole),
            (nothing(|_| {}), Cause::PeerDown),
            (nothing(|e| e.host = Reply::Refused), Cause::PortBlocked),
            (nothing(|e| e.host = rejected()), Cause::PortBlocked),
            (nothing(|e| (e.host, e.vxlan) = (Reply::Silence, rejected())), Cause::PortBlocked),
            (nothing(|e| (e.host, e.vxlan) = (Reply::Refused, Reply::Refused)), Cause::PortClosed),
            (nothing(|e| (e.host, e.received) = (Reply::Refused, true)), Cause::Asymmetric),
            (nothing(|e| (e.host, e.received) = (Reply::Silence, true)), Cause::Asymmetric),
            (nothing(|e| (e.received, e.dropped) = (true, 4)), Cause::OwnFilter),
            (nothing(|e| (e.no_checksum, e.received) = (true, true)), Cause::ChecksumOffload),
            (nothing(|e| (e.kernel, e.by_hand, e.received) = (true, true, true)), Cause::NoDaemon),
            (nothing(|e| (e.by_hand, e.received) = (true, true)), Cause::StaleFdb),
            (nothing(|e| (e.any_mac, e.received) = (Some(true), true)), Cause::StaleMac),
            (nothing(|e| (e.overriding, e.by_hand) = (vec![line()], true)), Cause::RouteOverride),
            (nothing(|e| (e.local, e.received) = (Some(rule()), true)), Cause::LocalFirewall),
            (nothing(|e| (e.underlay, e.received) = (Some("no route".into()), true)), Cause::UnderlayDown),
        ] {
            assert_eq!(seen.cause(), cause, "{seen:?}");
        }
    }

    #[test]
    fn words_are_those_of_the_api() {
        use fabric_proto::{Word as _, v1::MeshCause};
        for cause in Cause::ALL {
            assert_eq!(crate::api::convert::cause(cause).word(), cause.word());
        }
        assert_eq!(MeshCause::Fine.word(), "fine");
    }
}
