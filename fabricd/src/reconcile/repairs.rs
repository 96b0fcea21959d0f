//! [`Repairs`]: what another program changed or deleted of ours, and was written again. Without a trace nobody would find
//! who works against the daemon.
//!
//! A write is a repair when what is desired there has not changed since the node was last in sync: then the kernel has.
//! What a lease, the config or the host's links change is ordinary, and so is what is tried again, and all that a start
//! writes until it is in sync for the first time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::diff::{Change, Key, Op};
use fabric_core::leases::Lease;
use fabric_core::model::{MacAddr, Subnet};
use fabric_core::rules::change::{Change as RuleChange, Found};
use fabric_core::rules::{TABLE, TableFamily};
use tokio::time::Instant;
use tracing::warn;

use crate::reconcile::planned::Cause;

/// How many are remembered for those who follow.
const REMEMBERED: usize = 50;
/// The least time between two events about one table.
const EVENT: Duration = Duration::from_secs(10);
/// The least time between two lines of the log.
const LINE: Duration = Duration::from_secs(60);
/// The packet filter, among the tables.
pub const FILTER: &str = "filter";

/// Something that was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// Rises by one with each.
    pub number: u64,
    /// What was done to what, in a sentence.
    pub message: String,
}

/// What was restored, and what makes a write a repair.
#[derive(Debug, Default)]
pub struct Repairs {
    /// True once the node has been in sync.
    settled: bool,
    /// What failed in the last pass: it is tried again, not restored.
    failed: BTreeSet<Key>,
    filter_failed: bool,
    last: Arc<VecDeque<Repair>>,
    number: u64,
    events: BTreeMap<&'static str, Throttle>,
    lines: Throttle,
}

impl Repairs {
    /// The last ones, the newest last.
    #[must_use]
    pub fn last(&self) -> Arc<VecDeque<Repair>> {
        Arc::clone(&self.last)
    }

    /// Whether what is written for this reason may be a repair at all.
    #[must_use]
    pub fn looks_at(&self, cause: &Cause) -> bool {
        self.settled && !matches!(cause, Cause::Anew)
    }

    /// Takes note of a pass's writes: `done` are the steps that were taken, `failed` those that were not. Gives how many
    /// were repairs, by table.
    pub fn wrote<'a>(
        &mut self,
        done: impl Iterator<Item = &'a Op>,
        failed: impl Iterator<Item = &'a Op>,
        cause: &Cause,
    ) -> BTreeMap<&'static str, u64> {
        let failed: BTreeSet<Key> = failed.map(Op::key).collect();
        let tried = std::mem::replace(&mut self.failed, failed);
        let ordinary = Ordinary::of(cause);
        let (mut first, mut counts) = (None, BTreeMap::new());
        if self.looks_at(cause) {
            for op in done.filter(|op| !tried.contains(&op.key()) && !ordinary.covers(op)) {
                first.get_or_insert(op);
                *counts.entry(table(op)).or_default() += 1;
            }
        }
        if let Some(first) = first {
            self.tell(table(first), &message(first, &counts));
        }
        counts
    }

    /// Takes note that the packet filter was written, or couldn't be. `unchanged` says that the same was desired before.
    /// Gives how many steps were repairs.
    pub fn filtered(&mut self, change: &RuleChange, was: &Found, written: bool, unchanged: bool) -> u64 {
        let tried = std::mem::replace(&mut self.filter_failed, !written);
        if !self.settled || !written || !unchanged || tried {
            return 0;
        }
        let family = change.families().next().unwrap_or(TableFamily::Inet);
        let what = if was.contains_key(&family) { "changed" } else { "deleted" };
        self.tell(
            FILTER,
            &format!("table {family} {TABLE} of the packet filter was {what} by another program, restored"),
        );
        change.steps()
    }

    /// The kernel holds what is desired.
    pub fn in_sync(&mut self) {
        self.settled = true;
    }

    fn tell(&mut self, table: &'static str, message: &str) {
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

/// The entries that change with what is desired.
enum Ordinary {
    Nothing,
    Everything,
    Of { subnets: BTreeSet<Subnet>, overlay: BTreeSet<IpAddr>, macs: BTreeSet<MacAddr> },
}

impl Ordinary {
    fn of(cause: &Cause) -> Self {
        let leases = match cause {
            Cause::Unchanged => return Self::Nothing,
            Cause::Anew => return Self::Everything,
            Cause::Leases(leases) => leases,
        };
        let subnets: BTreeSet<Subnet> =
            leases.iter().flat_map(|lease| lease.key.subnets().values().copied().collect::<Vec<_>>()).collect();
        let macs = |lease: &Arc<Lease>| {
            lease.record.endpoints().values().map(|endpoint| endpoint.vtep_mac).collect::<Vec<_>>()
        };
        Self::Of {
            overlay: subnets.iter().map(|subnet| subnet.base()).collect(),
            macs: leases.iter().flat_map(macs).collect(),
            subnets,
        }
    }

    fn covers(&self, op: &Op) -> bool {
        let (subnets, overlay, macs) = match self {
            Self::Nothing => return false,
            Self::Everything => return true,
            Self::Of { subnets, overlay, macs } => (subnets, overlay, macs),
        };
        match (op, op.key()) {
            (_, Key::Route(subnet)) => subnets.contains(&subnet),
            (_, Key::Neighbour(_, ip)) => overlay.contains(&ip),
            (_, Key::Fdb(_, mac)) => macs.contains(&mac),
            (Op::Nexthop(_, change), _) => [change.wanted(), change.found()]
                .into_iter()
                .flatten()
                .any(|nexthop| overlay.contains(&nexthop.gateway)),
            _ => false,
        }
    }
}

/// The table that a step writes, as metrics and events call it.
#[must_use]
pub fn table(op: &Op) -> &'static str {
    match op {
        Op::Link(..) => "link",
        Op::Sysctl(..) => "sysctl",
        Op::Address(..) => "address",
        Op::Fdb(..) => "fdb",
        Op::Neighbour(..) => "neighbour",
        Op::Nexthop(..) => "nexthop",
        Op::Route(..) => "route",
    }
}

/// What was done to the first, and how many others there are: `route 10.244.14.0/24 was deleted by another program,
/// restored; with it 2 more routes`.
fn message(first: &Op, counts: &BTreeMap<&'static str, u64>) -> String {
    let object = match (first, first.key()) {
        (_, Key::Link(name)) => format!("link {name}"),
        (_, Key::Sysctl(setting)) => format!("setting net/{}", setting.path()),
        (_, Key::Address(dev, address)) => format!("address {address} of {dev}"),
        (_, Key::Fdb(dev, mac)) => format!("FDB entry {mac} of {dev}"),
        (_, Key::Neighbour(dev, ip)) => format!("neighbour {ip} of {dev}"),
        (_, Key::Nexthop(id)) => format!("nexthop object {id}"),
        (_, Key::Route(dst)) => format!("route {dst}"),
    };
    let done = match deed(first) {
        Deed::Deleted => "deleted by another program, restored",
        Deed::Changed => "changed by another program, restored",
        Deed::Added => "added by another program, removed",
    };
    let mut text = format!("{object} was {done}");
    let others = counts.iter().map(|(name, count)| (*name, count - u64::from(*name == table(first))));
    for (position, (name, count)) in others.filter(|(_, count)| *count > 0).enumerate() {
        let _ = write!(text, "{}{count} {}", if position == 0 { "; with it " } else { ", " }, counted(name, count));
    }
    text
}

enum Deed {
    Deleted,
    Changed,
    Added,
}

fn deed(op: &Op) -> Deed {
    fn of<T>(change: &Change<T>) -> Deed {
        match change {
            Change::Create(_) => Deed::Deleted,
            Change::Replace { .. } => Deed::Changed,
            Change::Delete(_) => Deed::Added,
        }
    }
    match op {
        Op::Sysctl(..) => Deed::Changed,
        Op::Link(_, change) => of(change),
        Op::Address(_, change) => of(change),
        Op::Fdb(_, _, change) => of(change),
        Op::Neighbour(_, _, change) => of(change),
        Op::Nexthop(_, change) => of(change),
        Op::Route(_, change) => of(change),
    }
}

fn counted(table: &str, count: u64) -> &'static str {
    let (one, more) = match table {
        "link" => ("link", "links"),
        "sysctl" => ("setting", "settings"),
        "address" => ("address", "addresses"),
        "fdb" => ("FDB entry", "FDB entries"),
        "neighbour" => ("neighbour", "neighbours"),
        "nexthop" => ("nexthop object", "nexthop objects"),
        _ => ("route", "routes"),
    };
    if count == 1 { one } else { more }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_core::leases::{Entry, LeaseSet};
    use fabric_core::state::{Sysctl, Via};
    use tokio::time::advance;

    fn route(third: u8) -> Op {
        Op::Route(format!("10.244.{third}.0/24").parse().unwrap(), Change::Create(Via::Other("via nowhere".into())))
    }

    fn neighbour(third: u8) -> Op {
        let (dev, ip) = ("fabric.1".parse().unwrap(), format!("10.244.{third}.0").parse().unwrap());
        Op::Neighbour(dev, ip, Change::Create("02:42:c0:00:02:02".parse().unwrap()))
    }

    fn lease(third: u8) -> Vec<Arc<Lease>> {
        let value =
            r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"}}"#;
        let entry =
            Entry { key: format!("10.244.{third}.0-24"), value: value.into(), create_revision: 1, mod_revision: 1 };
        LeaseSet::snapshot(&LeaseSet::default(), vec![entry], 1).iter().cloned().collect()
    }

    fn settled() -> Repairs {
        Repairs { settled: true, ..Repairs::default() }
    }

    fn told(repairs: &Repairs) -> Vec<&str> {
        repairs.last.iter().map(|repair| repair.message.as_str()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_was_in_sync_and_is_still_desired_is_repaired() {
        let wrote = |repairs: &mut Repairs, op: &Op, cause: &Cause| {
            !repairs.wrote([op].into_iter(), [].into_iter(), cause).is_empty()
        };
        let mut start = Repairs::default();
        assert!(!wrote(&mut start, &route(2), &Cause::Unchanged), "a start's first writes");
        start.in_sync();
        assert!(wrote(&mut start, &route(2), &Cause::Unchanged));
        for (cause, op, repaired) in [
            (Cause::Anew, route(2), false),
            (Cause::Leases(lease(2)), route(2), false),
            (Cause::Leases(lease(2)), neighbour(2), false),
            (Cause::Leases(lease(3)), route(2), true),
            (Cause::Leases(lease(3)), neighbour(2), true),
            (Cause::Leases(lease(2)), Op::Sysctl(Sysctl::Ipv4Forward, 1), true),
        ] {
            assert_eq!(wrote(&mut settled(), &op, &cause), repaired, "{op} with {cause:?}");
        }
        let mut repairs = settled();
        assert_eq!(repairs.wrote([].into_iter(), [&route(2)].into_iter(), &Cause::Leases(lease(2))), BTreeMap::new());
        assert!(!wrote(&mut repairs, &route(2), &Cause::Unchanged), "tried again");
        assert!(wrote(&mut repairs, &route(2), &Cause::Unchanged), "it had worked");
    }

    #[tokio::test(start_paused = true)]
    async fn first_object_is_named_with_the_number_of_others_and_not_too_often() {
        let mut repairs = settled();
        let ops = [route(2), route(3), neighbour(2), neighbour(3)];
        let counts = repairs.wrote(ops.iter(), [].into_iter(), &Cause::Unchanged);
        assert_eq!(counts, [("route", 2), ("neighbour", 2)].into());
        let first = "route 10.244.2.0/24 was deleted by another program, restored; with it 2 neighbours, 1 route";
        assert_eq!(told(&repairs), [first]);
        for _ in 0..3 {
            repairs.wrote([&route(3)].into_iter(), [].into_iter(), &Cause::Unchanged);
        }
        assert_eq!(told(&repairs), [first]);
        advance(EVENT).await;
        repairs.wrote([&route(3)].into_iter(), [].into_iter(), &Cause::Unchanged);
        let again =
            "route 10.244.3.0/24 was deleted by another program, restored (3 repairs more since the last event)";
        assert_eq!(told(&repairs), [first, again]);
    }

    #[tokio::test(start_paused = true)]
    async fn packet_filter_is_repaired_too() {
        let change = RuleChange { rules: [(TableFamily::Inet, Default::default())].into(), ..RuleChange::default() };
        let there = Found::from([(TableFamily::Inet, Default::default())]);
        let mut repairs = settled();
        assert_eq!(repairs.filtered(&change, &there, true, false), 0, "a lease came");
        assert_eq!(repairs.filtered(&change, &there, false, true), 0, "not written");
        assert_eq!(repairs.filtered(&change, &there, true, true), 0, "tried again");
        assert_eq!(repairs.filtered(&change, &there, true, true), 1);
        advance(EVENT).await;
        assert_eq!(repairs.filtered(&change, &Found::new(), true, true), 1);
        let table = "table inet fabric of the packet filter was";
        assert_eq!(
            told(&repairs),
            [
                format!("{table} changed by another program, restored"),
                format!("{table} deleted by another program, restored")
            ]
        );
    }
}
