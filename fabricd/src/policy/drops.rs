//! [`DropLog`]: what network policies drop, with the names of pods and policies, for who listens.
//!
//! Rules show packets only while somebody listens, and so many a second; [`DropLog::is_wanted`] tells the loop. Then a
//! thread reads them, names them by the policies that are applied, and tells all who listen. Whoever is slow misses some.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fabric_core::inquiry::unix_millis;
use fabric_core::policy::drops::{DROPS_GROUP, DropCause};
use fabric_core::policy::evaluate::{Cluster, Side, Verdict, Who};
use fabric_core::policy::{Conn, Direction, ObjectName};
use fabric_netlink::is_overrun;
use tokio::sync::{broadcast, watch};
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::{Stream, StreamExt as _};

use super::applied::Applied;
use crate::kernel::nflog::{Nflog, Shown};

/// How many wait for a slow listener.
const WAITING: usize = 256;
/// Bytes of a packet that are looked at: the headers.
const LOOKED_AT: u32 = 128;
/// How long the thread waits for packets before it looks whether anybody listens.
const PATIENCE: Duration = Duration::from_millis(200);

/// What was dropped, and who listens.
#[derive(Clone, Debug)]
pub struct DropLog {
    listeners: watch::Sender<Listeners>,
    coming: broadcast::Sender<DropEvent>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Listeners {
    count: usize,
    /// The kernel can't show packets: nobody is told anything until all have gone.
    refused: bool,
}

/// What a listener hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DropEvent {
    /// A packet was dropped.
    Dropped(Arc<Dropped>),
    /// Some were, and were not seen; how many, if that is known.
    Missed(Option<u64>),
    /// Nothing can be shown, for this reason, with the way out. It is the last.
    Failed(String),
}

/// A packet that was dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// When, in milliseconds since 1970.
    pub unix_millis: i64,
    /// Why.
    pub cause: DropCause,
    /// Where it came from, and where it went to.
    pub packet: Headers,
    /// The pod that it came from, as far as known.
    pub source: Option<ObjectName>,
    /// The pod that it went to.
    pub target: Option<ObjectName>,
    /// What the policies at its ends say now.
    pub reasons: Vec<String>,
}

/// What a packet's headers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub target: IpAddr,
    /// Protocol over IP.
    pub protocol: u8,
    /// Source port; 0 where there is none.
    pub source_port: u16,
    /// Destination port; 0 where there is none.
    pub target_port: u16,
}

impl Default for DropLog {
    fn default() -> Self {
        Self { listeners: watch::Sender::default(), coming: broadcast::channel(WAITING).0 }
    }
}

impl DropLog {
    /// What is dropped from now on, as long as this is held.
    pub fn listen(&self) -> impl Stream<Item = DropEvent> + Send + use<> {
        let told = BroadcastStream::new(self.coming.subscribe());
        self.listeners.send_modify(|listeners| listeners.count += 1);
        let listener = Listener(self.listeners.clone());
        told.map(move |told| {
            let _ = &listener;
            told.unwrap_or_else(|tokio_stream::wrappers::errors::BroadcastStreamRecvError::Lagged(missed)| {
                DropEvent::Missed(Some(missed))
            })
        })
    }

    /// Whether the rules should show what they drop.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.listeners.borrow().is_wanted()
    }

    /// Waits until [`DropLog::is_wanted`] is another than this.
    pub async fn changed(&self, from: bool) {
        // The sending half is ours.
        let _ = self.listeners.subscribe().wait_for(|listeners| listeners.is_wanted() != from).await;
    }

    /// The kernel can't show packets: all who listen are told so.
    pub(super) fn refuse(&self, reason: String) {
        self.listeners.send_modify(|listeners| listeners.refused = true);
        // Nobody may be listening any more.
        let _ = self.coming.send(DropEvent::Failed(reason));
    }

    /// Reads what the rules show, whenever somebody listens. Runs until the task is dropped.
    pub async fn run(self, applied: watch::Receiver<Option<Arc<Applied>>>) {
        loop {
            self.changed(false).await;
            let (log, known) = (self.clone(), applied.clone());
            let read = spawn_blocking(move || log.read(&known)).await;
            if let Err(reason) = read.map_err(|error| error.to_string()).flatten() {
                self.refuse(reason);
            }
        }
    }

    /// Until nobody listens.
    fn read(&self, applied: &watch::Receiver<Option<Arc<Applied>>>) -> Result<(), String> {
        let mut nflog = Nflog::open(DROPS_GROUP, LOOKED_AT).map_err(|error| error.to_string())?;
        while self.is_wanted() {
            match nflog.wait(PATIENCE) {
                Ok(shown) if shown.is_empty() => {}
                Ok(shown) => {
                    let applied = applied.borrow().clone();
                    let now = unix_millis(SystemTime::now());
                    for dropped in named(&shown, applied.as_deref(), now) {
                        let _ = self.coming.send(DropEvent::Dropped(dropped.into()));
                    }
                }
                Err(error) if is_overrun(&error) => drop(self.coming.send(DropEvent::Missed(None))),
                Err(error) => return Err(format!("what is dropped can't be read any more: {error}")),
            }
        }
        Ok(())
    }
}

impl Listeners {
    fn is_wanted(&self) -> bool {
        self.count > 0 && !self.refused
    }
}

/// Somebody who listens, until it is dropped.
struct Listener(watch::Sender<Listeners>);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.send_modify(|listeners| {
            listeners.count -= 1;
            listeners.refused &= listeners.count > 0;
        });
    }
}

/// Packets with the names of pods, and with what policies say.
fn named(shown: &[Shown], applied: Option<&Applied>, now: i64) -> Vec<Dropped> {
    let cluster = applied.map(|applied| Cluster::new(&applied.state));
    let all = shown.iter().filter_map(|shown| {
        let (cause, packet) = (DropCause::of(&shown.prefix)?, Headers::read(&shown.packet)?);
        let pod = |ip| match cluster.as_ref()?.member(ip)?.who {
            Who::Pod(pod) => Some(pod.name.clone()),
            Who::Unknown(name) => Some(name.clone()),
            Who::Other => None,
        };
        let (source, target) = (pod(packet.source), pod(packet.target));
        let reasons = cluster.as_ref().map(|cluster| reasons(cluster, cause, &packet)).unwrap_or_default();
        Some(Dropped { unix_millis: now, cause, packet, source, target, reasons })
    });
    all.collect()
}

/// What the ends that don't allow it say. A connection that was denied since it began may show by its answers.
fn reasons(cluster: &Cluster<'_>, cause: DropCause, packet: &Headers) -> Vec<String> {
    let there = Conn { src: packet.source, dst: packet.target, protocol: packet.protocol, port: packet.target_port };
    let back = Conn { src: packet.target, dst: packet.source, port: packet.source_port, ..there };
    let say = |conn: &Conn| {
        let Verdict { egress, ingress } = cluster.evaluate_here(conn);
        let sides = [(Direction::Egress, egress), (Direction::Ingress, ingress)];
        let no = sides.into_iter().filter(|(_, side): &(_, Side)| !side.is_allowed());
        no.map(|(direction, side)| format!("{direction} {side}")).collect::<Vec<_>>()
    };
    match (say(&there), cause) {
        (reasons, DropCause::NotAnyMore) if reasons.is_empty() => say(&back),
        (reasons, _) => reasons,
    }
}

impl Headers {
    /// Reads them off a packet, which may be cut off.
    #[must_use]
    pub fn read(packet: &[u8]) -> Option<Self> {
        let (source, target, protocol, rest): (IpAddr, IpAddr, u8, &[u8]) = match packet.first()? >> 4 {
            4 => {
                let address = |at: usize| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?).into());
                // Only the first fragment has ports.
                let is_first = u16::from_be_bytes(*packet.get(6..)?.first_chunk()?) & 0x1fff == 0;
                let header = usize::from(packet.first()? & 0xf) * 4;
                let rest = packet.get(header..).filter(|_| is_first).unwrap_or_default();
                (address(12)?, address(16)?, *packet.get(9)?, rest)
            }
            6 => {
                let address = |at: usize| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?).into());
                let (protocol, rest) = behind_extensions(*packet.get(6)?, packet.get(40..)?);
                (address(8)?, address(24)?, protocol, rest)
            }
            _ => return None,
        };
        let port = |at: usize| {
            let bytes = rest.get(at..)?.first_chunk()?;
            matches!(protocol, 6 | 17 | 132).then(|| u16::from_be_bytes(*bytes))
        };
        let (source_port, target_port) = (port(0).unwrap_or(0), port(2).unwrap_or(0));
        Some(Self { source, target, protocol, source_port, target_port })
    }
}

/// The protocol behind the extension headers of IPv6, and what follows (RFC 8200 section 4).
fn behind_extensions(mut next: u8, mut rest: &[u8]) -> (u8, &[u8]) {
    // Hop-by-hop options, routing, destination options; fragment.
    while let (0 | 43 | 60 | 44, Some([after, length, high, low])) = (next, rest.first_chunk::<4>().copied()) {
        let (size, is_first) = match next {
            44 => (8, u16::from_be_bytes([high, low]) >> 3 == 0),
            _ => (usize::from(length) * 8 + 8, true),
        };
        next = after;
        rest = rest.get(size..).filter(|_| is_first).unwrap_or_default();
    }
    (next, rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(source: &str, target: &str, ports: (u16, u16)) -> Headers {
        let (source, target) = (source.parse().expect("valid"), target.parse().expect("valid"));
        Headers { source, target, protocol: 17, source_port: ports.0, target_port: ports.1 }
    }

    /// An IPv4 packet of UDP with options of four bytes.
    fn v4(fragment: u16) -> Vec<u8> {
        let [high, low] = fragment.to_be_bytes();
        let header = [0x46, 0, 0, 28, 0, 0, high, low, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2, 1, 1, 1, 0];
        [&header[..], &[0x30, 0x39, 0, 53]].concat()
    }

    #[test]
    fn ports_are_read_behind_options_and_extension_headers_of_first_fragments_alone() {
        assert_eq!(Headers::read(&v4(0x2000)), Some(headers("192.0.2.1", "198.51.100.2", (12345, 53))));
        assert_eq!(Headers::read(&v4(0x2001)), Some(headers("192.0.2.1", "198.51.100.2", (0, 0))));
        let v6 = |fragment: u8| {
            let mut packet = vec![0x60, 0, 0, 0, 0, 20, 0, 64];
            packet.extend("2001:db8::1".parse::<Ipv6Addr>().expect("valid").octets());
            packet.extend("2001:db8::2".parse::<Ipv6Addr>().expect("valid").octets());
            packet.extend([44, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, fragment, 0, 0, 0, 1, 0x30, 0x39, 0, 53]);
            packet
        };
        assert_eq!(Headers::read(&v6(1)), Some(headers("2001:db8::1", "2001:db8::2", (12345, 53))));
        assert_eq!(Headers::read(&v6(8)), Some(headers("2001:db8::1", "2001:db8::2", (0, 0))));
    }

    #[test]
    fn packets_that_are_cut_off_or_nonsense_are_taken() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..10_000 {
            let mut packet = vec![0; random.usize(0..160)];
            random.fill(&mut packet);
            if let Some(first) = packet.first_mut() {
                *first = *first & 0xf | random.choice([0x40, 0x60, *first & 0xf0]).unwrap_or(0x40);
            }
            let _ = Headers::read(&packet);
        }
    }

    #[tokio::test]
    async fn packets_are_shown_only_while_somebody_listens() {
        let log = DropLog::default();
        assert!(!log.is_wanted());
        let (one, other) = (log.listen(), log.listen());
        log.changed(false).await;
        drop(one);
        assert!(log.is_wanted());
        drop(other);
        log.changed(true).await;
        assert!(!log.is_wanted());
    }

    #[tokio::test]
    async fn who_listens_where_the_kernel_can_not_show_packets_is_told_and_the_next_one_tries_again() {
        let log = DropLog::default();
        let mut told = Box::pin(log.listen());
        log.refuse("why".to_owned());
        assert_eq!(told.next().await, Some(DropEvent::Failed("why".to_owned())));
        assert!(!log.is_wanted());
        drop(told);
        let _again = log.listen();
        assert!(log.is_wanted());
    }
}
