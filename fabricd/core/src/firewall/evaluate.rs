//! [`evaluate`]: what the rules make of a packet.
//!
//! An accept ends one base chain, a drop ends the packet; so each base chain is evaluated by itself, the later ones also
//! after a drop: all that stand in the way are told. Where it is open whether a rule applies, both outcomes are
//! followed: what would then be decided is noted, and the walk goes on as if it didn't apply. A drop that is certain
//! whatever the open conditions are is a drop.

use super::bits::{Bits, Tristate, Unknown};
use super::fields::{PacketMeta, Tracking, holds, load};
use super::packet::{Connection, Packet};
use super::{Base, Chain, Decision, Destination, Element, Firewall, Hook, Rule, Set, Step, Table, TableKind, Value};

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No chain drops it.
    Passes,
    /// These drop it, each by itself.
    Dropped(Vec<Blocked>),
    /// These may drop it.
    Unknown(Vec<PossibleDrop>),
}

/// What drops a packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Blocked {
    /// The kind of the table.
    pub kind: TableKind,
    /// The table.
    pub table: String,
    /// The base chain by which the packet came.
    pub base: String,
    /// Where that is.
    pub hook: Hook,
    /// The chain.
    pub chain: String,
    /// The rule; none when it is the chain's policy.
    pub rule: Option<Place>,
}

/// A rule in its chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The first is 1.
    pub number: usize,
    /// Its handle, if it has one.
    pub handle: Option<u64>,
    /// What it says.
    pub text: String,
}

/// What may drop a packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PossibleDrop {
    /// What.
    pub by: Blocked,
    /// What isn't known.
    pub because: Unknown,
}

/// Where connection tracking stands (`NF_IP_PRI_CONNTRACK`).
const CONNTRACK: i32 = -200;

/// What the rules make of a packet.
#[must_use]
pub fn evaluate(firewall: &Firewall, packet: &Packet) -> Verdict {
    let Walk { dropped, doubts, .. } = Walk::through(firewall, packet);
    match (dropped.is_empty(), doubts.is_empty()) {
        (false, _) => Verdict::Dropped(dropped),
        (true, false) => Verdict::Unknown(doubts),
        (true, true) => Verdict::Passes,
    }
}

/// A rule whose decision on the packet hangs on the state of its connection, so that it matters whether it is tracked.
#[must_use]
pub fn state_decides(firewall: &Firewall, packet: &Packet) -> Option<Blocked> {
    let open = Packet { connection: Connection::Open, ..packet.clone() };
    let doubts = Walk::through(firewall, &open).doubts;
    doubts.into_iter().find(|doubt| doubt.because == Unknown::State).map(|doubt| doubt.by)
}

/// What the rules may do to a packet, whatever is left open of it.
pub(super) struct Effects {
    /// What drops it, or may.
    pub(super) drops: Vec<Blocked>,
    /// What changes it, or may.
    pub(super) changes: Vec<Blocked>,
}

/// What the rules may do to a packet.
#[must_use]
pub(super) fn effects(firewall: &Firewall, packet: &Packet) -> Effects {
    let Walk { dropped, doubts, changes, .. } = Walk::through(firewall, packet);
    let drops = dropped.into_iter().chain(doubts.into_iter().map(|doubt| doubt.by)).collect();
    Effects { drops, changes }
}

/// A packet on its way through the chains.
struct Walk<'a> {
    packet: &'a Packet,
    meta: PacketMeta,
    dropped: Vec<Blocked>,
    doubts: Vec<PossibleDrop>,
    /// Rules that change it, or may.
    changes: Vec<Blocked>,
    /// Why it may have passed the base chain that it is in.
    may_have_passed: Option<Unknown>,
}

/// A base chain with its table and name.
type BaseChain<'a> = (Base, &'a Table, &'a str, &'a Chain);

/// How a chain ends.
enum End {
    Accept,
    Drop(Blocked),
    Return,
}

/// Where a rule is.
#[derive(Clone, Copy)]
struct At<'a> {
    table: &'a Table,
    base: (&'a str, Base),
    chain: &'a str,
    depth: usize,
}

/// The kernel allows 16 jumps within each other (`NFT_JUMP_STACK_SIZE`), iptables-legacy as many as there are chains.
const DEPTH: usize = 64;

impl<'a> Walk<'a> {
    fn new(packet: &'a Packet) -> Self {
        let meta = PacketMeta { mark: Bits::known([0; 4]), tracking: Tracking::NotYet };
        Self { packet, meta, dropped: vec![], doubts: vec![], changes: vec![], may_have_passed: None }
    }

    fn through(firewall: &'a Firewall, packet: &'a Packet) -> Self {
        let mut walk = Self::new(packet);
        for hook in packet.path.hooks() {
            let mut chains: Vec<BaseChain<'a>> = vec![];
            for table in firewall.tables.iter().filter(|table| table.kind.sees(packet.family())) {
                for (name, chain) in &table.chains {
                    let base = chain.base.filter(|base| base.hook == *hook);
                    chains.extend(base.map(|base| (base, table, name.as_str(), chain)));
                }
            }
            chains.sort_by_key(|(base, ..)| base.priority);
            for same in chains.chunk_by(|(one, ..), (other, ..)| one.priority == other.priority) {
                walk.base_chains(same);
            }
        }
        walk
    }

    /// Chains of one priority. The kernel calls last registered ones first, which can't be read off them: what one of
    /// them changes of the packet, the others may see or not.
    fn base_chains(&mut self, chains: &[BaseChain<'a>]) {
        let [(base, ..), _, ..] = chains else {
            return chains.iter().for_each(|chain| self.base_chain(chain));
        };
        self.comes_to(*base);
        let start = self.meta.clone();
        let ends: Vec<PacketMeta> = chains
            .iter()
            .map(|chain| {
                let mut alone = Walk { meta: start.clone(), ..Walk::new(self.packet) };
                alone.base_chain(chain);
                alone.meta
            })
            .collect();
        let mut after = start.clone();
        for (number, chain) in chains.iter().enumerate() {
            let others = ends.iter().enumerate().filter(|(other, _)| *other != number);
            let seen = others.fold(start.clone(), |seen, (_, end)| seen.or(&start, end));
            self.meta = seen.clone();
            self.base_chain(chain);
            after = match (after == start, self.meta == seen) {
                (_, true) => after,
                (true, false) => self.meta.clone(),
                (false, false) => after.or(&seen, &self.meta),
            };
        }
        self.meta = after;
    }

    /// Connection tracking is behind the packet, or isn't.
    fn comes_to(&mut self, base: Base) {
        let later = !matches!(base.hook, Hook::Prerouting | Hook::Output) || base.priority >= CONNTRACK;
        if later && self.meta.tracking == Tracking::NotYet {
            self.meta.tracking = match self.packet.connection {
                Connection::Untracked => Tracking::Untracked,
                _ => Tracking::Tracked,
            };
        }
    }

    fn base_chain(&mut self, &(base, table, name, chain): &BaseChain<'a>) {
        self.comes_to(base);
        self.may_have_passed = None;
        let place = At { table, base: (name, base), chain: name, depth: 0 };
        let end = match self.chain(place, chain, None) {
            End::Return if base.drops => End::Drop(place.blocked(None)),
            end => end,
        };
        if let End::Drop(by) = end {
            match self.may_have_passed.take() {
                None => self.dropped.push(by),
                Some(because) => self.doubts.push(PossibleDrop { by, because }),
            }
        }
    }

    /// Follows a chain. Under a doubt what it decides is noted, and it always ends as if nothing had been.
    fn chain(&mut self, at: At<'a>, chain: &'a Chain, doubt: Option<Unknown>) -> End {
        let mut doubt = doubt;
        for (number, rule) in (1..).zip(&chain.rules) {
            let (decision, applies) = match self.rule(at, rule, doubt.is_none()) {
                None | Some((_, Tristate::No)) => continue,
                Some((decision, Tristate::Yes)) => (decision, None),
                Some((decision, Tristate::Maybe(why))) => (decision, Some(why)),
            };
            let is_sure = applies.is_none();
            // Why it is open whether the packet comes here and the rule applies.
            let open = match (&doubt, applies) {
                (None, applies) => applies,
                (Some(doubt), None) => Some(doubt.clone()),
                (Some(doubt), Some(why)) => Some(doubt.clone().min(why)),
            };
            let blocked = || at.blocked(Some((number, rule)));
            if rule.changes_packets() {
                self.changes.push(blocked());
            }
            match decision {
                Decision::Continue => {}
                Decision::Accept => match open {
                    None => return End::Accept,
                    Some(why) => self.may_pass(why),
                },
                Decision::Drop(_) => match open {
                    None => return End::Drop(blocked()),
                    Some(because) => self.doubts.push(PossibleDrop { by: blocked(), because }),
                },
                Decision::Elsewhere(ref words) => {
                    let words = Unknown::Condition(words.clone());
                    let because = open.clone().map_or(words.clone(), |why| why.min(words));
                    self.doubts.push(PossibleDrop { by: blocked(), because: because.clone() });
                    // It may be let through by whoever decides, and is seen by no further rule of this chain.
                    self.may_pass(because);
                    if open.is_none() {
                        return End::Accept;
                    }
                }
                Decision::Return => match open {
                    None => return End::Return,
                    Some(why) => doubt = Some(why),
                },
                Decision::Jump(ref target) | Decision::Goto(ref target) => {
                    let goes_back = matches!(decision, Decision::Jump(_));
                    let end = self.called(at, target, open.clone());
                    match (end, goes_back) {
                        (End::Return, true) => {}
                        (End::Return, false) => match open {
                            None => return End::Return,
                            Some(why) => doubt = Some(why),
                        },
                        (end, _) => return end,
                    }
                }
            }
            // Under a doubt, what is certain for those that come here ends the walk.
            let is_final = matches!(decision, Decision::Accept | Decision::Drop(_) | Decision::Return);
            if doubt.is_some() && is_sure && is_final {
                return End::Return;
            }
        }
        End::Return
    }

    fn called(&mut self, at: At<'a>, target: &str, doubt: Option<Unknown>) -> End {
        let Some((name, chain)) = at.table.chains.get_key_value(target).filter(|_| at.depth < DEPTH) else {
            let because = Unknown::Condition(format!("chain {target}, which was not read"));
            self.doubts.push(PossibleDrop { by: at.blocked(None), because: because.clone() });
            self.may_pass(because);
            return End::Return;
        };
        self.chain(At { chain: name, depth: at.depth + 1, ..at }, chain, doubt)
    }

    fn may_pass(&mut self, why: Unknown) {
        self.may_have_passed = self.may_have_passed.take().into_iter().chain([why]).min();
    }

    /// What a rule decides, and whether it applies. `certain`: whether the packet comes here for sure.
    fn rule(&mut self, at: At<'a>, rule: &Rule, certain: bool) -> Option<(Decision, Tristate)> {
        let hook = at.base.1.hook;
        let mut registers = Bits::known(vec![0; 64]);
        let mut applies = Tristate::Yes;
        let mut decision = Decision::Continue;
        for step in &rule.steps {
            let condition = match step {
                Step::Load { field, len, to } => match load(field, *len, self.packet, hook, &self.meta) {
                    None => Tristate::No,
                    Some(bits) => {
                        set(&mut registers, *to, &bits);
                        Tristate::Yes
                    }
                },
                Step::Constant { data, to } => {
                    set(&mut registers, *to, &Bits::known(data.clone()));
                    Tristate::Yes
                }
                Step::Bitwise { from, to, mask, xor } => {
                    let bits = registers.part((*from).into(), mask.len()).bitwise(mask, xor);
                    set(&mut registers, *to, &bits);
                    Tristate::Yes
                }
                Step::SwapBytes { from, to, len, size } => {
                    let bits = registers.part((*from).into(), (*len).into()).swapped((*size).into());
                    set(&mut registers, *to, &bits);
                    Tristate::Yes
                }
                Step::Compare { register, how, with } => {
                    registers.part((*register).into(), with.len()).compare(*how, with)
                }
                Step::Range { register, low, high, inverted } => {
                    registers.part((*register).into(), low.len()).within(low, high).inverted(*inverted)
                }
                Step::Lookup { register, set: name, inverted, to } => match at.table.sets.get(name) {
                    None => Tristate::Maybe(Unknown::Condition(format!("set {name}, which was not read"))),
                    Some(found) => {
                        let (holds, value) = look_up(found, &registers, (*register).into());
                        match (to, value) {
                            (Destination::Verdict, Some(Value::Decision(verdict))) => decision = verdict.clone(),
                            (Destination::Verdict, None) if holds != Tristate::No => {
                                decision = Decision::Elsewhere(format!("map {name}"));
                            }
                            (Destination::Register(to), Some(Value::Data(data))) => {
                                set(&mut registers, *to, &Bits::known(data.clone()));
                            }
                            (Destination::Register(to), None) => {
                                let why = Unknown::Condition(format!("map {name}"));
                                set(&mut registers, *to, &Bits::open(16, why));
                            }
                            _ => {}
                        }
                        holds.inverted(*inverted)
                    }
                },
                Step::Test { test, inverted } => holds(test, self.packet, hook, &self.meta).inverted(*inverted),
                // Whatever it may have loaded isn't known either.
                Step::Opaque(words) => {
                    registers = Bits::open(64, Unknown::Condition(words.clone()));
                    Tristate::Maybe(Unknown::Condition(words.clone()))
                }
                Step::SetMark(register) => {
                    let mark = registers.part((*register).into(), 4);
                    self.mark(mark, &applies, certain);
                    Tristate::Yes
                }
                Step::ChangeMark { clear, xor } => {
                    let mark = self.meta.mark.bitwise(&(!clear).to_ne_bytes(), &xor.to_ne_bytes());
                    self.mark(mark, &applies, certain);
                    Tristate::Yes
                }
                Step::Change(_) => Tristate::Yes,
                Step::Notrack => {
                    if self.meta.tracking == Tracking::NotYet {
                        self.meta.tracking = match &applies {
                            Tristate::Maybe(why) => Tracking::Maybe(why.clone()),
                            _ if certain => Tracking::Untracked,
                            _ => Tracking::Maybe(Unknown::Condition("notrack".to_owned())),
                        };
                    }
                    Tristate::Yes
                }
                Step::Decide(verdict) => {
                    decision = verdict.clone();
                    Tristate::Yes
                }
            };
            applies = applies.and(|| condition);
            if applies == Tristate::No {
                return None;
            }
            if decision != Decision::Continue {
                break;
            }
        }
        Some((decision, applies))
    }

    fn mark(&mut self, mark: Bits, applies: &Tristate, certain: bool) {
        self.meta.mark = match applies {
            Tristate::Yes if certain => mark,
            Tristate::Maybe(why) => Bits::open(4, why.clone()),
            _ => Bits::open(4, Unknown::Condition("meta mark".to_owned())),
        };
    }
}

/// The kernel fills up with zeros to the next multiple of four bytes.
fn set(registers: &mut Bits, to: u8, bits: &Bits) {
    registers.put(to.into(), &bits.part(0, bits.len().next_multiple_of(4)));
}

/// Whether a key is in a set, and the value that a map has for it, if that is known.
fn look_up<'a>(set: &'a Set, registers: &Bits, register: usize) -> (Tristate, Option<&'a Value>) {
    let in_element = |element: &Element| match set.fields.is_empty() {
        true => registers.part(register, element.low.len()).within(&element.low, &element.high),
        false => {
            let (mut at, mut found) = (0, Tristate::Yes);
            for len in set.fields.iter().map(|len| usize::from(*len)) {
                let Some((low, high)) = element.low.get(at..at + len).zip(element.high.get(at..at + len)) else {
                    return Tristate::No;
                };
                found = found.and(|| registers.part(register + at, len).within(low, high));
                at += len.next_multiple_of(4);
            }
            found
        }
    };
    let mut open: Option<Unknown> = None;
    for element in candidates(set, registers, register) {
        match in_element(element) {
            // An element before it may have been meant.
            Tristate::Yes if open.is_none() => return (Tristate::Yes, element.value.as_ref()),
            Tristate::Yes => return (Tristate::Yes, None),
            Tristate::Maybe(why) => open = Some(open.map_or_else(|| why.clone(), |before| before.min(why.clone()))),
            Tristate::No => {}
        }
    }
    let rest = if set.dynamic { Some(Unknown::Condition("a set that packets fill".to_owned())) } else { open };
    match (rest, &set.catch_all) {
        (None, Some(all)) => (Tristate::Yes, all.value.as_ref()),
        (None, None) => (Tristate::No, None),
        (Some(_), Some(_)) => (Tristate::Yes, None),
        (Some(why), None) => (Tristate::Maybe(why), None),
    }
}

/// The elements that a key may be in: of thousands, and a key that is known, the one in question.
fn candidates<'a>(set: &'a Set, registers: &Bits, register: usize) -> &'a [Element] {
    let Some(len) = set.elements.first().map(|element| element.low.len()) else { return &[] };
    let key = registers.part(register, len);
    match (key.exact(), set.fields.is_empty()) {
        (Some(key), true) => {
            let behind = set.elements.partition_point(|element| element.low.as_slice() <= key);
            &set.elements[behind.saturating_sub(1)..behind]
        }
        _ => &set.elements,
    }
}

impl At<'_> {
    fn blocked(self, rule: Option<(usize, &Rule)>) -> Blocked {
        Blocked {
            kind: self.table.kind,
            table: self.table.name.clone(),
            base: self.base.0.to_owned(),
            hook: self.base.1.hook,
            chain: self.chain.to_owned(),
            rule: rule.map(|(number, rule)| Place { number, handle: rule.handle, text: rule.to_string() }),
        }
    }
}
