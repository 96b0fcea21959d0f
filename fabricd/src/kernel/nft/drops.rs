//! What our packet filter has thrown away, by the counters of its rules.

use std::collections::BTreeMap;
use std::io;

use fabric_core::state::nft::{TableKey, reason};
use fabric_netlink::{Frame, Request, RequestSocket};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::encode::start;
use super::read::{RuleFound, rule};
use super::uapi::{GET_RULE, message};

/// The count of all rules of a chain that throw packets away for one reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drops {
    /// The table that it is in.
    pub table: TableKey,
    /// The chain: `senders` judges what other nodes send, `pods` what this node's pods send.
    pub chain: String,
    /// Why packets are thrown away there, in a few words.
    pub why: String,
    /// How many were, since the table was made.
    pub packets: u64,
}

/// A rule of a table of ours, and what it has counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Its chain.
    pub chain: String,
    /// Its comment.
    pub comment: String,
    /// How many packets it was applied to; `None` for one without a counter.
    pub packets: Option<u64>,
}

/// Reads all rules of a table in their order, with their counters, over a socket of its own: `nft list table`.
///
/// # Errors
/// When the kernel can't be asked. Without the table there are none.
pub fn counted(table: TableKey) -> io::Result<Vec<Counted>> {
    let mut socket = RequestSocket::open(NETLINK_NETFILTER)?;
    let request = Request::raw(message(GET_RULE), 0, start(table).into_bytes());
    let read = |frame: &Frame<'_>| {
        let RuleFound { chain, comment, counter, .. } = rule(frame, table)?;
        Some(Counted { chain, comment: comment.unwrap_or_default(), packets: counter.map(|count| count.packets) })
    };
    match socket.dump(&request, read) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(vec![]),
        rules => rules,
    }
}

/// Reads the counters of the rules that drop, over a socket of its own: nobody who writes waits for it.
///
/// # Errors
/// When the kernel can't be asked. Without our tables, or without nftables, there is nothing to count.
pub fn drops() -> io::Result<Vec<Drops>> {
    let mut socket = match RequestSocket::open(NETLINK_NETFILTER) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(vec![]),
        socket => socket?,
    };
    let mut rules = vec![];
    for table in TableKey::ALL {
        let request = Request::raw(message(GET_RULE), 0, start(table).into_bytes());
        match socket.dump(&request, |frame| count(frame, table)) {
            Ok(counts) => rules.extend(counts),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(by_reason(rules))
}

fn by_reason(rules: Vec<Drops>) -> Vec<Drops> {
    let mut sums = BTreeMap::new();
    for Drops { table, chain, why, packets } in rules {
        *sums.entry((table, chain, why)).or_default() += packets;
    }
    sums.into_iter().map(|((table, chain, why), packets)| Drops { table, chain, why, packets }).collect()
}

fn count(frame: &Frame<'_>, table: TableKey) -> Option<Drops> {
    let RuleFound { chain, comment, counter, lets_pass } = rule(frame, table)?;
    let why = comment.as_deref().and_then(reason)?.to_owned();
    (!lets_pass).then_some(())?;
    Some(Drops { table, chain, why, packets: counter?.packets })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_with_one_reason_are_one_count() {
        let drops = |chain: &str, packets| {
            let (chain, why) = (chain.to_owned(), "a pod is no router".to_owned());
            Drops { table: TableKey::Fabric, chain, why, packets }
        };
        let rules = vec![drops("pods", 3), drops("other", 1), drops("pods", 0), drops("pods", 4)];
        assert_eq!(by_reason(rules), [drops("other", 1), drops("pods", 7)]);
    }
}
