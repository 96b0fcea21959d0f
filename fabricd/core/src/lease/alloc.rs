//! [`choose`]: which subnet a node asks for.

use crate::leased_ranges::LeasedRanges;
use crate::model::{Subnet, to_bits};
use crate::network::AddressSpace;

/// A free subnet of `space`: `preferred` when it may be had, else the first free one at or after a place that
/// `seed` picks. With a seed made of the node's name, a node tends to get the same subnet again even when
/// the store was wiped, and nodes that join at once rarely ask for the same one.
///
/// `None` when the space is exhausted.
#[must_use]
pub fn choose(space: &AddressSpace, taken: &LeasedRanges, preferred: Option<Subnet>, seed: u64) -> Option<Subnet> {
    if let Some(subnet) = preferred.filter(|s| space.admits(*s) && taken.leaves(*s)) {
        return Some(subnet);
    }
    let start = u128::from(seed) % space.capacity();
    first_free(space, taken, start..space.capacity()).or_else(|| first_free(space, taken, 0..start))
}

fn first_free(space: &AddressSpace, taken: &LeasedRanges, places: std::ops::Range<u128>) -> Option<Subnet> {
    let host_bits = space.network.family().bits() - space.subnet_len;
    let mut index = places.start;
    while index < places.end {
        let subnet = space.subnet(index)?;
        match taken.blocking(subnet) {
            None => return Some(subnet),
            // On to the first subnet behind what is in the way: the loop turns once for each leased range.
            Some(last) => index = ((to_bits(last) - to_bits(space.min)) >> host_bits) + 1,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::NetworkDocument;
    use proptest::prelude::*;

    fn space(network: &str, len: u8) -> AddressSpace {
        let v6 = network.contains(':');
        let json = if v6 {
            format!(
                r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}","IPv6SubnetLen":{len},"Backend":{{"Type":"vxlan"}}}}"#
            )
        } else {
            format!(r#"{{"Network":"{network}","SubnetLen":{len},"Backend":{{"Type":"vxlan"}}}}"#)
        };
        let document: NetworkDocument = serde_json::from_str(&json).expect("json");
        let spaces = document.validate().expect("valid").spaces;
        *spaces.values().next().expect("one family")
    }

    fn subnet(text: &str) -> Subnet {
        text.parse().expect(text)
    }

    #[test]
    fn preferred_subnet_is_taken_when_it_is_free_and_fits() {
        let space = space("10.244.0.0/16", 24);
        let none = LeasedRanges::default();
        assert_eq!(choose(&space, &none, Some(subnet("10.244.9.0/24")), 0), Some(subnet("10.244.9.0/24")));
        // Not of the right length, the first of the network, outside, or taken: the seed decides.
        let taken = LeasedRanges::new(&space, [subnet("10.244.9.0/24")]);
        for (unfit, taken) in
            [("10.244.9.0/25", &none), ("10.244.0.0/24", &none), ("10.245.9.0/24", &none), ("10.244.9.0/24", &taken)]
        {
            assert_eq!(choose(&space, taken, Some(subnet(unfit)), 0), Some(subnet("10.244.1.0/24")), "{unfit}");
        }
    }

    #[test]
    fn search_wraps_around_and_ends() {
        let space = space("192.0.2.0/24", 26); // three to lease
        let taken = LeasedRanges::new(&space, [subnet("192.0.2.128/26"), subnet("192.0.2.192/26")]);
        assert_eq!(choose(&space, &taken, None, 1), Some(subnet("192.0.2.64/26")));
        let all = LeasedRanges::new(&space, ["192.0.2.64/26", "192.0.2.128/26", "192.0.2.192/26"].map(subnet));
        assert_eq!(choose(&space, &all, None, 1), None);
    }

    #[test]
    fn garbage_that_covers_the_network_takes_nothing() {
        let space = space("10.244.0.0/16", 24);
        let taken =
            LeasedRanges::new(&space, ["10.244.0.0/16", "0.0.0.0/0", "10.244.0.0/17", "10.0.0.0/24"].map(subnet));
        assert_eq!(choose(&space, &taken, None, 4), Some(subnet("10.244.5.0/24")));
    }

    #[test]
    fn huge_space_is_searched_in_one_step_per_lease() {
        let space = space("fd00::/8", 64);
        let first = choose(&space, &LeasedRanges::default(), None, u64::MAX).expect("free");
        let next = choose(&space, &LeasedRanges::new(&space, [first]), None, u64::MAX).expect("free");
        assert_ne!(first, next);
        assert!(space.admits(next));
    }

    proptest! {
        #[test]
        fn no_two_allocations_overlap(v6: bool, seeds in prop::collection::vec(any::<u64>(), 1..40), lens in prop::collection::vec(18_u8..30, 40)) {
            let (network, offset) = if v6 { ("2001:db8::/32", 34) } else { ("10.0.0.0/16", 0) };
            let mut leased: Vec<Subnet> = vec![];
            for (seed, len) in seeds.iter().zip(lens) {
                // Every claim under another SubnetLen, as after a change of the config.
                let space = space(network, len + offset);
                if let Some(got) = choose(&space, &LeasedRanges::new(&space, leased.clone()), None, *seed) {
                    prop_assert!(space.admits(got));
                    prop_assert!(leased.iter().all(|l| !l.overlaps(got)));
                    leased.push(got);
                }
            }
        }
    }
}
