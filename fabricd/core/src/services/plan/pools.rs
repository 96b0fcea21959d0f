//! [`Pools`]: the endpoints that frontends lead to, by number.
//!
//! A pool never changes, so a packet that meets a change between two look-ups finds the whole of one or the whole of the
//! other. Frontends with equal endpoints share a pool, unless these have turns. Numbers count up, and after a restart each
//! pool has the number that the kernel has for these endpoints, so nothing is written.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::rows::{self, Map, Shape, Socket};
use crate::cow_map::CowSet;
use crate::model::Family;
use crate::services::balance::slots;
use crate::state::nft::{Element, Table};

/// Endpoints, by address and port.
type Content = Box<[Socket]>;

/// Something about pools, by shape and endpoints.
type ByContent<T> = HashMap<Shape, HashMap<Content, T>>;

/// The pools of one family.
#[derive(Debug)]
pub(super) struct Pools {
    family: Family,
    /// Number and users.
    known: ByContent<Pool>,
    /// Numbers that the kernel had at the start, of pools that nobody has asked for since.
    remembered: ByContent<u32>,
    numbers: Numbers,
}

#[derive(Clone, Copy, Debug)]
struct Pool {
    number: u32,
    users: u32,
    /// Those with session affinity.
    sticky: u32,
}

impl Pools {
    /// With the numbers that these elements have, of pools of these shapes.
    pub(super) fn remembering(family: Family, elements: &CowSet<Element>, shapes: &HashMap<u32, Shape>) -> Self {
        let mut contents: BTreeMap<u32, Vec<(u32, Socket)>> = BTreeMap::new();
        for (number, slot, socket) in elements.keys().filter_map(|element| rows::endpoint(family, element)) {
            contents.entry(number).or_default().push((slot, socket));
        }
        let numbers = Numbers::behind(contents.keys().next_back().copied());
        let mut remembered = ByContent::new();
        for (number, mut by_slot) in contents {
            let shape = shapes.get(&number).copied().unwrap_or(Shape::Shared);
            by_slot.sort_unstable();
            let sockets: Vec<Socket> = by_slot.into_iter().map(|(_, socket)| socket).collect();
            let mut content = sockets.clone();
            if shape == Shape::Hashed {
                content.sort_unstable();
                content.dedup();
                // Slots that another release has given away are nobody's.
                if slots(&content) != sockets {
                    continue;
                }
            }
            remembered.entry(shape).or_default().insert(content.into(), number);
        }
        Self { family, known: HashMap::new(), remembered, numbers }
    }

    /// The number of a pool with these endpoints, which are in order. It has one user more.
    pub(super) fn take(&mut self, shape: Shape, sockets: &[Socket], is_sticky: bool, table: &mut Table) -> u32 {
        let known = self.known.entry(shape).or_default();
        if !known.contains_key(sockets) {
            let number = self.remembered.get_mut(&shape).and_then(|remembered| remembered.remove(sockets));
            let number = self.numbers.take(number);
            known.insert(sockets.into(), Pool { number, users: 0, sticky: 0 });
            let all = elements(table, Map::Pools, self.family);
            each_slot(shape, sockets, |slot, socket| _ = all.insert(rows::slot(number, slot, socket), ()));
        }
        let pool = known.get_mut(sockets).expect("known by now");
        pool.users += 1;
        if is_sticky {
            pool.sticky += 1;
            if pool.sticky == 1 {
                let live = elements(table, Map::Live, self.family);
                live_of(pool.number, sockets).for_each(|element| _ = live.insert(element, ()));
            }
        }
        pool.number
    }

    /// The same, with one user less. With the last one the pool goes.
    pub(super) fn leave(&mut self, shape: Shape, sockets: &[Socket], is_sticky: bool, table: &mut Table) -> u32 {
        let known = self.known.entry(shape).or_default();
        let pool = known.get_mut(sockets).expect("who leaves it has taken it");
        pool.users -= 1;
        pool.sticky -= u32::from(is_sticky);
        let Pool { number, users, sticky } = *pool;
        if is_sticky && sticky == 0 {
            let live = elements(table, Map::Live, self.family);
            live_of(number, sockets).for_each(|element| _ = live.remove(&element));
        }
        if users == 0 {
            let all = elements(table, Map::Pools, self.family);
            each_slot(shape, sockets, |slot, socket| _ = all.remove(&rows::slot(number, slot, socket)));
            known.remove(sockets);
            if known.is_empty() {
                self.known.remove(&shape);
            }
            self.numbers.give_back(number);
        }
        number
    }

    /// Forgets the numbers of before the start: from now on a pool that nobody has is gone.
    pub(super) fn forget_remembered(&mut self) {
        self.remembered = HashMap::new();
        self.known.values_mut().for_each(HashMap::shrink_to_fit);
    }
}

/// The slots of a pool.
fn each_slot(shape: Shape, sockets: &[Socket], mut each: impl FnMut(u32, Socket)) {
    match shape {
        Shape::Shared | Shape::OfPort(_) => (0..).zip(sockets).for_each(|(slot, socket)| each(slot, *socket)),
        Shape::Hashed => (0..).zip(slots(sockets)).for_each(|(slot, socket)| each(slot, socket)),
    }
}

/// Numbers that count up: one that was given back comes again after half a billion others.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    taken: BTreeSet<u32>,
    last: u32,
}

impl Numbers {
    /// The last one: the bits above say how a pool is drawn from.
    const MOST: u32 = (1 << 29) - 1;

    /// From behind the last one that was in use before.
    pub(super) fn behind(last: Option<u32>) -> Self {
        Self { taken: BTreeSet::new(), last: last.unwrap_or(0) }
    }

    /// This number if it is free, or else the next.
    pub(super) fn take(&mut self, number: Option<u32>) -> u32 {
        if let Some(number) = number.filter(|number| self.taken.insert(*number)) {
            return number;
        }
        loop {
            self.last = if self.last < Self::MOST { self.last + 1 } else { 1 };
            if self.taken.insert(self.last) {
                return self.last;
            }
        }
    }

    pub(super) fn give_back(&mut self, number: u32) {
        self.taken.remove(&number);
    }
}

pub(super) fn elements(table: &mut Table, map: Map, family: Family) -> &mut CowSet<Element> {
    &mut table.sets.get_mut(&map.name(family)).expect("declared").elements
}

fn live_of(pool: u32, sockets: &[Socket]) -> impl Iterator<Item = Element> {
    sockets.iter().map(move |socket| rows::live(pool, *socket))
}
