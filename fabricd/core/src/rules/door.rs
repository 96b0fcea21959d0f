//! Doors: chains in which others expect rules of ours.
//!
//! A chain of somebody else that drops what is forwarded can't be overruled from a table of our own, and tables of others
//! are theirs. But Docker makes a chain in its own for rules of others, calls it first, and never changes it:
//! `DOCKER-USER`. There two rules let the pods' packets through. They are known by their comment.

use super::{Field, Match, Rule, Test, Verdict};
use crate::model::{Family, Subnet};

/// The table of the chain.
pub const TABLE: &str = "filter";
/// The chain.
pub const CHAIN: &str = "DOCKER-USER";
/// How comments of ours begin there.
const OURS: &str = "fabricd: ";

/// A door of one family, and the rules of ours in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Door {
    /// Whose packets it is for.
    pub family: Family,
    /// Handles and comments.
    pub rules: Vec<(u64, String)>,
}

/// What is to be written to a door, in one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DoorChange {
    /// Which.
    pub family: Family,
    /// Handles of rules that go.
    pub removed: Vec<u64>,
    /// Rules that come, at the head.
    pub added: Vec<Rule>,
}

/// Whether a rule is ours, by its comment.
#[must_use]
pub fn is_ours(comment: &str) -> bool {
    comment.starts_with(OURS)
}

/// The family of the table, in the words of `nft`.
#[must_use]
pub const fn table_family(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

impl Door {
    /// The steps to a door that lets through what goes to or comes from `network`; to one without rules of ours where
    /// there is no network. `None` when it is as wanted.
    #[must_use]
    pub fn change(&self, network: Option<Subnet>) -> Option<DoorChange> {
        let rule = |network, field, why| Rule::new([Match::new(field, Test::Within(network))], Verdict::Accept, why);
        let both = |network| {
            let (from, to) = (Field::Source(self.family), Field::Target(self.family));
            [rule(network, from, "fabricd: from the network"), rule(network, to, "fabricd: to the network")]
        };
        let added: Vec<Rule> = network.map(both).into_iter().flatten().collect();
        let mut comments: Vec<&str> = self.rules.iter().map(|(_, comment)| comment.as_str()).collect();
        comments.sort_unstable();
        let wanted: Vec<String> = added.iter().map(Rule::comment).collect();
        (comments != wanted).then(|| DoorChange {
            family: self.family,
            removed: self.rules.iter().map(|(handle, _)| *handle).collect(),
            added,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn door_is_opened_for_the_network_and_left_alone_once_it_is_open() {
        let door = |rules| Door { family: Family::V4, rules };
        let network: Subnet = "10.64.0.0/12".parse().expect("valid");
        let open = door(vec![]).change(Some(network)).expect("it is shut");
        let rules: Vec<String> = open.added.iter().map(ToString::to_string).collect();
        assert_eq!(rules, ["ip saddr 10.64.0.0/12 accept", "ip daddr 10.64.0.0/12 accept"]);

        let there: Vec<_> = open.added.iter().rev().zip(7..).map(|(rule, handle)| (handle, rule.comment())).collect();
        assert!(there.iter().all(|(_, comment)| is_ours(comment)));
        assert_eq!(door(there.clone()).change(Some(network)), None);
        let other = door(there.clone()).change("10.0.0.0/8".parse().ok()).expect("another network");
        assert_eq!((other.removed, other.added.len()), (vec![7, 8], 2));
        let shut = door(there).change(None).expect("it is open");
        assert_eq!((shut.removed, shut.added.len()), (vec![7, 8], 0));
        assert_eq!(door(vec![]).change(None), None);
    }
}
