//! What a peer is asked in one round, and the evidence when it doesn't answer.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fabric_core::firewall::Evaluation;
use fabric_core::firewall::packet::Flow;
use fabric_core::firewall::traffic::BlockingChain;
use fabric_core::model::Family;
use futures::future::join_all;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

use super::batch::{self, Question};
use super::probe::{Answer, ReceivedProbes, Reply, Size, ask, complain};
use super::tunnel::{Answered, PortReplies};
use super::verdict::{Evidence, LocalDrop, Seen};
use super::{Key, Mesh, ROUND, Target, routes, tunnel};
use crate::kernel;

/// How often what was lost is tried again.
const AGAIN: usize = 2;
/// The smallest packet that the search for the path's MTU tries, in bytes: what IPv4 guarantees (RFC 791).
const SMALLEST: u32 = 576;
/// How many peers are looked into at once.
const AT_ONCE: usize = 8;
/// How many more probes tell how much is lost, once one was …
const SAMPLES: u32 = 8;
/// … and the time between them.
const APART: Duration = Duration::from_millis(50);
/// A peer that is in trouble with us probes us more often than this.
const RECENTLY: Duration = ROUND.saturating_mul(4);
/// Probes that are sent to see whether our filter drops as many answers …
const COUNTED: u64 = 8;
/// … and how many more it has to drop then than without them: others may send meanwhile, or the peer.
const MORE: u64 = 5;

/// What the rounds share.
#[derive(Debug)]
pub struct Context {
    /// Whose probes have come.
    pub received: ReceivedProbes,
    slots: Semaphore,
}

impl Default for Context {
    fn default() -> Self {
        Self { received: ReceivedProbes::default(), slots: Semaphore::new(AT_ONCE) }
    }
}

/// One round of probes.
#[derive(Clone, Debug)]
pub struct Round {
    /// Who was asked.
    pub target: Target,
    /// When it began.
    pub begun: Instant,
    /// The first small probe.
    pub small: Answer,
    /// The first of full size.
    pub full: Answer,
    /// What they and all that followed amount to.
    pub seen: Seen,
    /// All small ones and those of full size, by their numbers.
    pub samples: Vec<(u32, Answer)>,
}

/// Asks one peer, and counts.
struct Prober<'a> {
    to: &'a Target,
    next: AtomicU32,
    samples: Mutex<Vec<(u32, Answer)>>,
}

impl Prober<'_> {
    fn number(&self) -> u32 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    async fn ask(&self, size: Size) -> Answer {
        let number = self.number();
        let answer = ask(self.to.ours.overlay, self.to.overlay, size, number).await;
        if size == Size::Small || size == Size::Packet(self.to.ours.mtu) {
            self.samples.lock().unwrap_or_else(PoisonError::into_inner).push((number, answer));
        }
        answer
    }

    /// Takes over what was asked in a batch: a small probe and one of full size.
    fn asked(&self, answers: [Answer; 2]) -> (Answer, Answer) {
        let numbered = answers.map(|answer| (self.number(), answer));
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).extend(numbered);
        let [small, full] = answers;
        (small, full)
    }

    async fn again(&self, mut answer: Answer, size: Size) -> Answer {
        for _ in 0..AGAIN {
            if answer.rtt().is_some() {
                break;
            }
            answer = self.ask(size).await;
        }
        answer
    }
}

/// A peer whose turn it is.
#[derive(Clone, Debug)]
pub struct DuePeer {
    /// Who is asked.
    pub target: Target,
    /// The number of its first probe.
    pub first: u32,
    /// Since when it doesn't answer.
    pub failing: Option<Instant>,
}

/// What the first two probes of a round brought back.
#[derive(Clone, Copy, Debug)]
pub struct First {
    /// When the round began.
    pub begun: Instant,
    /// The small one.
    pub small: Answer,
    /// The one of full size.
    pub full: Answer,
}

/// Sends the first probes of peers that have answered so far, and waits for what comes back: one for each, in their order.
pub async fn ask_first(turns: &[(Key, DuePeer)]) -> Vec<First> {
    let begun = Instant::now();
    let mut families: BTreeMap<IpAddr, Vec<usize>> = BTreeMap::new();
    for (place, (_, turn)) in turns.iter().enumerate() {
        families.entry(turn.target.ours.overlay).or_default().push(place);
    }
    let mut firsts = vec![First { begun, small: Answer::Nothing, full: Answer::Nothing }; turns.len()];
    let asked = families.into_iter().map(async |(from, places)| {
        let of = |size: fn(&Target) -> Size, later| {
            let question = |place: &usize| {
                let DuePeer { target, first, .. } = &turns[*place].1;
                Question { to: target.overlay, size: size(target), number: first.wrapping_add(later) }
            };
            places.iter().map(question).collect::<Vec<_>>()
        };
        // From two ports, so that one path of several in the underlay is not taken for the peer.
        let (small, full) = (of(|_| Size::Small, 0), of(|target| Size::Packet(target.ours.mtu), 1));
        let answers = tokio::join!(batch::ask(from, &small), batch::ask(from, &full));
        (places, answers)
    });
    for (places, (small, full)) in join_all(asked).await {
        for (place, (small, full)) in places.into_iter().zip(small.into_iter().zip(full)) {
            firsts[place] = First { begun, small, full };
        }
    }
    firsts
}

/// The whole round of a peer that has answered both; `None` if there is more to be asked.
#[must_use]
pub fn is_well(turn: &DuePeer, first: First) -> Option<Round> {
    let First { begun, small, full } = first;
    (small.rtt().is_some() && full.rtt().is_some()).then(|| Round {
        target: turn.target.clone(),
        begun,
        small,
        full,
        seen: if matches!(small, Answer::Kernel(_)) { Seen::KernelBoth } else { Seen::Both },
        samples: vec![(turn.first, small), (turn.first.wrapping_add(1), full)],
    })
}

/// One round, or the rest of it once its first probes are answered or lost.
pub async fn examine(
    turn: &DuePeer,
    first: Option<First>,
    context: &Context,
    mesh: &Mesh,
    firewall: &Evaluation,
) -> Round {
    let to = &turn.target;
    let prober = Prober { to, next: AtomicU32::new(turn.first), samples: Mutex::default() };
    let full = Size::Packet(to.ours.mtu);
    let begun = first.map_or_else(Instant::now, |first| first.begun);
    let asks = async {
        match first {
            Some(First { small, full, .. }) => prober.asked([small, full]),
            None => tokio::join!(prober.ask(Size::Small), prober.ask(full)),
        }
    };
    let (replies, (small, large, small_after)) = if turn.failing.is_some() {
        // It will be needed.
        let asked = async {
            let (small, large) = asks.await;
            (small, large, prober.again(small, Size::Small).await)
        };
        tokio::join!(tunnel::probe_ports(to), asked)
    } else {
        let (small, large) = asks.await;
        let probes =
            async { if small.rtt().is_none() { tunnel::probe_ports(to).await } else { PortReplies::default() } };
        let (replies, small_after) = tokio::join!(probes, prober.again(small, Size::Small));
        (replies, (small, large, small_after))
    };
    let times = Times { failing: turn.failing.unwrap_or(begun), begun };
    let around = Around { context, mesh, firewall };
    let seen = look(&prober, (small, large, small_after), replies, times, &around).await;
    let mut samples = prober.samples.into_inner().unwrap_or_else(PoisonError::into_inner);
    samples.sort_by_key(|(number, _)| number.wrapping_sub(turn.first));
    Round { target: to.clone(), begun, small, full: large, seen, samples }
}

/// Since when a peer doesn't answer, and when this round began.
#[derive(Clone, Copy)]
struct Times {
    failing: Instant,
    begun: Instant,
}

/// What is known beside the peer itself.
#[derive(Clone, Copy)]
struct Around<'a> {
    context: &'a Context,
    mesh: &'a Mesh,
    /// What the firewalls of others on this node make of encapsulated packets.
    firewall: &'a Evaluation,
}

async fn look(
    prober: &Prober<'_>,
    (small, large, mut small_after): (Answer, Answer, Answer),
    replies: PortReplies,
    times: Times,
    around: &Around<'_>,
) -> Seen {
    let context = around.context;
    if small_after.rtt().is_none() {
        let slot = context.slots.acquire().await;
        let evidence = evidence(prober, replies, times, around).await;
        drop(slot);
        // Whatever it was, it may be over.
        small_after = prober.ask(Size::Small).await;
        if small_after.rtt().is_none() {
            return Seen::Nothing(Box::new(evidence));
        }
    }
    let full = Size::Packet(prober.to.ours.mtu);
    let large_after = prober.again(large, full).await;
    if large_after.rtt().is_none() {
        let slot = context.slots.acquire().await;
        let largest = path_mtu(prober).await;
        drop(slot);
        // It may have gone meanwhile, or lose packets of any size.
        let (small, large) = tokio::join!(prober.ask(Size::Small), prober.ask(full));
        match (prober.again(small, Size::Small).await.rtt(), large.rtt()) {
            (None, _) => return Seen::Nothing(Box::new(gone(prober.to).await)),
            (_, None) => return Seen::SmallOnly { largest, full: prober.to.ours.mtu },
            (_, Some(_)) => {}
        }
    } else if small.rtt().is_none() || large.rtt().is_none() {
        sample(prober).await;
    }
    if matches!(small_after, Answer::Kernel(_)) { Seen::KernelBoth } else { Seen::Both }
}

/// More probes, so that it is soon known how much is lost.
async fn sample(prober: &Prober<'_>) {
    let probes = (0..SAMPLES).map(async |place| {
        sleep(APART * place).await;
        prober.ask(Size::Small).await
    });
    join_all(probes).await;
}

/// The largest packet that is answered, by halving.
async fn path_mtu(prober: &Prober<'_>) -> u32 {
    let (mut fits, mut lost) = (SMALLEST.min(prober.to.ours.mtu), prober.to.ours.mtu);
    while lost - fits > 1 {
        let middle = fits.midpoint(lost);
        match prober.ask(Size::Packet(middle)).await.rtt() {
            None => lost = middle,
            Some(_) => fits = middle,
        }
    }
    fits
}

/// Of one that went while it was looked into.
async fn gone(to: &Target) -> Evidence {
    let PortReplies { host, vxlan } = tunnel::probe_ports(to).await;
    Evidence { any_mac: Some(false), host, vxlan, ..Evidence::default() }
}

async fn evidence(prober: &Prober<'_>, replies: PortReplies, times: Times, around: &Around<'_>) -> Evidence {
    let (Around { context, mesh, firewall }, to) = (*around, prober.to);
    let before = dropped().await;
    let in_the_tunnel = async {
        if replies.is_turned_away() {
            return (false, (Answered { any_mac: Some(false), ..Answered::default() }, None));
        }
        tokio::join!(answers_without_checksum_alone(prober), tunnel::look(to, prober.number()))
    };
    let ((no_checksum, (answered, no_ping)), (overriding, underlay)) = tokio::join!(in_the_tunnel, host_routes(to));
    let mut dropped = dropped().await.saturating_sub(before);
    if dropped > 0 {
        dropped = dropped_of_this_peer(prober).await;
    }
    if dropped > 0 {
        // It hears us, perhaps, and can then tell that it is us who don't listen.
        let _ = complain(to.ours.overlay, to.overlay, prober.number()).await;
    }
    if let Some(error) = no_ping {
        mesh.limited(format!(
            "stale_mac can't be told from port_blocked where the peer's fabricd doesn't answer: this fabricd may not ping \
             ({error}); allow it with: sysctl -w net.ipv4.ping_group_range='0 2147483647'"
        ));
    }
    let mut evidence = Evidence {
        overriding,
        underlay,
        local: if answered.kernel { None } else { in_the_way(firewall, to) }.or_else(|| own_output(prober, replies)),
        no_checksum,
        kernel: answered.kernel,
        by_hand: answered.by_hand,
        any_mac: answered.any_mac,
        host: replies.host,
        vxlan: replies.vxlan,
        received: false,
        it_drops: false,
        dropped,
    };
    // A probe that was on its way when ours began to fail says nothing. Where its host is silent too, only this round counts.
    let recent = Instant::now().checked_sub(RECENTLY).map_or(times.failing, |recent| recent.max(times.failing));
    let after = if evidence.host_alive() { recent } else { times.begun };
    if let Some((_, dropping)) = context.received.last(to.overlay).filter(|(at, _)| *at > after) {
        (evidence.received, evidence.it_drops) = (true, dropping);
    }
    evidence
}

/// Whether packets without a checksum are answered and those with one are not: by turns, so that a peer which has only just
/// begun to answer is not taken for that.
async fn answers_without_checksum_alone(prober: &Prober<'_>) -> bool {
    for _ in 0..2 {
        if prober.ask(Size::NoChecksum).await.rtt().is_none() || prober.ask(Size::Small).await.rtt().is_some() {
            return false;
        }
    }
    true
}

/// What this node's routes and rules say.
async fn host_routes(to: &Target) -> (Vec<routes::Override>, Option<String>) {
    let fib = tokio::task::spawn_blocking(kernel::fib).await.ok().and_then(Result::ok);
    let (overriding, unrouted) = fib.map(|fib| routes::look(&fib, to)).unwrap_or_default();
    (overriding, unrouted.or_else(|| no_carrier(to)))
}

/// Whether the underlay interface has lost its cable.
fn no_carrier(to: &Target) -> Option<String> {
    let dev = &to.ours.underlay;
    let carrier = std::fs::read_to_string(format!("/sys/class/net/{dev}/carrier")).ok()?;
    (carrier.trim() == "0").then(|| format!("this node's {dev} has no carrier"))
}

/// The rule of somebody's firewall on this node that surely drops what the two nodes send each other.
fn in_the_way(firewall: &Evaluation, to: &Target) -> Option<LocalDrop> {
    let concerns = |obstacle: &&BlockingChain| {
        obstacle.is_sure()
            && obstacle.family == Family::of(to.public_ip)
            && (obstacle.peers.is_empty() || obstacle.peers.contains(&to.public_ip))
    };
    let obstacle = firewall.of(&[Flow::Received, Flow::Sent]).find(concerns)?;
    Some(LocalDrop { rule: obstacle.to_string(), remedy: obstacle.remedy.join("; ") })
}

/// What this node sent and its own firewall let nowhere, where no rule was found that does so.
fn own_output(prober: &Prober<'_>, replies: PortReplies) -> Option<LocalDrop> {
    let (to, port) = (prober.to, prober.to.ours.port);
    let not_sent = |(_, answer): &(u32, Answer)| *answer == Answer::NotSent;
    let inside = prober.samples.lock().unwrap_or_else(PoisonError::into_inner).iter().any(not_sent);
    let what: (IpAddr, u16) = match replies.vxlan {
        Reply::NotSent => (to.public_ip, port),
        _ if inside => (to.overlay, super::PORT),
        _ => return None,
    };
    Some(LocalDrop {
        rule: format!("a chain on this node's output hook drops UDP to {} port {}", what.0, what.1),
        remedy: format!("find the rule with: nft list ruleset; and let UDP port {} out to {}", what.1, what.0),
    })
}

/// Packets of other nodes that our filter drops as often as this peer is probed; 0 when they come anyhow, and so are
/// somebody else's.
async fn dropped_of_this_peer(prober: &Prober<'_>) -> u64 {
    let begin = dropped().await;
    sleep(super::PATIENCE).await;
    let quiet = dropped().await;
    join_all((0..COUNTED).map(|_| prober.ask(Size::Small))).await;
    let end = dropped().await;
    let (by_itself, probed) = (quiet.saturating_sub(begin), end.saturating_sub(quiet));
    if probed >= by_itself + MORE { probed - by_itself } else { 0 }
}

/// Packets of other nodes that our filter has thrown away so far.
async fn dropped() -> u64 {
    let counts = tokio::task::spawn_blocking(kernel::drops).await.ok().and_then(Result::ok).unwrap_or_default();
    counts.iter().filter(|drops| drops.chain == "senders").map(|drops| drops.packets).sum()
}
