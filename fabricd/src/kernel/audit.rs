//! What an audit reads anew.
//!
//! The kernel announces every change of the tables of thousands (docs/kernel-state.md names what goes in silence, and by
//! which event that is known). To read them anew is insurance against an announcement that was never made, so they take
//! turns. What is small, or announced to nobody, is read by every audit.

use fabric_core::state::nft::TableKey;

use super::monitor::Table;

/// Read by every audit.
const EACH: [Table; 8] = [
    Table::Links,
    Table::Addresses,
    Table::Sysctls,
    Table::Firewalls,
    Table::Rules(TableKey::Fabric),
    Table::Rules(TableKey::Bridge),
    Table::Rules(TableKey::PolicyBridge),
    Table::Shaping,
];

/// Tables that may hold 100,000 elements. Each is read once in so many audits, which is an hour: every change of them is
/// announced, and there is no cheaper way to see one that was not.
const HOURLY: [TableKey; 2] = [TableKey::Services, TableKey::Policy];
const HOUR: usize = 360;

/// What each audit reads beside that, in turns. No two of these are read by one audit, so that the work of thousands of
/// entries is spread.
pub(super) const TURNS: [&[Table]; 6] = [
    &[Table::Fdb],
    &[Table::Neighbours],
    &[Table::FastPath],
    &[Table::Nexthops],
    &[Table::Routes, Table::HostRoutes],
    &[Table::FastPath],
];

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Turns(usize);

impl Turns {
    /// The tables that the next audit reads.
    pub(super) fn next(&mut self) -> impl Iterator<Item = Table> + use<> {
        let turn = TURNS[self.0 % TURNS.len()];
        let hourly = HOURLY.into_iter().zip(1..).find(|(_, place)| self.0 % HOUR == HOUR - place);
        self.0 = self.0.wrapping_add(1);
        EACH.into_iter().chain(turn.iter().copied()).chain(hourly.map(|(table, _)| Table::Rules(table)))
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
        let hourly = HOURLY.map(Table::Rules);
        assert_eq!(read.union(&hourly.into()).copied().collect::<Vec<_>>(), Table::ALL);
        assert!(hourly.iter().all(|table| !read.contains(table)));
    }

    #[test]
    fn tables_of_services_and_policies_are_read_once_an_hour_and_not_together() {
        let mut turns = Turns::default();
        let large = |table: &Table| HOURLY.map(Table::Rules).contains(table);
        let hour: Vec<Vec<Table>> = (0..HOUR).map(|_| turns.next().filter(large).collect()).collect();
        assert_eq!(hour.concat().len(), 2);
        assert!(hour.iter().all(|audit| audit.len() <= 1));
    }
}
