//! [`Repairs`]: what another program changed or deleted of ours, and was written again. Without a trace nobody would find
//! who works against the daemon.
//!
//! A write is a repair when what is desired there has not changed since the node was last in sync: then the kernel has.
//! What a lease, the config or the host's links change is ordinary, and so is what is tried again, and all that a start
//! writes until it is in sync for the first time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::derived::Dirty;
use fabric_core::diff::{Key, Op, TableName, Verb, nft, routing};
use tokio::time::Instant;
use tracing::warn;

use crate::status::view::Repair;

/// How many are remembered for those who follow.
const REMEMBERED: usize = 50;
/// The least time between two events about one table.
const EVENT: Duration = Duration::from_secs(10);
/// The least time between two lines of the log.
const LINE: Duration = Duration::from_secs(60);

/// What has changed in what is desired, by section.
#[derive(Clone, Debug, Default)]
pub struct Causes {
    /// The entries of the routing section of which something else is desired than before.
    pub routing: Dirty<Key>,
    /// True when of the packet filter the same was desired before.
    pub filter_unchanged: bool,
}

/// What was restored, and what makes a write a repair.
#[derive(Debug, Default)]
pub struct Repairs {
    /// True once the node has been in sync.
    settled: bool,
    /// What failed in the last pass: it is tried again, not restored.
    failed: BTreeSet<Key>,
    last: Arc<VecDeque<Repair>>,
    number: u64,
    events: BTreeMap<TableName, Throttle>,
    lines: Throttle,
}

impl Repairs {
    /// The last ones, the newest last.
    #[must_use]
    pub fn last(&self) -> Arc<VecDeque<Repair>> {
        Arc::clone(&self.last)
    }

    /// Whether this write may be a repair at all.
    #[must_use]
    pub fn looks_at(&self, op: &Op, causes: &Causes) -> bool {
        self.settled
            && match op {
                Op::Routing(_) => causes.routing != Dirty::Everything,
                // It comes and goes with what Docker does.
                Op::Filter(nft::Op::DockerUser(_)) => false,
                Op::Filter(_) => causes.filter_unchanged,
                // Which of its steps follow from what came or went isn't known.
                Op::FastPath(_) => false,
            }
    }

    /// Takes note of a pass's writes: `done` are the steps that were taken, `failed` those that were not. Gives how many
    /// were repairs, by table.
    pub fn wrote<'a>(
        &mut self,
        done: impl Iterator<Item = &'a Op>,
        failed: impl Iterator<Item = &'a Op>,
        causes: &Causes,
    ) -> BTreeMap<TableName, u64> {
        let failed: BTreeSet<Key> = failed.map(Op::key).collect();
        let tried = std::mem::replace(&mut self.failed, failed);
        let (mut first, mut filter, mut counts) = (None, vec![], BTreeMap::new());
        for op in done.filter(|op| self.looks_at(op, causes) && !tried.contains(&op.key())) {
            match op {
                Op::Routing(op) if causes.routing.covers(&op.key()) => continue,
                Op::Routing(op) => drop(first.get_or_insert(op)),
                Op::Filter(op) => filter.push(op),
                Op::FastPath(_) => continue,
            }
            *counts.entry(op.table()).or_default() += op.counts().iter().map(|(_, count)| *count as u64).sum::<u64>();
        }
        if let Some(first) = first {
            self.tell(first.table(), &message(first, &counts));
        }
        if !filter.is_empty() {
            self.tell(TableName::Filter, &filter_message(&filter));
        }
        counts
    }

    /// The kernel holds what is desired.
    pub fn in_sync(&mut self) {
        self.settled = true;
    }

    fn tell(&mut self, table: TableName, message: &str) {
        if let Some(held) = self.lines.pass(LINE) {
            warn!(what = message, not_logged_since = held, "restored what another program changed");
        }
        let Some(held) = self.events.entry(table).or_default().pass(EVENT) else { return };
        self.number += 1;
        let more = if held > 0 { format!(" ({held} repairs more since the last event)") } else { String::new() };
        let last = Arc::make_mut(&mut self.last);
        if last.len() == REMEMBERED {
            last.pop_front();
        }
        last.push_back(Repair { number: self.number, message: format!("{message}{more}") });
    }
}

/// Lets one through in a while, and counts the others.
#[derive(Debug, Default)]
struct Throttle {
    closed_until: Option<Instant>,
    held: u64,
}

impl Throttle {
    /// How many were held back since the last that passed; `None` when this one is held back too.
    fn pass(&mut self, every: Duration) -> Option<u64> {
        let now = Instant::now();
        if self.closed_until.is_some_and(|end| now < end) {
            self.held += 1;
            return None;
        }
        self.closed_until = Some(now + every);
        Some(std::mem::take(&mut self.held))
    }
}

/// What was done to the first, and how many others there are: `route 10.244.14.0/24 was deleted by another program,
/// restored; with it 2 more routes`.
fn message(first: &routing::Op, counts: &BTreeMap<TableName, u64>) -> String {
    use routing::Op;
    let object = match first {
        Op::Link(name, _) | Op::Outgrown(name, _) => format!("link {name}"),
        Op::Sysctl(setting, _) => format!("setting net/{}", setting.path()),
        Op::Address(dev, change) => match change.wanted().or(change.found()) {
            Some(address) => format!("address {address} of {dev}"),
            None => format!("address of {dev}"),
        },
        Op::Fdb(dev, mac, _) => format!("FDB entry {mac} of {dev}"),
        Op::Neighbour(dev, ip, _) => format!("neighbour {ip} of {dev}"),
        Op::Nexthop(id, _) => format!("nexthop object {id}"),
        Op::Route(dst, _) => format!("route {dst}"),
    };
    // What has to be made another program has deleted.
    let done = match first.verb() {
        Verb::Create => "deleted by another program, restored",
        Verb::Replace => "changed by another program, restored",
        Verb::Delete => "added by another program, removed",
    };
    let mut text = format!("{object} was {done}");
    let others = counts.iter().filter(|(table, _)| **table != TableName::Filter);
    let others = others.map(|(table, count)| (*table, count - u64::from(*table == first.table())));
    for (position, (table, count)) in others.filter(|(_, count)| *count > 0).enumerate() {
        let _ = write!(text, "{}{count} {}", if position == 0 { "; with it " } else { ", " }, counted(table, count));
    }
    text
}

/// The packet filter is told as a whole: its tables go and come as such.
fn filter_message(ops: &[&nft::Op]) -> String {
    let of = ops.iter().find_map(|op| op.table());
    let table =
        of.map_or_else(|| "the packet filter".to_owned(), |table| format!("table {table} of the packet filter"));
    let was_empty =
        |op: &&nft::Op| matches!(op, nft::Op::Chains(table, change) if Some(*table) == of && change.from_nothing);
    let what = if ops.iter().any(was_empty) { "deleted" } else { "changed" };
    format!("{table} was {what} by another program, restored")
}

fn counted(table: TableName, count: u64) -> &'static str {
    let (one, more) = match table {
        TableName::Link => ("link", "links"),
        TableName::Sysctl => ("setting", "settings"),
        TableName::Address => ("address", "addresses"),
        TableName::Fdb => ("FDB entry", "FDB entries"),
        TableName::Neighbour => ("neighbour", "neighbours"),
        TableName::Nexthop => ("nexthop object", "nexthop objects"),
        TableName::Route => ("route", "routes"),
        TableName::Filter => ("step of the packet filter", "steps of the packet filter"),
        TableName::FastPath => ("step of the fast path", "steps of the fast path"),
    };
    if count == 1 { one } else { more }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_core::diff::Change;
    use fabric_core::diff::nft::ChainsChange;
    use fabric_core::state::nft::TableKey;
    use fabric_core::state::{Sysctl, Via};
    use tokio::time::advance;

    fn route(third: u8) -> Op {
        let via = Change::Create(Via::Other("via nowhere".into()));
        routing::Op::Route(format!("10.244.{third}.0/24").parse().unwrap(), via).into()
    }

    fn neighbour(third: u8) -> Op {
        let (dev, ip) = ("fabric.1".parse().unwrap(), format!("10.244.{third}.0").parse().unwrap());
        routing::Op::Neighbour(dev, ip, Change::Create("02:42:c0:00:02:02".parse().unwrap())).into()
    }

    fn changed(ops: &[Op]) -> Dirty<Key> {
        Dirty::Keys(ops.iter().map(Op::key).collect())
    }

    fn causes(changed: &Dirty<Key>) -> Causes {
        Causes { routing: changed.clone(), filter_unchanged: false }
    }

    fn settled() -> Repairs {
        Repairs { settled: true, ..Repairs::default() }
    }

    fn told(repairs: &Repairs) -> Vec<&str> {
        repairs.last.iter().map(|repair| repair.message.as_str()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_was_in_sync_and_is_still_desired_is_repaired() {
        let wrote = |repairs: &mut Repairs, op: &Op, changed: &Dirty<Key>| {
            !repairs.wrote([op].into_iter(), [].into_iter(), &causes(changed)).is_empty()
        };
        let nothing = Dirty::default();
        let mut start = Repairs::default();
        assert!(!wrote(&mut start, &route(2), &nothing), "a start's first writes");
        start.in_sync();
        assert!(wrote(&mut start, &route(2), &nothing));
        let of_a_lease = changed(&[route(2), neighbour(2)]);
        for (changed, op, repaired) in [
            (&Dirty::Everything, route(2), false),
            (&of_a_lease, route(2), false),
            (&of_a_lease, neighbour(2), false),
            (&of_a_lease, route(3), true),
            (&of_a_lease, neighbour(3), true),
            (&of_a_lease, routing::Op::Sysctl(Sysctl::Ipv4Forward, 1).into(), true),
        ] {
            assert_eq!(wrote(&mut settled(), &op, changed), repaired, "{op} with {changed:?}");
        }
        let mut repairs = settled();
        let failing = repairs.wrote([].into_iter(), [&route(2)].into_iter(), &causes(&of_a_lease));
        assert_eq!(failing, BTreeMap::new());
        assert!(!wrote(&mut repairs, &route(2), &nothing), "tried again");
        assert!(wrote(&mut repairs, &route(2), &nothing), "it had worked");
    }

    #[tokio::test(start_paused = true)]
    async fn first_object_is_named_with_the_number_of_others_and_not_too_often() {
        let mut repairs = settled();
        let ops = [route(2), route(3), neighbour(2), neighbour(3)];
        let counts = repairs.wrote(ops.iter(), [].into_iter(), &causes(&Dirty::default()));
        assert_eq!(counts, [(TableName::Route, 2), (TableName::Neighbour, 2)].into());
        let first = "route 10.244.2.0/24 was deleted by another program, restored; with it 2 neighbours, 1 route";
        assert_eq!(told(&repairs), [first]);
        for _ in 0..3 {
            repairs.wrote([&route(3)].into_iter(), [].into_iter(), &causes(&Dirty::default()));
        }
        assert_eq!(told(&repairs), [first]);
        advance(EVENT).await;
        repairs.wrote([&route(3)].into_iter(), [].into_iter(), &causes(&Dirty::default()));
        let again =
            "route 10.244.3.0/24 was deleted by another program, restored (3 repairs more since the last event)";
        assert_eq!(told(&repairs), [first, again]);
    }

    #[tokio::test(start_paused = true)]
    async fn packet_filter_is_repaired_too() {
        let chains = |from_nothing| -> Op {
            nft::Op::Chains(TableKey::Fabric, ChainsChange { from_nothing, ..ChainsChange::default() }).into()
        };
        let (changed, deleted) = (chains(false), chains(true));
        let mut repairs = settled();
        let mut wrote = |done: &[&Op], failed: &[&Op], filter_unchanged| {
            let causes = Causes { routing: Dirty::Everything, filter_unchanged };
            let counts = repairs.wrote(done.iter().copied(), failed.iter().copied(), &causes);
            (counts.get(&TableName::Filter).copied().unwrap_or_default(), repairs.last())
        };
        assert_eq!(wrote(&[&changed], &[], false).0, 0, "a lease came");
        assert_eq!(wrote(&[], &[&changed], true).0, 0, "not written");
        assert_eq!(wrote(&[&changed], &[], true).0, 0, "tried again");
        assert_eq!(wrote(&[&changed], &[], true).0, 1);
        advance(EVENT).await;
        let (count, last) = wrote(&[&deleted], &[], true);
        assert_eq!(count, 1);
        let table = "table inet fabric of the packet filter was";
        assert_eq!(
            last.iter().map(|repair| repair.message.clone()).collect::<Vec<_>>(),
            [
                format!("{table} changed by another program, restored"),
                format!("{table} deleted by another program, restored")
            ]
        );
    }
}
