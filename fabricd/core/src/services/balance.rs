//! [`Algorithm`]: how a new connection's endpoint is picked among those that may take it, and [`slots`]: which endpoint each
//! client is hashed to.
//!
//! With `source-hash` the kernel hashes a client's address to one of [`SLOTS`] slots, as Maglev does (Eisenbud et al., NSDI
//! 2016), and each slot leads to an endpoint. Slots are given away by rendezvous hashing (highest random weight; Thaler and
//! Ravishankar, 1998): each endpoint has a weight for each slot, and the heaviest has it. So they depend on the endpoints
//! alone, which are the same on every node, and one that goes leaves its slots to others and moves no other client. Maglev's
//! own way of filling the table spreads slots more evenly, and moves some clients of others with each change.

use std::net::IpAddr;

use super::objects::Metadata;
use crate::model::{mixed, stable_hash, to_bits};

/// How a new connection's endpoint is picked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// Each with the same chance.
    #[default]
    Random,
    /// By turns, counted on each node for each port of a Service.
    RoundRobin,
    /// The same one for a client's address, on every node, for as long as the endpoint is there.
    SourceHash,
}

impl Algorithm {
    /// The annotation of a Service that names it.
    pub const ANNOTATION: &str = "fabric.io/lb-algorithm";

    /// All of them, each with its word in the annotation.
    const WORDS: [(Self, &str); 3] =
        [(Self::Random, "random"), (Self::RoundRobin, "round-robin"), (Self::SourceHash, "source-hash")];

    /// The one that a Service's annotation names, or why that one isn't used.
    pub(super) fn read(metadata: &Metadata, has_affinity: bool) -> Result<Self, String> {
        let said = metadata.annotations.as_ref().and_then(|all| all.get(Self::ANNOTATION));
        let Some(said) = said else { return Ok(Self::Random) };
        match Self::WORDS.iter().find(|(_, word)| *word == said.trim()) {
            None => Err(format!(
                "{said:?} in the annotation {} is none of random, round-robin and source-hash; endpoints are picked at random",
                Self::ANNOTATION
            )),
            Some((Self::RoundRobin | Self::SourceHash, _)) if has_affinity => Err(format!(
                "{said:?} in the annotation {} has no effect beside sessionAffinity ClientIP: a client's first endpoint is \
                 picked at random, and it stays with that one",
                Self::ANNOTATION
            )),
            Some((algorithm, _)) => Ok(*algorithm),
        }
    }

    /// Its word in the annotation.
    #[must_use]
    pub fn word(self) -> &'static str {
        let word = Self::WORDS.into_iter().find(|(algorithm, _)| *algorithm == self);
        word.map_or("random", |(_, word)| word)
    }
}

/// As many slots has a pool that clients are hashed to. A pool of n endpoints gives each of them 1024 / n slots, more or less
/// by the root of that number: of ten endpoints a tenth.
pub const SLOTS: u32 = 1024;

type Socket = (IpAddr, u16);

/// The endpoint of each slot; none without endpoints. The order in which they are given doesn't matter.
#[must_use]
pub fn slots(endpoints: &[Socket]) -> Vec<Socket> {
    let hashed = |socket: &Socket| {
        let (ip, port) = (to_bits(socket.0).to_be_bytes(), socket.1.to_be_bytes());
        (stable_hash(&[&ip[..], &port[..]].concat()), *socket)
    };
    let endpoints: Vec<(u64, Socket)> = endpoints.iter().map(hashed).collect();
    let heaviest = |slot: u32| {
        let weight = |hash: u64| mixed(hash ^ mixed(u64::from(slot) + 1));
        endpoints.iter().map(|(hash, socket)| (weight(*hash), *socket)).max()
    };
    (0..SLOTS).filter_map(heaviest).map(|(_, socket)| socket).collect()
}

/// The endpoints that have a slot, in order: all, unless there are hundreds. The others might as well not be there: with
/// these alone the slots are the same.
#[must_use]
pub fn with_slots(endpoints: &[Socket]) -> Box<[Socket]> {
    let mut all = slots(endpoints);
    all.sort_unstable();
    all.dedup();
    all.into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::btree_set;
    use proptest::prelude::*;

    use super::*;

    fn endpoint(number: u16) -> Socket {
        (IpAddr::from([192, 0, 2, number.to_be_bytes()[1]]), 8000 + number)
    }

    fn endpoints(count: u16) -> Vec<Socket> {
        (0..count).map(endpoint).collect()
    }

    #[test]
    fn without_endpoints_there_is_no_slot_and_one_has_all() {
        assert!(slots(&[]).is_empty());
        assert_eq!(slots(&endpoints(1)), vec![endpoint(0); SLOTS as usize]);
    }

    #[test]
    fn each_endpoint_has_its_share_of_the_slots() {
        for count in [2, 3, 5, 10, 30] {
            let mut shares: BTreeMap<Socket, u32> = BTreeMap::new();
            slots(&endpoints(count)).into_iter().for_each(|socket| *shares.entry(socket).or_default() += 1);
            assert_eq!(shares.len(), usize::from(count));
            // Three times the standard deviation of such a share.
            let (mean, most) =
                (f64::from(SLOTS) / f64::from(count), 3.0 * (f64::from(SLOTS) / f64::from(count)).sqrt());
            assert!(shares.values().all(|share| (f64::from(*share) - mean).abs() < most), "{count}: {shares:?}");
        }
    }

    #[test]
    fn slots_are_the_same_on_every_node_and_in_every_release() {
        let of = |ips: [&str; 3]| slots(&ips.map(|ip| (ip.parse().expect("an address"), 80)))[..8].to_vec();
        let last = |ip: &IpAddr| *ip.to_string().as_bytes().last().expect("a digit") as char;
        let said = |all: Vec<Socket>| all.iter().map(|(ip, _)| last(ip)).collect::<String>();
        assert_eq!(said(of(["192.0.2.1", "192.0.2.2", "192.0.2.3"])), "32111132");
        assert_eq!(said(of(["2001:db8::1", "2001:db8::2", "2001:db8::3"])), "33121231");
    }

    #[test]
    fn of_more_endpoints_than_slots_those_without_one_change_nothing() {
        let all: Vec<Socket> = (0..2000).map(endpoint).collect();
        let some = with_slots(&all);
        assert!(some.len() < SLOTS as usize);
        assert_eq!(slots(&some), slots(&all));
    }

    proptest! {
        #[test]
        fn endpoint_that_goes_moves_only_its_own_clients(
            numbers in btree_set(0..300_u16, 2..40), gone in any::<prop::sample::Index>(), turned in any::<usize>(),
        ) {
            let mut before: Vec<Socket> = numbers.into_iter().map(endpoint).collect();
            let was = slots(&before);
            let turns = turned % before.len();
            before.rotate_left(turns);
            prop_assert_eq!(&slots(&before), &was, "the order doesn't matter");
            let gone = before.remove(gone.index(before.len()));
            for (was, is) in was.into_iter().zip(slots(&before)) {
                prop_assert!(was == is || was == gone, "a client of {:?} was moved to {:?}", was, is);
                prop_assert_ne!(is, gone);
            }
        }
    }
}
