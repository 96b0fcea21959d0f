//! `DOCKER-USER`: a chain of others in which others expect rules of ours.
//!
//! A chain of somebody else that drops what is forwarded can't be overruled from a table of our own, and tables of others
//! are theirs. But Docker makes a chain in its own for rules of others, calls it first, and never changes it. Rules of
//! ours there are known by their comment.

use std::collections::BTreeMap;

use super::nft::Rule;
use crate::model::Family;

/// The table of the chain.
pub const TABLE: &str = "filter";
/// The chain.
pub const CHAIN: &str = "DOCKER-USER";
/// How comments of ours begin there.
const OURS: &str = "fabricd: ";

/// The rules that should be there, by family. In a family that has no such chain there can be none.
pub type DockerUserRules = BTreeMap<Family, Vec<Rule>>;

/// The chain of one family, and the rules of ours in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DockerUser {
    /// Whose packets it is for.
    pub family: Family,
    /// Handles and comments.
    pub rules: Vec<(u64, String)>,
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
