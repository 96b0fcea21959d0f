//! What lets the pods' packets through Docker's chain for rules of others (see [`crate::state::docker_user`]).

use super::{Field, Match, Rule, Test, Verdict};
use crate::model::{Family, Subnet};

/// The rules that let through what comes from `network` and what goes to it.
#[must_use]
pub fn rules(family: Family, network: Subnet) -> [Rule; 2] {
    let rule = |field, why| Rule::new([Match::new(field, Test::Within(network))], Verdict::Accept, why);
    [rule(Field::Source(family), "fabricd: from the network"), rule(Field::Target(family), "fabricd: to the network")]
}
