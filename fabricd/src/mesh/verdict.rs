//! [`verdict`]: the cause, by the evidence. Pure: every situation is put before it in a test.

use std::net::IpAddr;

use super::PORT;

/// Why a peer isn't reached, or not fully.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// Not probed yet, or not often enough.
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
    /// Its packets arrive here, ours don't arrive there.
    Asymmetric,
}

impl Cause {
    /// All of them, in the order of the API.
    pub const ALL: [Self; 11] = [
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
        }
    }

    /// Whether packets of pods are lost by it.
    #[must_use]
    pub fn hurts(self) -> bool {
        !matches!(self, Self::Unknown | Self::Fine | Self::NoDaemon)
    }
}

/// What a round of probes showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Nothing came back, three times.
    Nothing(Evidence),
}

/// What was looked at when nothing came back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// A packet without a checksum was answered.
    pub unsummed: bool,
    /// Which pings were; `None` when we may not ping.
    pub echoes: Option<super::echo::Echoes>,
    /// Its host answers in the underlay.
    pub host_alive: bool,
    /// Its own probes have come lately.
    pub heard: bool,
    /// … and it said that its filter throws packets of other nodes away.
    pub it_drops: bool,
    /// Packets of other nodes that our filter threw away meanwhile.
    pub dropped: u64,
}

impl Seen {
    /// What it amounts to.
    #[must_use]
    pub fn cause(&self) -> Cause {
        let evidence = match self {
            Self::Both => return Cause::Fine,
            Self::KernelBoth => return Cause::NoDaemon,
            Self::SmallOnly { .. } => return Cause::MtuBlackHole,
            Self::Nothing(evidence) => evidence,
        };
        let echoes = evidence.echoes.unwrap_or_default();
        match evidence {
            _ if evidence.dropped > 0 => Cause::OwnFilter,
            _ if evidence.unsummed => Cause::ChecksumOffload,
            _ if echoes.kernel => Cause::NoDaemon,
            _ if echoes.wrapped => Cause::StaleFdb,
            _ if echoes.broadcast => Cause::StaleMac,
            _ if evidence.heard => Cause::Asymmetric,
            _ if evidence.host_alive => Cause::PortBlocked,
            _ => Cause::PeerDown,
        }
    }
}

/// A cause, the evidence in a sentence, and what to do about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The cause.
    pub cause: Cause,
    /// What was seen.
    pub evidence: String,
    /// What to do.
    pub fix: String,
}

/// The verdict on the way to the VTEP at `overlay` of the host `public_ip`; `port` is VXLAN's.
#[must_use]
pub fn verdict(seen: &Seen, overlay: IpAddr, public_ip: IpAddr, port: u16) -> Verdict {
    let (evidence, fix) = match seen {
        Seen::Both => (String::new(), String::new()),
        Seen::KernelBoth => (
            "the tunnel is fine; its kernel answers, no fabricd does: no answer is expected of a flannel node".into(),
            "if it should run fabricd: is it running there? systemctl status fabricd".into(),
        ),
        Seen::SmallOnly { largest, full } => (
            format!("packets of {largest} bytes come through, those of {full} don't"),
            format!(
                "raise the underlay's MTU by {} bytes on the way, or lower Backend.MTU by as much: fabricctl network \
                 init --force --mtu …",
                full.saturating_sub(*largest)
            ),
        ),
        Seen::Nothing(evidence) => silence(seen.cause(), evidence, overlay, public_ip, port),
    };
    Verdict { cause: seen.cause(), evidence, fix }
}

/// What is said of a peer that doesn't answer: the evidence, and what to do.
fn silence(cause: Cause, evidence: &Evidence, overlay: IpAddr, public_ip: IpAddr, port: u16) -> (String, String) {
    match cause {
        Cause::OwnFilter => (
            format!("our packet filter threw {} encapsulated packets away while it was probed", evidence.dropped),
            format!(
                "it sends from another address than {public_ip}: publish that one there with --public-ip, or allow it \
                 here with --allow-sender; see where from: tcpdump -ni any udp port {port}"
            ),
        ),
        Cause::ChecksumOffload => (
            "UDP without a checksum comes through, with one it doesn't: a network card or kernel breaks them".into(),
            "on both nodes, for the underlay interface and the VXLAN device: ethtool -K DEV tx-checksum-ip-generic off"
                .into(),
        ),
        Cause::NoDaemon => (
            "pings come through the tunnel, probes are not answered: its fabricd hangs, or its host filters them"
                .into(),
            format!("there: systemctl status fabricd; let UDP port {PORT} in on its VXLAN device"),
        ),
        Cause::StaleFdb => (
            "a packet wrapped as its lease says is answered, what our kernel sends isn't: a stale or foreign entry"
                .into(),
            format!("fabricctl plan; who leads it astray: ip route get {overlay}; ip rule; bridge fdb show"),
        ),
        Cause::StaleMac => (
            "its VTEP answers to every MAC address, but not to the one in its lease: it has another one".into(),
            "there: restart fabricd, or set the address of its lease with: ip link set DEV address MAC; keep udev off \
             the device (MACAddressPolicy=none)"
                .into(),
        ),
        Cause::Asymmetric => {
            let why = if evidence.it_drops { ": its packet filter drops what it doesn't know" } else { "" };
            (
                format!("its packets arrive here, ours don't arrive there{why}"),
                format!(
                    "there: fabricctl mesh, and nft list table inet fabric; on the way: UDP port {port} from this node \
                     to {public_ip} is blocked in one direction"
                ),
            )
        }
        Cause::PortBlocked => {
            let doubt = if evidence.echoes.is_none() { ", or its MAC address is stale" } else { "" };
            (
                format!("{public_ip} answers, but nothing comes through the tunnel{doubt}"),
                format!(
                    "let UDP port {port} through between the nodes (firewall, security group, hypervisor), or choose \
                     another: fabricctl network init --force --port …"
                ),
            )
        }
        Cause::PeerDown | Cause::Unknown | Cause::Fine | Cause::MtuBlackHole => (
            format!("nothing answers, neither in the tunnel nor at {public_ip}"),
            "is the node up, and has it another address now? If it is gone for good: fabricctl lease release NODE"
                .into(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::echo::Echoes;

    #[test]
    fn every_situation_has_its_cause_and_every_cause_but_fine_a_fix() {
        let [overlay, public_ip] = ["10.244.2.0", "192.0.2.2"].map(|ip| ip.parse().unwrap());
        let echoes = |kernel, wrapped, broadcast| Some(Echoes { kernel, wrapped, broadcast });
        let nothing = |change: fn(&mut Evidence)| {
            let mut evidence = Evidence { echoes: Some(Echoes::default()), ..Evidence::default() };
            change(&mut evidence);
            Seen::Nothing(evidence)
        };
        let pinged = |echoes| Seen::Nothing(Evidence { echoes, heard: true, host_alive: true, ..Evidence::default() });
        for (seen, cause) in [
            (Seen::Both, Cause::Fine),
            (Seen::KernelBoth, Cause::NoDaemon),
            (Seen::SmallOnly { largest: 1300, full: 1450 }, Cause::MtuBlackHole),
            (nothing(|_| {}), Cause::PeerDown),
            (nothing(|e| e.host_alive = true), Cause::PortBlocked),
            (nothing(|e| (e.host_alive, e.heard) = (true, true)), Cause::Asymmetric),
            (nothing(|e| (e.heard, e.dropped) = (true, 2)), Cause::OwnFilter),
            (nothing(|e| (e.unsummed, e.heard) = (true, true)), Cause::ChecksumOffload),
            (pinged(echoes(true, true, true)), Cause::NoDaemon),
            (pinged(echoes(false, true, true)), Cause::StaleFdb),
            (pinged(echoes(false, false, true)), Cause::StaleMac),
        ] {
            let told = verdict(&seen, overlay, public_ip, 8472);
            assert_eq!(told.cause, cause, "{seen:?}");
            assert_eq!(told.fix.is_empty(), cause == Cause::Fine, "{seen:?}");
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
