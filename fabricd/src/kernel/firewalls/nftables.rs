//! Tables of nftables, those of iptables-nft among them: `nft list chains`, and `nft list chain` and `nft list set` for
//! what is reached.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use fabric_core::firewall::{Base, Chain, Decision, Element, Firewall, Hook, Rule, Set, Step, Table, TableKind, Value};
use fabric_netlink::{Frame, Request, RequestSocket};

use super::expressions::{decision, steps};
use crate::kernel::nft::uapi::{
    CATCH_ALL, CONCATENATED, DROP, DYNAMIC, GET_CHAIN, GET_ELEMENTS, GET_RULE, GET_SET, INTERVAL, INTERVAL_END, message,
};
use crate::kernel::nft::{Attributes, Nfnetlink as _, Values, comment, concerned, lacks_nftables};

/// A table by its family number and name.
type Key = (u8, String);

/// All that packets of ours meet.
pub(super) fn read(socket: &mut RequestSocket) -> io::Result<Firewall> {
    let mut firewall = Firewall::default();
    let listing = Request::raw(message(GET_CHAIN), 0, Attributes::message(0, 0).into_bytes());
    let listed = match socket.dump(&listing, base_chain) {
        // A kernel whose nftables nobody has loaded has no chains.
        Err(error) if lacks_nftables(&error) => return Ok(firewall),
        listed => listed?,
    };
    let mut tables: BTreeMap<Key, Vec<(String, Base)>> = BTreeMap::new();
    for found in listed {
        match found {
            Found::Judged(table, name, base) => tables.entry(table).or_default().push((name, base)),
            Found::Unread(words) => drop(firewall.unread.insert(words)),
        }
    }
    for ((family, name), bases) in tables {
        firewall.tables.extend(read_table(socket, family, name, bases)?);
    }
    Ok(firewall)
}

/// A base chain of others.
enum Found {
    Judged(Key, String, Base),
    /// Of a family or a hook that nobody judges here.
    Unread(String),
}

fn base_chain(frame: &Frame<'_>) -> Option<Found> {
    let family = *frame.body.first()?;
    let values = Values::of(frame);
    let hook = values.nested(4)?;
    let (table, name) = (values.text(1)?, values.text(3)?);
    // NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE
    let (policy, kind) = (values.number(5), values.text(7)?);
    if concerned(frame).is_some() || kind == "nat" {
        return None;
    }
    let hooks = [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];
    let number = usize::try_from(hook.number(1)?).ok()?;
    let word = match i32::from(family) {
        libc::NFPROTO_INET | libc::NFPROTO_IPV4 | libc::NFPROTO_IPV6 => match hooks.get(number) {
            Some(hook_found) => {
                let priority = hook.number(2)?.cast_signed();
                let base = Base { hook: *hook_found, priority, drops: policy == Some(DROP) };
                return Some(Found::Judged((family, table.to_owned()), name.to_owned(), base));
            }
            None => "inet",
        },
        libc::NFPROTO_BRIDGE => "bridge",
        libc::NFPROTO_NETDEV => "netdev",
        _ => return None,
    };
    Some(Found::Unread(format!("{word} {table} {name}")))
}

/// `None` for a table that went meanwhile: the generation tells that it is read again.
fn read_table(
    socket: &mut RequestSocket,
    family: u8,
    name: String,
    bases: Vec<(String, Base)>,
) -> io::Result<Option<Table>> {
    let kind = match i32::from(family) {
        libc::NFPROTO_INET => TableKind::Inet,
        libc::NFPROTO_IPV4 => TableKind::Ip,
        _ => TableKind::Ip6,
    };
    let mut table = Table { kind, name, chains: BTreeMap::new(), sets: BTreeMap::new() };
    let mut next: Vec<(String, Option<Base>)> = bases.into_iter().map(|(name, base)| (name, Some(base))).collect();
    let mut sets: BTreeSet<String> = BTreeSet::new();
    while let Some((chain, base)) = next.pop() {
        if table.chains.contains_key(&chain) {
            continue;
        }
        let place = Attributes::message(family, 0).text(1, &table.name).text(2, &chain);
        let decode = |frame: &Frame<'_>| rule(frame, &table.name, &chain);
        let rules = match socket.dump(&Request::raw(message(GET_RULE), 0, place.into_bytes()), decode) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            rules => rules?,
        };
        for step in rules.iter().flat_map(|rule| &rule.steps) {
            match step {
                Step::Decide(decision) => next.extend(target(decision)),
                Step::Lookup { set: name, .. } if sets.insert(name.clone()) => {
                    let set = read_set(socket, family, &table.name, name)?;
                    let elements = set.elements.iter().chain(&set.catch_all);
                    next.extend(elements.filter_map(|element| match &element.value {
                        Some(Value::Decision(decision)) => target(decision),
                        _ => None,
                    }));
                    table.sets.insert(name.clone(), set);
                }
                _ => {}
            }
        }
        table.chains.insert(chain, Chain { base, rules });
    }
    Ok(Some(table))
}

fn target(decision: &Decision) -> Option<(String, Option<Base>)> {
    match decision {
        Decision::Jump(chain) | Decision::Goto(chain) => Some((chain.clone(), None)),
        _ => None,
    }
}

fn rule(frame: &Frame<'_>, table: &str, chain: &str) -> Option<Rule> {
    let values = Values::of(frame);
    // A kernel that doesn't filter dumps shows those of all chains.
    (values.text(1)? == table && values.text(2)? == chain).then_some(())?;
    let family = *frame.body.first()?;
    Some(Rule {
        handle: values.bytes(3).and_then(|bytes| Some(u64::from_be_bytes(bytes.try_into().ok()?))),
        comment: comment(&values).map(str::to_owned),
        steps: values.nested(4).map(|list| steps(&list, i32::from(family) == libc::NFPROTO_IPV6)).unwrap_or_default(),
    })
}

fn read_set(socket: &mut RequestSocket, family: u8, table: &str, name: &str) -> io::Result<Set> {
    let place = || Attributes::message(family, 0).text(1, table).text(2, name).into_bytes();
    let declared = socket.ask(&Request::raw(message(GET_SET), 0, place()), |frame| {
        let values = Values::of(frame);
        // NFTA_SET_DESC, NFTA_SET_DESC_CONCAT, NFTA_SET_FIELD_LEN
        let concat = values.nested(9).and_then(|desc| desc.nested(2));
        let fields = concat.iter().flat_map(Values::list).filter_map(|field| u8::try_from(field.number(1)?).ok());
        Some((values.number(3).unwrap_or(0), fields.collect::<Vec<u8>>()))
    })?;
    let Some((flags, fields)) = declared else { return Ok(Set { dynamic: true, ..Set::default() }) };
    let listing = Request::raw(message(GET_ELEMENTS), 0, place());
    let elements = socket.dump(&listing, |frame| {
        let list = Values::of(frame).nested(3)?;
        Some(list.list().filter_map(|element| one_element(&element)).collect::<Vec<_>>())
    })?;
    let (all, elements): (Vec<_>, Vec<_>) =
        elements.into_iter().flatten().partition(|(flags, _)| flags & CATCH_ALL != 0);
    let is_both = flags & (INTERVAL | CONCATENATED) == INTERVAL | CONCATENATED;
    let mut elements = elements;
    elements.sort_by(|(_, one), (_, other)| one.low.cmp(&other.low));
    Ok(Set {
        elements: match flags & INTERVAL != 0 && !is_both {
            true => intervals(elements),
            false => elements.into_iter().map(|(_, element)| element).collect(),
        },
        catch_all: all.into_iter().next().map(|(_, element)| element),
        fields: if is_both { fields } else { vec![] },
        dynamic: flags & DYNAMIC != 0,
    })
}

/// An element's flags, and what it is: the smallest and the largest key, the same where there is no other.
fn one_element(element: &Values<'_>) -> Option<(u32, Element)> {
    let flags = element.number(3).unwrap_or(0);
    let key = |kind| element.nested(kind).and_then(|key| key.bytes(1)).map(<[u8]>::to_vec);
    let low = if flags & CATCH_ALL == 0 { key(1)? } else { vec![] };
    let high = key(10).unwrap_or_else(|| low.clone());
    // NFTA_DATA_VALUE, NFTA_DATA_VERDICT
    let value = element.nested(2).and_then(|data| match (data.bytes(1), data.nested(2)) {
        (Some(bytes), _) => Some(Value::Data(bytes.to_vec())),
        (None, Some(verdict)) => Some(Value::Decision(decision(&verdict)?)),
        (None, None) => None,
    });
    Some((flags, Element { low, high, value }))
}

/// The kernel gives where an interval begins, and where the first key behind it is.
fn intervals(bounds: Vec<(u32, Element)>) -> Vec<Element> {
    let ends: Vec<Option<Vec<u8>>> =
        bounds.iter().skip(1).map(|(_, next)| Some(before(&next.low))).chain([None]).collect();
    let starts = bounds.into_iter().zip(ends).filter(|((flags, _), _)| flags & INTERVAL_END == 0);
    starts
        .map(|((_, element), end)| Element { high: end.unwrap_or_else(|| vec![0xff; element.low.len()]), ..element })
        .collect()
}

/// The key before, as a number whose first byte counts most.
fn before(key: &[u8]) -> Vec<u8> {
    let mut key = key.to_vec();
    for byte in key.iter_mut().rev() {
        let (less, borrowed) = byte.overflowing_sub(1);
        *byte = less;
        if !borrowed {
            break;
        }
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_end_before_the_next_bound() {
        let bound = |flags, low: [u8; 2]| (flags, Element { low: low.to_vec(), high: low.to_vec(), value: None });
        let found = intervals(vec![bound(0, [0, 10]), bound(INTERVAL_END, [1, 0]), bound(0, [2, 0])]);
        let ranges: Vec<_> = found.iter().map(|element| (element.low.as_slice(), element.high.as_slice())).collect();
        assert_eq!(ranges, [(&[0, 10][..], &[0, 255][..]), (&[2, 0][..], &[255, 255][..])]);
    }
}
