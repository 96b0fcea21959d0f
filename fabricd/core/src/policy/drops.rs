//! What becomes of a packet that policies don't allow: a chain for each cause, which drops it, and shows it before to who
//! listens to a group of nflog, while somebody does.

use std::fmt;

use crate::state::nft::{Chain, Match, Name, Rule, Step, Verdict};

/// The group of nflog that shows what is dropped (`nft … log group 8472`).
pub const DROPS_GROUP: u16 = 8472;
/// How many packets a second are shown of each cause.
pub const SHOWN_PER_SECOND: u32 = 100;

/// Why a packet is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropCause {
    /// Policies isolate a pod, and none of their rules allows the connection.
    NoRule,
    /// A rule of a ClusterNetworkPolicy denies the connection.
    ByRule,
    /// The connection was allowed when it began, and is not any more.
    NotAnyMore,
    /// It belongs to no connection that is known, and one of its ends is isolated.
    NoConnection,
    /// The policies of a pod are not applied yet.
    NotApplied,
}

impl DropCause {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::NoRule, Self::ByRule, Self::NotAnyMore, Self::NoConnection, Self::NotApplied];

    /// The chain that drops for this cause; what nflog calls it, too.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoRule => "drop-no-rule",
            Self::ByRule => "drop-by-rule",
            Self::NotAnyMore => "drop-not-any-more",
            Self::NoConnection => "drop-no-connection",
            Self::NotApplied => "drop-not-applied",
        }
    }

    /// The cause whose chain this is.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cause| cause.name() == name)
    }

    /// The end of a rule that drops for this cause. It counts itself, as the chain is shared.
    pub(super) fn rule(self, matches: impl IntoIterator<Item = Match>, why: impl Into<String>) -> Rule {
        let then = [Step::Count, Verdict::Goto(Name::new(self.name())).into()];
        Rule { steps: matches.into_iter().map(Step::Match).chain(then).collect(), why: why.into().into() }
    }

    /// This chain; it shows the packets if somebody listens.
    pub(super) fn chain(self, is_shown: bool) -> Chain {
        let show = Rule {
            steps: vec![
                Step::Limit { per_second: SHOWN_PER_SECOND, burst: SHOWN_PER_SECOND },
                Step::Log { group: DROPS_GROUP, prefix: self.name().into() },
            ],
            why: "somebody listens".into(),
        };
        let drop = Rule::new([], Verdict::Drop, self.to_string());
        Chain::new(None, is_shown.then_some(show).into_iter().chain([drop]))
    }
}

impl fmt::Display for DropCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoRule => "no rule allows it",
            Self::ByRule => "a rule denies it",
            Self::NotAnyMore => "allowed when it began, and not any more",
            Self::NoConnection => "of no known connection, and policies select a pod",
            Self::NotApplied => "the policies of a pod are not applied yet",
        })
    }
}
