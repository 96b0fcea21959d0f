//! The steps to our rules in `DOCKER-USER`.

use std::fmt;

use super::Verb;
use crate::model::Family;
use crate::state::docker_user::{CHAIN, DockerUser, DockerUserRules, TABLE, table_family};
use crate::state::nft::Rule;

/// What is to be written to the chain of one family, in one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DockerUserChange {
    /// Which.
    pub family: Family,
    /// Handles of rules that go.
    pub removed: Vec<u64>,
    /// Rules that come, at the head.
    pub added: Vec<Rule>,
}

/// The steps to each chain that is there, unless it is as wanted: all of our rules at once.
pub(super) fn diff(want: &DockerUserRules, have: &[DockerUser]) -> impl Iterator<Item = DockerUserChange> {
    have.iter().filter_map(|chain| {
        let added = want.get(&chain.family).cloned().unwrap_or_default();
        let mut wanted: Vec<String> = added.iter().map(Rule::comment).collect();
        let mut comments: Vec<&str> = chain.rules.iter().map(|(_, comment)| comment.as_str()).collect();
        wanted.sort_unstable();
        comments.sort_unstable();
        (comments != wanted).then(|| DockerUserChange {
            family: chain.family,
            removed: chain.rules.iter().map(|(handle, _)| *handle).collect(),
            added,
        })
    })
}

impl fmt::Display for DockerUserChange {
    /// A line for each rule.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chain = format!("{} {TABLE} {CHAIN}", table_family(self.family));
        let removed = self
            .removed
            .iter()
            .map(|handle| format!("{} nft delete rule {chain} handle {handle}", Verb::Delete.sign()));
        let added = self.added.iter().map(|rule| format!("{} nft insert rule {chain} {rule}", Verb::Create.sign()));
        f.write_str(&removed.chain(added).collect::<Vec<_>>().join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Subnet;
    use crate::plan::filter::docker_user::rules;
    use crate::state::docker_user::is_ours;

    #[test]
    fn rules_let_the_network_through_and_are_left_alone_once_they_are_there() {
        let chain = |rules| DockerUser { family: Family::V4, rules };
        let change = |chain: DockerUser, network: Option<Subnet>| {
            let want = network.map(|network| (Family::V4, rules(Family::V4, network).to_vec())).into_iter().collect();
            diff(&want, &[chain]).next()
        };
        let network: Subnet = "10.64.0.0/12".parse().expect("valid");
        let made = change(chain(vec![]), Some(network)).expect("they are missing");
        assert_eq!(
            made.to_string(),
            "+ nft insert rule ip filter DOCKER-USER ip saddr 10.64.0.0/12 accept\n\
             + nft insert rule ip filter DOCKER-USER ip daddr 10.64.0.0/12 accept"
        );

        let there: Vec<_> = made.added.iter().rev().zip(7..).map(|(rule, handle)| (handle, rule.comment())).collect();
        assert!(there.iter().all(|(_, comment)| is_ours(comment)));
        assert_eq!(change(chain(there.clone()), Some(network)), None);
        let other = change(chain(there.clone()), "10.0.0.0/8".parse().ok()).expect("another network");
        assert_eq!((other.removed, other.added.len()), (vec![7, 8], 2));
        let gone = change(chain(there), None).expect("nobody wants them");
        assert_eq!((gone.removed, gone.added.len()), (vec![7, 8], 0));
        assert_eq!(change(chain(vec![]), None), None);
    }
}
