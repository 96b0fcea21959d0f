//! What a peer is asked in one round, and the evidence when it doesn't answer.

use std::time::Duration;

use tokio::sync::Semaphore;

use super::echo::{Echoes, echoes};
use super::probe::{Answer, Heard, Size, ask, complain, is_alive};
use super::verdict::{Evidence, Seen};
use super::{Mesh, ROUND, Target};
use crate::kernel;

/// How often what was lost is tried again.
const AGAIN: usize = 2;
/// The smallest packet that the search for the path's MTU tries, in bytes: what IPv4 guarantees (RFC 791).
const SMALLEST: u32 = 576;
/// How many peers are looked into at once.
const AT_ONCE: usize = 8;

/// What the rounds share.
#[derive(Debug)]
pub struct Context {
    /// Whose probes have come.
    pub heard: Heard,
    slots: Semaphore,
}

impl Default for Context {
    fn default() -> Self {
        Self { heard: Heard::default(), slots: Semaphore::new(AT_ONCE) }
    }
}

/// One round: the first small probe, the first of full size, and what they and all that followed amount to.
pub async fn examine(to: &Target, context: &Context, mesh: &Mesh) -> (Answer, Answer, Seen) {
    let (from, full) = (to.ours.overlay, Size::Packet(to.ours.mtu));
    let (small, large) = tokio::join!(ask(from, to.overlay, Size::Small), ask(from, to.overlay, full));
    let small_after = again(to, small, Size::Small).await;
    if small_after.rtt().is_none() {
        let slot = context.slots.acquire().await;
        let seen = Seen::Nothing(evidence(to, context, mesh).await);
        drop(slot);
        return (small, large, seen);
    }
    let seen = match (again(to, large, full).await, small_after) {
        (Answer::Nothing, _) => {
            let slot = context.slots.acquire().await;
            let largest = path_mtu(to).await;
            drop(slot);
            Seen::SmallOnly { largest, full: to.ours.mtu }
        }
        (_, Answer::Daemon(_)) => Seen::Both,
        _ => Seen::KernelBoth,
    };
    (small, large, seen)
}

async fn again(to: &Target, mut answer: Answer, size: Size) -> Answer {
    for _ in 0..AGAIN {
        if answer.rtt().is_some() {
            break;
        }
        answer = ask(to.ours.overlay, to.overlay, size).await;
    }
    answer
}

/// The largest packet that is answered, by halving.
async fn path_mtu(to: &Target) -> u32 {
    let (mut fits, mut lost) = (SMALLEST.min(to.ours.mtu), to.ours.mtu);
    while lost - fits > 1 {
        let middle = fits.midpoint(lost);
        match ask(to.ours.overlay, to.overlay, Size::Packet(middle)).await {
            Answer::Nothing => lost = middle,
            _ => fits = middle,
        }
    }
    fits
}

async fn evidence(to: &Target, context: &Context, mesh: &Mesh) -> Evidence {
    let (from, before) = (to.ours.overlay, dropped().await);
    let (unsummed, pings, host_alive) =
        tokio::join!(ask(from, to.overlay, Size::Unsummed), echoes(to), is_alive(to.ours.local, to.public_ip));
    let dropped = dropped().await.saturating_sub(before);
    if dropped > 0 {
        // It hears us, perhaps, and can then tell that it is us who don't listen.
        let _ = complain(from, to.overlay).await;
    }
    let echoes: Option<Echoes> = match pings {
        Ok(echoes) => Some(echoes),
        Err(error) => {
            mesh.limited(format!(
                "stale entries can't be told from a blocked port: cannot ping ({error}); does fabricd have CAP_NET_RAW?"
            ));
            None
        }
    };
    let heard = context.heard.last(to.overlay).filter(|(ago, _)| *ago < recently());
    let (it_drops, heard) = (heard.is_some_and(|(_, dropping)| dropping), heard.is_some());
    Evidence { unsummed: unsummed.rtt().is_some(), echoes, host_alive, heard, it_drops, dropped }
}

/// A peer that is in trouble with us probes us more often than this.
fn recently() -> Duration {
    ROUND * 4
}

/// Packets of other nodes that our filter has thrown away so far.
async fn dropped() -> u64 {
    let counts = tokio::task::spawn_blocking(kernel::drops).await.ok().and_then(Result::ok).unwrap_or_default();
    counts.iter().filter(|drops| drops.chain == "senders").map(|drops| drops.packets).sum()
}
