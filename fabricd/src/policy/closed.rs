//! [`Closed`]: pods whose policies are not applied yet. Each is closed for a moment when it starts, which nobody has to know;
//! one that stays so is told.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fabric_core::attachments::Owner;
use tokio::time::Instant;

/// Longer than an ordinary start: `fabric-cni` waits 5 s at most, where nothing else is configured.
const LATE: Duration = Duration::from_secs(10);

/// Attachments that are closed, and since when.
#[derive(Debug, Default)]
pub(super) struct Closed(BTreeMap<Owner, Instant>);

impl Closed {
    /// These are closed now, and no others. Gives those that have been for too long.
    pub fn are<'a>(&mut self, now: Instant, owners: impl Iterator<Item = &'a Owner>) -> BTreeSet<Owner> {
        self.0 = owners.map(|owner| (owner.clone(), self.0.get(owner).copied().unwrap_or(now))).collect();
        self.0.iter().filter(|(_, since)| now.duration_since(**since) >= LATE).map(|(owner, _)| owner.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_is_told_once_it_is_closed_for_longer_than_a_start_takes() {
        let owner = |container: &str| Owner { network: "n".into(), container: container.into(), ifname: "eth0".into() };
        let (one, other) = (owner("c1"), owner("c2"));
        let (mut closed, begin) = (Closed::default(), Instant::now());
        assert_eq!(closed.are(begin, [&one].into_iter()), [].into());
        assert_eq!(closed.are(begin + LATE, [&one, &other].into_iter()), [one.clone()].into());
        assert_eq!(
            closed.are(begin + LATE, [&other].into_iter()),
            [].into(),
            "the first had its policies applied meanwhile"
        );
        assert_eq!(closed.are(begin + LATE * 2, [&one, &other].into_iter()), [other].into());
    }
}
