//! What our packet filter has thrown away, by the counters of its rules.

use std::io;

use fabric_core::rules::TableFamily;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::super::socket::RequestSocket;
use super::super::wire::{Frame, Request, attributes};
use super::attributes::Attributes;
use super::read::{GET_RULE, Values, comment_of};
use super::{message, nfproto};

/// The count of one rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drops {
    /// The table that it is in.
    pub table: TableFamily,
    /// The chain: `senders` judges what other nodes send, `pods` what this node's pods send.
    pub chain: String,
    /// Why packets are thrown away there, in a few words.
    pub why: String,
    /// How many were, since the table was made.
    pub packets: u64,
}

/// Reads the counters of all rules that drop, over a socket of its own: nobody who writes waits for it.
///
/// # Errors
/// When the kernel can't be asked. Without our tables, or without nftables, there is nothing to count.
pub fn drops() -> io::Result<Vec<Drops>> {
    let mut socket = match RequestSocket::open(NETLINK_NETFILTER) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(vec![]),
        socket => socket?,
    };
    let mut all = vec![];
    for table in [TableFamily::Inet, TableFamily::Bridge] {
        let ours = Attributes::message(nfproto(table), 0).text(1, fabric_core::rules::TABLE);
        let request = Request::raw(message(GET_RULE), 0, ours.into_bytes());
        match socket.dump(&request, |frame| count(frame, table)) {
            Ok(counts) => all.extend(counts),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

fn count(frame: &Frame<'_>, table: TableFamily) -> Option<Drops> {
    let values = Values::of(frame);
    let chain = values.is_ours().then(|| values.text(2))??.to_owned();
    // NFTA_RULE_EXPRESSIONS: a list, each with a name and data.
    let counter = attributes(values.bytes(4)?)
        .map(|(_, expression)| Values(expression))
        .find(|expression| expression.text(1) == Some("counter"))?;
    let packets = counter.nested(2)?.bytes(2)?.try_into().map(u64::from_be_bytes).ok()?;
    // The comment ends with the number of the rule.
    let why = comment_of(&values)?;
    let why = why.rsplit_once(" [").map_or(why, |(why, _)| why).to_owned();
    Some(Drops { table, chain, why, packets })
}
