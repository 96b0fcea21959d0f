//! The chain of others that is there for rules of ours, read and written: see [`fabric_core::state::docker_user`].

use std::io;

use fabric_core::diff::docker_user::DockerUserChange;
use fabric_core::model::Family;
use fabric_core::state::docker_user::{CHAIN, DockerUser, TABLE, is_ours};
use fabric_netlink::{Frame, Request, RequestSocket};
use netlink_packet_core::NLM_F_CREATE;

use super::attributes::{Attributes, Nfnetlink as _, Values};
use super::rule::{comment, with_rule};
use super::uapi::{DELETE_RULES, GET_CHAIN, GET_RULE, NEW_RULE, message};

/// `nft -a list chain ip filter DOCKER-USER` and `ip6 …`: those that are there.
pub(super) fn chains(socket: &mut RequestSocket) -> io::Result<Vec<DockerUser>> {
    let mut chains = vec![];
    for family in Family::ALL {
        if has_chain(socket, family, TABLE, CHAIN) {
            let rules = socket.dump(&Request::raw(message(GET_RULE), 0, place(family).into_bytes()), rule)?;
            chains.push(DockerUser { family, rules });
        }
    }
    Ok(chains)
}

/// Whatever the kernel has against a chain, it isn't there.
fn has_chain(socket: &mut RequestSocket, family: Family, table: &str, chain: &str) -> bool {
    // NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME
    let chain = Request::raw(message(GET_CHAIN), 0, start(family).text(1, table).text(3, chain).into_bytes());
    matches!(socket.ask(&chain, |_| Some(())), Ok(Some(())))
}

/// `nft delete rule ip filter DOCKER-USER handle …; nft insert rule ip filter DOCKER-USER …`.
pub(super) fn messages(change: &DockerUserChange) -> Vec<Request> {
    let DockerUserChange { family, removed, added } = change;
    // NFTA_RULE_HANDLE
    let remove = |handle: &u64| {
        Request::raw(message(DELETE_RULES), 0, place(*family).bytes(3, &handle.to_be_bytes()).into_bytes())
    };
    // Without NLM_F_APPEND a rule goes to the head.
    let insert = |rule| Request::raw(message(NEW_RULE), NLM_F_CREATE, with_rule(place(*family), rule).into_bytes());
    removed.iter().map(remove).chain(added.iter().map(insert)).collect()
}

/// A rule of ours there: its handle and its comment.
fn rule(frame: &Frame<'_>) -> Option<(u64, String)> {
    let values = Values::of(frame);
    // A kernel that doesn't filter dumps shows those of all chains.
    (values.text(1)? == TABLE && values.text(2)? == CHAIN).then_some(())?;
    let comment = comment(&values).filter(|comment| is_ours(comment))?;
    Some((u64::from_be_bytes(values.bytes(3)?.try_into().ok()?), comment.to_owned()))
}

/// NFTA_RULE_TABLE, NFTA_RULE_CHAIN
fn place(family: Family) -> Attributes {
    start(family).text(1, TABLE).text(2, CHAIN)
}

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
fn start(family: Family) -> Attributes {
    Attributes::message(if family == Family::V4 { 2 } else { 10 }, 0)
}
