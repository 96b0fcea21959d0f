//! Address blocks as disjoint prefixes: a set of the kernel knows no exceptions, and refuses elements that overlap.

use std::collections::BTreeSet;

use super::model::IpBlock;
use crate::model::{Subnet, from_bits, to_bits};

/// The prefixes that hold exactly the addresses of these blocks, none of them inside another.
#[must_use]
pub fn cover<'a>(blocks: impl IntoIterator<Item = &'a IpBlock>) -> BTreeSet<Subnet> {
    let mut all = BTreeSet::new();
    for block in blocks {
        let except: Vec<Subnet> = block.except.iter().copied().collect();
        subtract(block.cidr, &except, &mut all);
    }
    // Two prefixes are nested or disjoint. In their order, one that holds others comes before them.
    let mut disjoint: BTreeSet<Subnet> = BTreeSet::new();
    for prefix in all {
        if !disjoint.last().is_some_and(|last| last.covers(prefix)) {
            disjoint.insert(prefix);
        }
    }
    disjoint
}

/// Adds what is left of `prefix`.
fn subtract(prefix: Subnet, except: &[Subnet], left: &mut BTreeSet<Subnet>) {
    let inside: Vec<Subnet> = except.iter().copied().filter(|except| except.overlaps(prefix)).collect();
    if inside.is_empty() {
        left.insert(prefix);
    } else if !inside.iter().any(|except| except.covers(prefix)) {
        for half in halves(prefix) {
            subtract(half, &inside, left);
        }
    }
}

fn halves(prefix: Subnet) -> [Subnet; 2] {
    let (family, len) = (prefix.family(), prefix.prefix_len() + 1);
    let middle = to_bits(prefix.base()) | (1 << (family.bits() - len));
    [prefix.base(), from_bits(family, middle)].map(|base| Subnet::holding(base, len).expect("an exception is longer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cidr: &str, except: &[&str]) -> IpBlock {
        let prefix = |text: &str| text.parse::<Subnet>().expect("valid");
        IpBlock { cidr: prefix(cidr), except: except.iter().map(|one| prefix(one)).collect() }
    }

    fn words(blocks: &[IpBlock]) -> Vec<String> {
        cover(blocks).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_excepted_is_left_out_to_the_address() {
        assert_eq!(words(&[block("192.0.2.0/30", &["192.0.2.1/32"])]), ["192.0.2.0/32", "192.0.2.2/31"]);
        assert_eq!(words(&[block("192.0.2.0/24", &["192.0.2.0/24"])]), [""; 0]);
        assert_eq!(words(&[block("2001:db8::/126", &["2001:db8::2/127"])]), ["2001:db8::/127"]);
        assert_eq!(cover(&[block("0.0.0.0/0", &["198.51.100.7/32"])]).len(), 32);
        assert_eq!(cover(&[block("::/0", &["2001:db8::7/128"])]).len(), 128);
    }

    #[test]
    fn address_that_one_block_excepts_and_another_holds_is_in() {
        let blocks = [block("192.0.2.0/24", &["192.0.2.128/25"]), block("192.0.2.200/32", &[])];
        assert_eq!(words(&blocks), ["192.0.2.0/25", "192.0.2.200/32"]);
        assert_eq!(words(&[block("192.0.2.0/24", &[]), block("192.0.2.0/25", &[])]), ["192.0.2.0/24"]);
    }
}
