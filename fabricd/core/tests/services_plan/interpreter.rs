//! The rules of a table, taken on packets as the kernel takes them: so that what is planned can be judged without a kernel.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use fabric_core::model::{Family, stable_hash, to_bits};
use fabric_core::state::nft::{
    CtField, Data, Direction, Field, Match, Name, Reject, Rule, Set, Step, Table, Test, Update, Verdict,
};

/// A packet, with what is remembered of its connection.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub source: IpAddr,
    pub target: IpAddr,
    pub protocol: u8,
    pub port: u16,
    /// Where its connection was addressed to, before any translation.
    pub original: (IpAddr, u16),
    pub ct_state: u32,
    pub ct_status: u32,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passes,
    Dropped,
    Rejected(Reject),
    Translated(IpAddr, u16),
    Masqueraded,
}

/// Bytes of a key, and of what it leads to.
type Elements = BTreeMap<Vec<u8>, Vec<u8>>;

/// A table at work.
pub struct Machine<'t> {
    table: &'t Table,
    elements: HashMap<Name, Elements>,
    /// The next number below another.
    random: Box<dyn FnMut(u32) -> u32 + 't>,
    /// The next turn of each rule that counts, by where the rule is.
    turns: HashMap<usize, u32>,
    /// Where the rule is that a packet is at.
    at: usize,
}

/// Where a packet goes on after a rule or a chain.
enum Then {
    Next,
    Goes(Verdict),
    Done(Outcome),
}

impl<'t> Machine<'t> {
    pub fn new(table: &'t Table, random: impl FnMut(u32) -> u32 + 't) -> Self {
        let split = |set: &Set| {
            let elements = set.elements.keys().map(|element| element.split(set.kind));
            elements.map(|(key, data)| (key.to_vec(), data.to_vec())).collect()
        };
        let elements = table.sets.iter().map(|(name, set)| (*name, split(set))).collect();
        Self { table, elements, random: Box::new(random), turns: HashMap::new(), at: 0 }
    }

    /// What a chain makes of a packet.
    pub fn run(&mut self, chain: &str, packet: &Packet) -> Outcome {
        self.chain(chain, packet).unwrap_or(Outcome::Passes)
    }

    /// `None` at its end.
    fn chain(&mut self, name: &str, packet: &Packet) -> Option<Outcome> {
        let table = self.table;
        for rule in table.chains.get(name).unwrap_or_else(|| panic!("there is no chain {name}")).rules() {
            match self.rule(rule, packet) {
                Then::Next => {}
                Then::Goes(Verdict::Jump(to)) => {
                    if let Some(outcome) = self.chain(to.as_str(), packet) {
                        return Some(outcome);
                    }
                }
                Then::Goes(Verdict::Goto(to)) => return self.chain(to.as_str(), packet),
                Then::Goes(Verdict::Return) => return None,
                Then::Goes(Verdict::Accept) => return Some(Outcome::Passes),
                Then::Goes(Verdict::Drop) => return Some(Outcome::Dropped),
                Then::Done(outcome) => return Some(outcome),
            }
        }
        None
    }

    fn rule(&mut self, rule: &Rule, packet: &Packet) -> Then {
        let mut values: Vec<Vec<u8>> = vec![];
        self.at = std::ptr::from_ref(rule).addr();
        for step in &rule.steps {
            match step {
                Step::Match(condition) => {
                    if !self.holds(condition, packet, &values) {
                        return Then::Next;
                    }
                }
                Step::Lookup { key, map, data } => {
                    let Some(key) = self.key(key, packet, &values) else { return Then::Next };
                    let Some(found) = self.elements[map].get(&key) else { return Then::Next };
                    let mut at = 0;
                    for field in data.as_slice() {
                        values.push(found[at..at + field.padded()].to_vec());
                        at += field.padded();
                    }
                }
                Step::VerdictMap { key, map } => {
                    let Some(key) = self.key(key, packet, &values) else { return Then::Next };
                    let kind = self.table.sets[map].kind;
                    assert_eq!(kind.data, Data::Verdict);
                    let mut all = self.table.sets[map].elements.keys();
                    let found =
                        all.find(|element| element.split(kind).0 == key).and_then(|element| element.verdict(kind));
                    let Some(verdict) = found else { return Then::Next };
                    return Then::Goes(verdict);
                }
                Step::Update { how, set, key, data, .. } => {
                    let key = self.key(key, packet, &values).expect("a key that can be read");
                    let data = self.key(data, packet, &values).expect("data that can be read");
                    let elements = self.elements.entry(*set).or_default();
                    match how {
                        Update::Add | Update::Refresh => drop(elements.entry(key).or_insert(data)),
                        Update::Delete => drop(elements.remove(&key)),
                    }
                }
                Step::Dnat { address, port, .. } => {
                    let bytes = self.field(*address, packet, &values).expect("an address");
                    let ip = match *bytes {
                        [a, b, c, d] => IpAddr::from([a, b, c, d]),
                        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).expect("an address of IPv6")),
                    };
                    let port = self.field(port.expect("a port"), packet, &values).expect("a port");
                    return Then::Done(Outcome::Translated(ip, u16::from_be_bytes([port[0], port[1]])));
                }
                Step::Masquerade => return Then::Done(Outcome::Masqueraded),
                Step::Reject(how) => return Then::Done(Outcome::Rejected(*how)),
                Step::Verdict(verdict) => return Then::Goes(*verdict),
                Step::Count => {}
                other => panic!("not interpreted: {other}"),
            }
        }
        Then::Next
    }

    fn holds(&mut self, condition: &Match, packet: &Packet, values: &[Vec<u8>]) -> bool {
        let Some(key) = self.key(&condition.fields, packet, values) else { return false };
        let number = || {
            let short = key.get(..4).unwrap_or(&key);
            match condition.fields[0] {
                Field::Protocol | Field::NetworkFamily => u32::from(short[0]),
                _ => u32::from_ne_bytes(short.try_into().expect("a number")),
            }
        };
        let ip = || match condition.fields[0] {
            Field::Source(_) => packet.source,
            Field::Target(_) => packet.target,
            other => panic!("{other} is no address"),
        };
        match &condition.test {
            Test::Is(wanted) => number() == *wanted,
            Test::IsNot(wanted) => number() != *wanted,
            Test::Bits(bits) => number() & bits == *bits,
            Test::AnyBit(bits) => number() & bits != 0,
            Test::NoBit(bits) => number() & bits == 0,
            Test::Within(prefix) => prefix.contains(ip()),
            Test::Outside(prefix) => !prefix.contains(ip()),
            Test::In(set) => self.has(*set, &key),
            Test::NotIn(set) => !self.has(*set, &key),
            Test::Named(name) => panic!("not interpreted: interface {name}"),
        }
    }

    fn has(&self, set: Name, key: &[u8]) -> bool {
        let kind = self.table.sets[&set].kind;
        if !kind.ranges {
            return self.elements[&set].contains_key(key);
        }
        self.table.sets[&set].elements.keys().any(|element| {
            let ((low, high), mut at) = (element.ends(kind), 0);
            kind.key.as_slice().iter().all(|field| {
                let part = at..at + field.padded();
                at = part.end;
                (&low[part.clone()]..=&high[part.clone()]).contains(&&key[part])
            })
        })
    }

    /// Fields side by side; `None` when one can't be read.
    fn key(&mut self, fields: &[Field], packet: &Packet, values: &[Vec<u8>]) -> Option<Vec<u8>> {
        let mut key = vec![];
        for field in fields {
            key.extend(self.field(*field, packet, values)?);
            key.resize(key.len().next_multiple_of(4), 0);
        }
        Some(key)
    }

    fn field(&mut self, field: Field, packet: &Packet, values: &[Vec<u8>]) -> Option<Vec<u8>> {
        let address = |family: Family, ip: IpAddr| (Family::of(ip) == family).then(|| bytes(ip));
        Some(match field {
            Field::NetworkFamily => vec![if packet.target.is_ipv4() { 2 } else { 10 }],
            Field::Protocol => vec![packet.protocol],
            Field::Source(family) => address(family, packet.source)?,
            Field::Target(family) => address(family, packet.target)?,
            Field::TargetPort => packet.port.to_be_bytes().to_vec(),
            Field::Ct(Direction::Original, CtField::Target(family)) => address(family, packet.original.0)?,
            Field::Ct(Direction::Original, CtField::TargetPort) => packet.original.1.to_be_bytes().to_vec(),
            Field::CtState => packet.ct_state.to_ne_bytes().to_vec(),
            Field::CtStatus => packet.ct_status.to_ne_bytes().to_vec(),
            Field::Random(below) => (self.random)(below).to_ne_bytes().to_vec(),
            Field::Increment(below) => {
                let turn = self.turns.entry(self.at).or_default();
                *turn += 1;
                ((*turn - 1) % below).to_ne_bytes().to_vec()
            }
            Field::SourceHash { family, slots, seed } => {
                let source = [address(family, packet.source)?, seed.to_be_bytes().to_vec()].concat();
                u32::try_from(stable_hash(&source) % u64::from(slots)).expect("below 2^32").to_ne_bytes().to_vec()
            }
            Field::Value(number) => values[usize::from(number)].clone(),
            other => panic!("not interpreted: {other}"),
        })
    }
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    let bits = to_bits(ip).to_be_bytes();
    bits[16 - usize::from(Family::of(ip).bits() / 8)..].to_vec()
}
