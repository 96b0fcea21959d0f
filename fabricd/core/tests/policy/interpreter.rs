//! What a table does to a packet, step by step, as the kernel would.

use std::collections::BTreeMap;

use fabric_core::state::nft::{Data, Field, Match, Name, Place, Set, Step, Table, Test, Verdict};

/// What a field of a packet says, in the bytes of a set's key; `None` when the packet has no such field.
pub trait Packet {
    fn read(&self, field: Field) -> Option<Vec<u8>>;
}

/// A table, with its sets ready for looking things up.
pub struct Interpreter<'a> {
    table: &'a Table,
    sets: BTreeMap<Name, Looked<'a>>,
}

struct Looked<'a> {
    set: &'a Set,
    /// By key, with the verdict of a verdict map.
    exact: BTreeMap<&'a [u8], Option<Verdict>>,
}

/// What becomes of a packet in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Accept,
    Drop,
    /// It came to the end, or back.
    Continue,
}

impl<'a> Interpreter<'a> {
    pub fn new(table: &'a Table) -> Self {
        let sets = table.sets.iter().map(|(name, set)| {
            let elements = set.elements.keys().filter(|_| !set.kind.ranges);
            let exact = elements.map(|element| (element.split(set.kind).0, element.verdict(set.kind))).collect();
            (*name, Looked { set, exact })
        });
        Self { table, sets: sets.collect() }
    }

    /// Whether a packet passes the chains of this place.
    pub fn passes(&self, place: Place, packet: &impl Packet) -> bool {
        let mut chains =
            self.table.chains.iter().filter(|(_, chain)| chain.hook().is_some_and(|hook| hook.place == place));
        chains.all(|(name, _)| self.run(*name, packet, 0) != Outcome::Drop)
    }

    fn run(&self, chain: Name, packet: &impl Packet, depth: u8) -> Outcome {
        assert!(depth < 16, "the kernel follows 16 jumps (NFT_JUMP_STACK_SIZE)");
        let rules = self.table.chains[&chain].rules();
        'rules: for rule in rules {
            for step in &rule.steps {
                let verdict = match step {
                    Step::Match(condition) if self.holds(condition, packet) => continue,
                    Step::Match(_) => continue 'rules,
                    Step::VerdictMap { key, map } => match self.verdict(key, *map, packet) {
                        Some(verdict) => verdict,
                        None => continue 'rules,
                    },
                    Step::Count | Step::Limit { .. } | Step::Log { .. } => continue,
                    Step::Verdict(verdict) => *verdict,
                    other => panic!("not interpreted: {other}"),
                };
                match verdict {
                    Verdict::Accept => return Outcome::Accept,
                    Verdict::Drop => return Outcome::Drop,
                    Verdict::Return => return Outcome::Continue,
                    Verdict::Goto(chain) => return self.run(chain, packet, depth + 1),
                    Verdict::Jump(chain) => match self.run(chain, packet, depth + 1) {
                        Outcome::Continue => continue 'rules,
                        outcome => return outcome,
                    },
                }
            }
        }
        Outcome::Continue
    }

    fn holds(&self, condition: &Match, packet: &impl Packet) -> bool {
        let parts: Option<Vec<Vec<u8>>> = condition.fields.iter().map(|field| packet.read(*field)).collect();
        let Some(parts) = parts else { return false };
        let number = || parts[0].iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte));
        match &condition.test {
            Test::Is(wanted) => number() == *wanted,
            Test::AnyBit(bits) => number() & bits != 0,
            Test::Within(prefix) => prefix.contains(match <[u8; 16]>::try_from(&parts[0][..]) {
                Ok(bytes) => bytes.into(),
                Err(_) => <[u8; 4]>::try_from(&parts[0][..]).expect("an address").into(),
            }),
            Test::In(set) => self.contains(*set, &parts),
            Test::NotIn(set) => !self.contains(*set, &parts),
            other => panic!("not interpreted: {other:?}"),
        }
    }

    fn contains(&self, set: Name, parts: &[Vec<u8>]) -> bool {
        let Looked { set, exact } = &self.sets[&set];
        if !set.kind.ranges {
            return exact.contains_key(padded(parts).as_slice());
        }
        set.elements.keys().any(|element| {
            let (lowest, highest) = element.ends(set.kind);
            let mut at = 0;
            parts.iter().all(|part| {
                let bytes = at..at + part.len();
                at += part.len().next_multiple_of(4);
                lowest[bytes.clone()] <= part[..] && part[..] <= highest[bytes]
            })
        })
    }

    fn verdict(&self, key: &[Field], map: Name, packet: &impl Packet) -> Option<Verdict> {
        let parts: Vec<Vec<u8>> = key.iter().map(|field| packet.read(*field)).collect::<Option<_>>()?;
        let Looked { set, exact } = &self.sets[&map];
        assert_eq!(set.kind.data, Data::Verdict);
        exact.get(padded(&parts).as_slice()).copied().flatten()
    }
}

fn padded(parts: &[Vec<u8>]) -> Vec<u8> {
    let mut key = vec![];
    for part in parts {
        key.extend_from_slice(part);
        key.resize(key.len().next_multiple_of(4), 0);
    }
    key
}
