//! What kube-proxy has in the packet filter, by nftables and by iptables-nft: found, and removed once another translates
//! Services in its place.

use std::collections::BTreeSet;
use std::io;

use fabric_core::model::Family;
use fabric_netlink::{Frame, Request, RequestSocket};

use super::attributes::{Attributes, Nfnetlink as _, Values};
use super::encode::batch;
use super::uapi::{DELETE_CHAIN, DELETE_RULES, DELETE_TABLE, GET_CHAIN, GET_RULE, GET_TABLE, message};
use crate::kernel::kube_proxy::names::{IPTABLES, SERVICES, is_its_chain};

/// Its table of nftables.
const TABLE: &str = "kube-proxy";

/// Whether kube-proxy is or was here, by a chain that it makes with iptables-nft, or with nftables.
pub(super) fn is_here(socket: &mut RequestSocket) -> bool {
    let known = [("nat", SERVICES), (TABLE, "services")];
    Family::ALL.into_iter().any(|family| {
        known.iter().any(|(table, chain)| {
            // NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME
            is_there(socket, GET_CHAIN, start(family).text(1, table).text(3, chain))
        })
    })
}

/// Removes all of it in one transaction: `nft delete table ip kube-proxy`, and of iptables-nft the rules that lead to its
/// chains, and then these. Says what was there, in words.
///
/// # Errors
/// When it can't be read, or the kernel refuses.
pub(super) fn remove(socket: &mut RequestSocket) -> io::Result<Vec<String>> {
    let (mut messages, mut removed) = (vec![], vec![]);
    for family in Family::ALL {
        let word = if family == Family::V4 { "ip" } else { "ip6" };
        // NFTA_TABLE_NAME
        let table = || start(family).text(1, TABLE);
        if is_there(socket, GET_TABLE, table()) {
            messages.push(Request::raw(message(DELETE_TABLE), 0, table().into_bytes()));
            removed.push(format!("table {word} {TABLE}"));
        }
        let all = socket.dump(&Request::raw(message(GET_CHAIN), 0, start(family).into_bytes()), chain)?;
        for table in IPTABLES {
            let chains: BTreeSet<&str> =
                all.iter().filter(|(of, _)| of == table).map(|(_, name)| name.as_str()).collect();
            if chains.is_empty() {
                continue;
            }
            let rules = Request::raw(message(GET_RULE), 0, start(family).text(1, table).into_bytes());
            let leads_there = |frame: &Frame<'_>| jump(frame, table, &chains);
            // NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_HANDLE
            for (chain, handle) in socket.dump(&rules, leads_there)? {
                let rule = start(family).text(1, table).text(2, &chain).bytes(3, &handle);
                messages.push(Request::raw(message(DELETE_RULES), 0, rule.into_bytes()));
            }
            // Its chains lead to each other, so all rules go before any chain.
            for chain in &chains {
                let rules = start(family).text(1, table).text(2, chain);
                messages.push(Request::raw(message(DELETE_RULES), 0, rules.into_bytes()));
            }
            for chain in &chains {
                let chain = start(family).text(1, table).text(3, chain);
                messages.push(Request::raw(message(DELETE_CHAIN), 0, chain.into_bytes()));
            }
            removed.push(format!("{} chains of table {word} {table}", chains.len()));
        }
    }
    if !messages.is_empty() {
        socket.transact(&batch(messages)).map_err(|refusal| refusal.error)?;
    }
    Ok(removed)
}

fn is_there(socket: &mut RequestSocket, kind: u16, what: Attributes) -> bool {
    // Whatever the kernel has against it, it isn't there.
    matches!(socket.ask(&Request::raw(message(kind), 0, what.into_bytes()), |_| Some(())), Ok(Some(())))
}

/// Table and name of a chain that kube-proxy makes with iptables.
fn chain(frame: &Frame<'_>) -> Option<(String, String)> {
    let values = Values::of(frame);
    let (table, name) = (values.text(1)?, values.text(3)?);
    let is_its = IPTABLES.contains(&table) && is_its_chain(name);
    is_its.then(|| (table.to_owned(), name.to_owned()))
}

/// Chain and handle of a rule of others that leads to one of these chains.
fn jump(frame: &Frame<'_>, table: &str, chains: &BTreeSet<&str>) -> Option<(String, Vec<u8>)> {
    let values = Values::of(frame);
    let chain = values.text(2)?;
    if values.text(1)? != table || chains.contains(chain) {
        return None;
    }
    // NFTA_RULE_EXPRESSIONS; of each NFTA_EXPR_NAME and NFTA_EXPR_DATA; NFTA_IMMEDIATE_DATA, NFTA_DATA_VERDICT,
    // NFTA_VERDICT_CHAIN
    let target = |expression: Values<'_>| {
        (expression.text(1)? == "immediate").then_some(())?;
        let verdict = expression.nested(2)?.nested(2)?.nested(2)?;
        Some(chains.contains(verdict.text(2)?))
    };
    let leads_there = values.nested(4)?.list().filter_map(target).any(|is_its| is_its);
    leads_there.then(|| Some((chain.to_owned(), values.bytes(3)?.to_vec())))?
}

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
fn start(family: Family) -> Attributes {
    Attributes::message(if family == Family::V4 { 2 } else { 10 }, 0)
}
