//! What an audit reads anew.
//!
//! The kernel announces every change of the tables of thousands (docs/kernel-state.md names what goes in silence, and by
//! which event that is known). To read them anew is insurance against an announcement that was never made, so they take
//! turns. What is small, or announced to nobody, is read by every audit.

use super::monitor::Table;

/// Read by every audit.
const EACH: [Table; 5] = [Table::Links, Table::Addresses, Table::Sysctls, Table::Firewalls, Table::Rules];

/// What each audit reads beside that, in turns. No two of these are read by one audit, so that the work of thousands of
/// entries is spread.
pub(super) const TURNS: [&[Table]; 6] =
    [&[Table::Fdb], &[Table::Neighbours], &[], &[Table::Nexthops], &[Table::Routes, Table::HostRoutes], &[]];

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Turns(usize);

impl Turns {
    /// The tables that the next audit reads.
    pub(super) fn next(&mut self) -> impl Iterator<Item = Table> + use<> {
        let turn = TURNS[self.0 % TURNS.len()];
        self.0 = self.0.wrapping_add(1);
        EACH.into_iter().chain(turn.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn six_audits_read_every_table_and_none_reads_two_of_thousands() {
        let mut turns = Turns::default();
        let mut read = BTreeSet::new();
        for _ in TURNS {
            let now: BTreeSet<Table> = turns.next().collect();
            let large = [Table::Fdb, Table::Neighbours, Table::Nexthops, Table::Routes];
            assert!(large.iter().filter(|table| now.contains(table)).count() <= 1, "{now:?}");
            read.extend(now);
        }
        assert_eq!(read, Table::ALL.into());
    }
}
