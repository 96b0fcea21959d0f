//! From steps to the messages of a transaction. Each function gives the command of `nft` that would do the same.

use std::net::IpAddr;

use fabric_core::diff::nft::{ChainsChange, ElementChange, Op};
use fabric_core::state::nft::{Chain, Element, KeyField, Part, Rule, Set, TABLE, TableFamily};
use fabric_netlink::{Request, pad};
use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE};

use super::attributes::{Attributes, Nfnetlink as _};
use super::docker_user;
use super::expr::{DATA_VALUE, LIST_ELEMENT, interface};
use super::rule::with_rule;
use super::uapi::{
    ACCEPT, BATCH_BEGIN, BATCH_END, CONCATENATED, DELETE_CHAIN, DELETE_ELEMENTS, DELETE_RULES, DELETE_SET,
    DELETE_TABLE, INTERVAL, NEW_CHAIN, NEW_ELEMENTS, NEW_RULE, NEW_SET, NEW_TABLE, SUBSYSTEM, TYPE_BITS, chain_kind,
    datatype, message, nfproto, width,
};

/// Elements in one message: a list of attributes has to stay below 64 KiB, and each takes 116 bytes at most.
const AT_ONCE: usize = 500;

/// The messages of a transaction, in the order in which the kernel has to take them.
pub(super) fn transaction(ops: &[&Op]) -> Vec<Request> {
    let is_reset = |op: &&Op| matches!(op, Op::ResetTable(_) | Op::DeleteTable(_));
    let (resets, others): (Vec<&Op>, Vec<&Op>) = ops.iter().copied().partition(is_reset);
    let mut id = 0;
    let mut steps: Vec<Request> = resets.into_iter().chain(others).flat_map(|op| messages(op, &mut id)).collect();
    if let Some(last) = steps.last_mut() {
        last.add_flags(NLM_F_ACK);
    }
    let bracket = |kind| Request::raw(kind, 0, Attributes::message(0, SUBSYSTEM).into_bytes());
    steps.insert(0, bracket(BATCH_BEGIN));
    steps.push(bracket(BATCH_END));
    steps
}

/// The messages of one step; `id` is that of the last set that the transaction makes.
fn messages(op: &Op, id: &mut u32) -> Vec<Request> {
    match op {
        Op::ResetTable(family) | Op::DeleteTable(family) => remove_table(*family).into(),
        Op::Set(family, name, set) => {
            *id += 1;
            let mut steps = vec![make_table(*family)];
            steps.extend(make_set(*family, name, set, *id));
            steps
        }
        Op::Elements(ElementChange { table, set, shape, removed, added, .. }) => {
            let mut steps = elements(*table, set, shape, removed, DELETE_ELEMENTS);
            steps.extend(elements(*table, set, shape, added, NEW_ELEMENTS));
            steps
        }
        Op::Chains(family, change) => replace_rules(*family, change, id),
        Op::DockerUser(change) => docker_user::messages(change),
    }
}

/// `nft add table FAMILY fabric; nft delete table FAMILY fabric`: gone, whether it was there or not.
fn remove_table(family: TableFamily) -> [Request; 2] {
    // NFTA_TABLE_NAME
    [make_table(family), Request::raw(message(DELETE_TABLE), 0, start(family).text(1, TABLE).into_bytes())]
}

/// `nft add table FAMILY fabric`.
fn make_table(family: TableFamily) -> Request {
    Request::raw(message(NEW_TABLE), NLM_F_CREATE, start(family).text(1, TABLE).into_bytes())
}

/// `nft flush table FAMILY fabric`, all chains deleted, and those that are wanted made. Rules come last: they name
/// chains and sets.
fn replace_rules(family: TableFamily, change: &ChainsChange, id: &mut u32) -> Vec<Request> {
    let named = |kind, name: u16, value: &str| {
        Request::raw(message(kind), 0, start(family).text(1, TABLE).text(name, value).into_bytes())
    };
    let mut steps = vec![make_table(family)];
    // NFTA_RULE_TABLE alone: those of all chains, which may jump to each other.
    steps.push(Request::raw(message(DELETE_RULES), 0, start(family).text(1, TABLE).into_bytes()));
    // NFTA_CHAIN_NAME, NFTA_SET_NAME
    steps.extend(change.old_chains.iter().map(|chain| named(DELETE_CHAIN, 3, chain)));
    steps.extend(change.old_sets.iter().map(|set| named(DELETE_SET, 2, set)));
    for (name, set) in &change.sets {
        *id += 1;
        steps.extend(make_set(family, name, set, *id));
    }
    steps.extend(change.chains.iter().map(|(name, chain)| make_chain(family, name, chain)));
    for (name, chain) in &change.chains {
        steps.extend(chain.rules.iter().map(|rule| make_rule(family, name, rule)));
    }
    steps
}

/// `nft add chain FAMILY fabric NAME { type … hook … priority …; policy accept; }`.
fn make_chain(family: TableFamily, name: &str, chain: &Chain) -> Request {
    // NFTA_CHAIN_TABLE, _NAME, _HOOK, _POLICY, _TYPE
    let mut body = start(family).text(1, TABLE).text(3, name);
    if let Some(hook) = chain.hook {
        // NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY
        let place = |list: Attributes| list.number(1, hook.place as u32).bytes(2, &hook.priority.to_be_bytes());
        body = body.nested(4, place).number(5, ACCEPT).text(7, chain_kind(hook.kind));
    }
    Request::raw(message(NEW_CHAIN), NLM_F_CREATE, body.into_bytes())
}

/// `nft add set FAMILY fabric NAME { type …; flags interval; elements = { … } }`.
fn make_set(family: TableFamily, name: &str, set: &Set, id: u32) -> Vec<Request> {
    let size = |field: &KeyField| u32::try_from(width(*field)).expect("16 bytes at most");
    let length = set.key.iter().map(|field| size(field).next_multiple_of(4)).sum::<u32>();
    let kind = set.key.iter().fold(0, |kind, field| kind << TYPE_BITS | datatype(*field));
    // A key of one field is as long as that field.
    let length = if let [field] = set.key { size(field) } else { length };
    // NFTA_SET_TABLE, _NAME, _FLAGS, _KEY_TYPE, _KEY_LEN, _DESC, _ID
    let mut body = start(family).text(1, TABLE).text(2, name).number(3, flags(set)).number(4, kind).number(5, length);
    if set.key.len() > 1 {
        // NFTA_SET_FIELD_LEN
        let add = |list: Attributes, field| list.nested(LIST_ELEMENT, |one| one.number(1, size(field)));
        // NFTA_SET_DESC_CONCAT
        body = body.nested(9, |description| description.nested(2, |fields| set.key.iter().fold(fields, add)));
    }
    // NFTA_SET_USERDATA, for `nft` to print by: the key's byte order (type 0, four bytes) is the host's for names.
    if let [KeyField::Interface] = set.key {
        body = body.bytes(13, &[&[0, 4][..], &1_u32.to_ne_bytes()].concat());
    }
    let mut steps = elements(family, name, set, set.elements.keys(), NEW_ELEMENTS);
    steps.insert(0, Request::raw(message(NEW_SET), NLM_F_CREATE, body.number(10, id).into_bytes()));
    steps
}

/// The flags of a set, as the kernel gives them back.
pub(super) fn flags(set: &Set) -> u32 {
    let concatenated = if set.key.len() > 1 { CONCATENATED } else { 0 };
    if set.ranges { INTERVAL | concatenated } else { concatenated }
}

/// `nft add element FAMILY fabric SET { … }` or `delete`, in as many messages as it takes.
fn elements<'a>(
    family: TableFamily,
    set: &str,
    shape: &Set,
    elements: impl IntoIterator<Item = &'a Element>,
    kind: u16,
) -> Vec<Request> {
    let flags = if kind == NEW_ELEMENTS { NLM_F_CREATE } else { 0 };
    let add = |list: Attributes, element: &&Element| {
        // NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_KEY_END
        let key = |place: Attributes, highest| place.written(DATA_VALUE, |bytes| key(element, highest, bytes));
        list.nested(LIST_ELEMENT, |one| {
            let one = one.nested(1, |place| key(place, false));
            if shape.ranges { one.nested(10, |place| key(place, true)) } else { one }
        })
    };
    let all: Vec<&Element> = elements.into_iter().collect();
    let send = |some: &[&Element]| {
        // NFTA_SET_ELEM_LIST_TABLE, _SET, _ELEMENTS
        let body = start(family).text(1, TABLE).text(2, set).nested(3, |list| some.iter().fold(list, add));
        Request::raw(message(kind), flags, body.into_bytes())
    };
    all.chunks(AT_ONCE).map(send).collect()
}

/// The lowest key of an element, or the highest: its parts, each filled up to a multiple of four bytes, but for one that
/// stands alone.
fn key(element: &Element, highest: bool, to: &mut Vec<u8>) {
    for part in element.parts() {
        match part {
            Part::Net(net) => match if highest { net.last() } else { net.base() } {
                IpAddr::V4(ip) => to.extend(ip.octets()),
                IpAddr::V6(ip) => to.extend(ip.octets()),
            },
            Part::Interface(name) => to.extend(interface(name.as_str())),
            Part::Mac(mac) => to.extend(mac.octets()),
        }
        if element.parts().nth(1).is_some() {
            pad(to);
        }
    }
}

/// `nft add rule FAMILY fabric CHAIN … comment "…"`.
fn make_rule(family: TableFamily, chain: &str, rule: &Rule) -> Request {
    // NFTA_RULE_TABLE, _CHAIN
    let place = start(family).text(1, TABLE).text(2, chain);
    Request::raw(message(NEW_RULE), NLM_F_CREATE | NLM_F_APPEND, with_rule(place, rule).into_bytes())
}

fn start(family: TableFamily) -> Attributes {
    Attributes::message(nfproto(family), 0)
}
