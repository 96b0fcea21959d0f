//! What lets the pods' packets through Docker's chain for rules of others (see [`crate::state::docker_user`]).

use crate::model::{Family, Subnet};
use crate::state::nft::{Field, Match, Rule, Test, Verdict};

/// The rules that let through what comes from `network` and what goes to it.
#[must_use]
pub fn rules(family: Family, network: Subnet) -> [Rule; 2] {
    let rule = |field, why: &'static str| Rule::new([Match::new(field, Test::Within(network))], Verdict::Accept, why);
    [rule(Field::Source(family), "fabricd: from the network"), rule(Field::Target(family), "fabricd: to the network")]
}
