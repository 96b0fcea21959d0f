//! From steps to the messages of transactions. Each function gives the command of `nft` that would do the same.

use std::iter;

use fabric_core::diff::nft::{ChainsChange, ElementChange, Op, Removal};
use fabric_core::state::nft::{Chain, Data, Datatype, Element, Fields, Name, Order, Rule, SetKind, TableKey};
use fabric_netlink::Request;
use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE};

use super::attributes::{Attributes, Nfnetlink as _};
use super::docker_user;
use super::expr::verdict_data;
use super::rule::with_rule;
use super::uapi::{
    ACCEPT, BATCH_BEGIN, BATCH_END, CONCATENATED, DATA_VALUE, DELETE_CHAIN, DELETE_ELEMENTS, DELETE_RULES, DELETE_SET,
    DELETE_TABLE, DYNAMIC, INTERVAL, INTERVAL_END, LIST_ELEMENT, MAP, NEW_CHAIN, NEW_ELEMENTS, NEW_RULE, NEW_SET,
    NEW_TABLE, SUBSYSTEM, TIMEOUT, TYPE_BITS, VERDICT_DATA, chain_kind, datatype, message, nfproto,
};

/// Elements in one message: a list of attributes has to stay below 64 KiB, and each takes 160 bytes at most.
const IN_A_MESSAGE: usize = 400;
/// Elements in one transaction: a larger one would hold up everybody else's.
const IN_A_TRANSACTION: usize = 1000;

/// Messages that have to be in one transaction.
struct Piece {
    messages: Vec<Request>,
    /// Elements in them.
    elements: usize,
}

/// The messages of one transaction or, with many elements, of several, each in the order in which the kernel has to take
/// them, and none before it is asked for: those of 100,000 elements take more memory than the elements.
pub(super) fn transactions<'a>(ops: &[&'a Op]) -> impl Iterator<Item = Vec<Request>> + use<'a> {
    let is_reset = |op: &&Op| matches!(op, Op::ResetTable(_) | Op::DeleteTable(_));
    let (resets, others): (Vec<&Op>, Vec<&Op>) = ops.iter().copied().partition(is_reset);
    let mut id = 0;
    let mut pieces = resets.into_iter().chain(others).flat_map(move |op| pieces(op, &mut id)).peekable();
    iter::from_fn(move || {
        let Piece { mut messages, mut elements } = pieces.next()?;
        while let Some(piece) = pieces.next_if(|piece| elements + piece.elements <= IN_A_TRANSACTION) {
            messages.extend(piece.messages);
            elements += piece.elements;
        }
        Some(batch(messages))
    })
}

/// Messages as one transaction.
pub(super) fn batch(mut messages: Vec<Request>) -> Vec<Request> {
    if let Some(last) = messages.last_mut() {
        last.add_flags(NLM_F_ACK);
    }
    let bracket = |kind| Request::raw(kind, 0, Attributes::message(0, SUBSYSTEM).into_bytes());
    messages.insert(0, bracket(BATCH_BEGIN));
    messages.push(bracket(BATCH_END));
    messages
}

/// Pieces that are made when they are asked for.
type Pieces<'a> = Box<dyn Iterator<Item = Piece> + 'a>;

/// The messages of one step; `id` is that of the last set that was made.
fn pieces<'a>(op: &'a Op, id: &mut u32) -> Pieces<'a> {
    let one = |messages: Vec<Request>| -> Pieces<'a> { Box::new(iter::once(Piece { messages, elements: 0 })) };
    match op {
        Op::ResetTable(table) | Op::DeleteTable(table) => one(remove_table(*table).into()),
        Op::Set(table, name, set) => {
            *id += 1;
            let made = one(vec![make_table(*table), make_set(*table, *name, set.kind, *id)]);
            // A map of verdicts or of frontends is filled once there is what it leads to.
            if set.order == Order::AfterChains || set.kind.data == Data::Verdict {
                return made;
            }
            let elements: Vec<&Element> = set.elements.keys().collect();
            Box::new(made.chain(element_pieces(*table, *name, set.kind, vec![], elements)))
        }
        Op::Elements(ElementChange { table, set, kind, removed, added, .. }) => {
            element_pieces(*table, *set, *kind, removed.iter().collect(), added.iter().collect())
        }
        Op::Chains(table, change) => one(replace_chains(*table, change, id)),
        Op::Remove(table, removal) => one(remove(*table, removal)),
        Op::DockerUser(change) => one(docker_user::messages(change)),
    }
}

/// Elements that go and come, in their order. One whose data changes goes and comes in the same piece.
fn element_pieces<'a>(
    table: TableKey,
    set: Name,
    kind: SetKind,
    removed: Vec<&'a Element>,
    added: Vec<&'a Element>,
) -> Pieces<'a> {
    let (mut gone, mut come) = (0, 0);
    Box::new(iter::from_fn(move || {
        let (removed, added) = (&removed[gone..], &added[come..]);
        let (goes, comes) = match (removed, added) {
            ([], []) => return None,
            _ if removed.len() + added.len() <= IN_A_TRANSACTION => (removed.len(), added.len()),
            // One that comes may overlap any that goes.
            _ if kind.ranges && !removed.is_empty() => (removed.len().min(IN_A_TRANSACTION), 0),
            _ if kind.ranges => (0, added.len().min(IN_A_TRANSACTION)),
            _ => half_each(kind, removed, added),
        };
        (gone, come) = (gone + goes, come + comes);
        let mut messages = elements(table, set, kind, &removed[..goes], DELETE_ELEMENTS);
        messages.extend(elements(table, set, kind, &added[..comes], NEW_ELEMENTS));
        Some(Piece { messages, elements: goes + comes })
    }))
}

/// How many of those that go and of those that come are in a transaction: all up to one key.
fn half_each(kind: SetKind, removed: &[&Element], added: &[&Element]) -> (usize, usize) {
    let half = IN_A_TRANSACTION / 2;
    let key = |element: &&Element| element.split(kind).0.to_vec();
    let last = [removed.get(half - 1), added.get(half - 1)].into_iter().flatten().map(key).min();
    let until = |some: &[&Element]| match &last {
        Some(last) => some.partition_point(|element| element.split(kind).0 <= last.as_slice()),
        None => some.len(),
    };
    (until(removed), until(added))
}

/// `nft add table TABLE; nft delete table TABLE`: gone, whether it was there or not.
fn remove_table(table: TableKey) -> [Request; 2] {
    [make_table(table), Request::raw(message(DELETE_TABLE), 0, start(table).into_bytes())]
}

/// `nft add table TABLE`.
fn make_table(table: TableKey) -> Request {
    Request::raw(message(NEW_TABLE), NLM_F_CREATE, start(table).into_bytes())
}

/// `nft delete chain TABLE NAME`, `nft delete set TABLE NAME`, `nft flush chain TABLE NAME`.
fn named(table: TableKey, kind: u16, attribute: u16, name: &str) -> Request {
    Request::raw(message(kind), 0, start(table).text(attribute, name).into_bytes())
}

/// NFTA_RULE_CHAIN, NFTA_CHAIN_NAME, NFTA_SET_NAME
const RULE_CHAIN: u16 = 2;
const CHAIN_NAME: u16 = 3;
const SET_NAME: u16 = 2;

/// All rules of the chains that change, then what is declared in another way, then what comes in their place. Rules come
/// last: they name chains and sets.
fn replace_chains(table: TableKey, change: &ChainsChange, id: &mut u32) -> Vec<Request> {
    let mut steps = vec![make_table(table)];
    let emptied = change.there.iter().map(Name::as_str).chain(change.emptied.iter().map(String::as_str));
    steps.extend(emptied.map(|chain| named(table, DELETE_RULES, RULE_CHAIN, chain)));
    steps.extend(change.moved.iter().map(|chain| named(table, DELETE_CHAIN, CHAIN_NAME, chain.as_str())));
    steps.extend(change.sets.keys().map(|set| named(table, DELETE_SET, SET_NAME, set.as_str())));
    for (name, set) in &change.sets {
        *id += 1;
        steps.push(make_set(table, *name, set.kind, *id));
    }
    let is_new = |name: &Name| !change.there.contains(name) || change.moved.contains(name);
    let new = change.chains.iter().filter(|(name, _)| is_new(name));
    steps.extend(new.map(|(name, chain)| make_chain(table, name.as_str(), chain)));
    for (name, set) in &change.sets {
        let all: Vec<&Element> = set.elements.keys().collect();
        steps.extend(elements(table, *name, set.kind, &all, NEW_ELEMENTS));
    }
    for (name, chain) in &change.chains {
        steps.extend(chain.rules().iter().map(|rule| make_rule(table, name.as_str(), rule)));
    }
    steps
}

/// Rules first, which may jump to other chains of these.
fn remove(table: TableKey, removal: &Removal) -> Vec<Request> {
    let rules = removal.chains.iter().map(|chain| named(table, DELETE_RULES, RULE_CHAIN, chain));
    let chains = removal.chains.iter().map(|chain| named(table, DELETE_CHAIN, CHAIN_NAME, chain));
    let sets = removal.sets.iter().map(|set| named(table, DELETE_SET, SET_NAME, set));
    rules.chain(chains).chain(sets).collect()
}

/// `nft add chain TABLE NAME { type … hook … priority …; policy accept; }`.
fn make_chain(table: TableKey, name: &str, chain: &Chain) -> Request {
    // NFTA_CHAIN_NAME, _HOOK, _POLICY, _TYPE
    let body = start(table).text(CHAIN_NAME, name).maybe(chain.hook(), |body, hook| {
        // NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY
        let place = |list: Attributes| list.number(1, hook.place as u32).bytes(2, &hook.priority.to_be_bytes());
        body.nested(4, place).number(5, ACCEPT).text(7, chain_kind(hook.kind))
    });
    Request::raw(message(NEW_CHAIN), NLM_F_CREATE, body.into_bytes())
}

/// `nft add set TABLE NAME { type …; flags interval; }`.
fn make_set(table: TableKey, name: Name, kind: SetKind, id: u32) -> Request {
    // NFTA_SET_NAME, _FLAGS, _KEY_TYPE, _KEY_LEN
    let body = start(table).text(SET_NAME, name.as_str()).number(3, flags(kind));
    let body = body.number(4, key_type(kind.key)).number(5, length(kind.key));
    // NFTA_SET_DATA_TYPE, NFTA_SET_DATA_LEN
    let body = match kind.data {
        Data::None => body,
        Data::Fields(data) => body.number(6, key_type(data)).number(7, length(data)),
        Data::Verdict => body.number(6, VERDICT_DATA),
    };
    let several = Some(kind.key.as_slice()).filter(|key| key.len() > 1);
    let body = body.maybe(several.map(|_| ()).or(kind.dynamic.map(|_| ())), |body, ()| {
        // NFTA_SET_DESC: NFTA_SET_DESC_SIZE, NFTA_SET_DESC_CONCAT
        body.nested(9, |description| {
            let description =
                description.maybe(kind.dynamic, |description, dynamic| description.number(1, dynamic.most));
            description.maybe(several, |description, key| {
                // NFTA_SET_FIELD_LEN
                let add = |list: Attributes, field: &Datatype| {
                    list.nested(LIST_ELEMENT, |one| one.number(1, size(field.width())))
                };
                description.nested(2, |fields| key.iter().fold(fields, add))
            })
        })
    });
    // NFTA_SET_ID; NFTA_SET_USERDATA for `nft` to print by: the byte order of key (type 0) and data (type 1).
    let orders = byte_orders(kind);
    let orders = (!orders.is_empty()).then_some(orders);
    let body = body.number(10, id).maybe(orders, |body, orders| body.bytes(13, &orders));
    Request::raw(message(NEW_SET), NLM_F_CREATE, body.into_bytes())
}

/// For a key or data of one field that this machine's byte order decides on, that it does.
fn byte_orders(kind: SetKind) -> Vec<u8> {
    let of_this_machine = |fields: Fields| matches!(fields.as_slice(), [Datatype::Interface | Datatype::Number]);
    let mut orders = vec![];
    if of_this_machine(kind.key) {
        orders.extend([&[0, 4][..], &1_u32.to_ne_bytes()].concat());
    }
    if let Data::Fields(data) = kind.data
        && of_this_machine(data)
    {
        orders.extend([&[1, 4][..], &1_u32.to_ne_bytes()].concat());
    }
    orders
}

fn size(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a key has at most 80 bytes")
}

/// Bytes of a key or of data in the kernel: one field alone is not filled up.
pub(super) fn length(fields: Fields) -> u32 {
    size(match fields.as_slice() {
        [field] => field.width(),
        _ => fields.size(),
    })
}

/// The fields as a number, for `nft` to print by.
pub(super) fn key_type(fields: Fields) -> u32 {
    fields.as_slice().iter().fold(0, |kind, field| kind << TYPE_BITS | datatype(*field))
}

/// The flags of a set, as the kernel gives them back.
pub(super) fn flags(kind: SetKind) -> u32 {
    [
        (kind.key.as_slice().len() > 1, CONCATENATED),
        (kind.ranges, INTERVAL),
        (kind.data != Data::None, MAP),
        (kind.dynamic.is_some(), DYNAMIC),
        (kind.dynamic.is_some_and(|dynamic| dynamic.timeout), TIMEOUT),
    ]
    .into_iter()
    .filter(|(has, _)| *has)
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// `nft add element TABLE SET { … }` or `delete`, in as many messages as it takes.
fn elements(table: TableKey, set: Name, kind: SetKind, elements: &[&Element], what: u16) -> Vec<Request> {
    let flags = if what == NEW_ELEMENTS { NLM_F_CREATE } else { 0 };
    let send = |some: &[&Element]| {
        // NFTA_SET_ELEM_LIST_SET, _ELEMENTS
        let list = |list| some.iter().fold(list, |list, element| put(list, element, kind, what == NEW_ELEMENTS));
        Request::raw(message(what), flags, start(table).text(2, set.as_str()).nested(3, list).into_bytes())
    };
    elements.chunks(IN_A_MESSAGE).map(send).collect()
}

/// One element. To delete it its key is enough. A range of one field is two for the kernel: its first value, and the one
/// behind its last.
fn put(list: Attributes, element: &Element, kind: SetKind, with_data: bool) -> Attributes {
    let alone = length(kind.key) as usize;
    let (lowest, highest) = element.ends(kind);
    let (lowest, highest) = (&lowest[..alone], &highest[..alone]);
    let several = kind.key.as_slice().len() > 1;
    // NFTA_SET_ELEM_KEY, _DATA, _FLAGS, _KEY_END
    let list = list.nested(LIST_ELEMENT, |one| {
        let one = one.nested(1, |key| key.bytes(DATA_VALUE, lowest));
        let one = one.maybe((kind.ranges && several).then_some(highest), |one, highest| {
            one.nested(10, |key| key.bytes(DATA_VALUE, highest))
        });
        match kind.data {
            Data::Fields(fields) if with_data => {
                let (_, data) = element.split(kind);
                one.nested(2, |to| to.bytes(DATA_VALUE, &data[..length(fields) as usize]))
            }
            Data::Verdict if with_data => {
                one.maybe(element.verdict(kind), |one, verdict| one.nested(2, |to| verdict_data(to, verdict)))
            }
            _ => one,
        }
    });
    let behind = (kind.ranges && !several).then(|| next(highest)).flatten();
    list.maybe(behind, |list, behind| {
        list.nested(LIST_ELEMENT, |one| one.nested(1, |key| key.bytes(DATA_VALUE, &behind)).number(3, INTERVAL_END))
    })
}

/// The value behind this; `None` when there is none.
fn next(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    for byte in bytes.iter_mut().rev() {
        let (sum, over) = byte.overflowing_add(1);
        *byte = sum;
        if !over {
            return Some(bytes);
        }
    }
    None
}

/// `nft add rule TABLE CHAIN … comment "…"`.
fn make_rule(table: TableKey, chain: &str, rule: &Rule) -> Request {
    let place = start(table).text(RULE_CHAIN, chain);
    Request::raw(message(NEW_RULE), NLM_F_CREATE | NLM_F_APPEND, with_rule(place, rule).into_bytes())
}

/// A message about a table: its name is attribute 1 of every kind.
pub(super) fn start(table: TableKey) -> Attributes {
    Attributes::message(nfproto(table.family()), 0).text(1, table.name())
}
