//! Bytes of which some bits are open, and comparisons with three outcomes.

use std::cmp::Ordering;
use std::fmt;

use super::Comparison;

/// What isn't known of a packet or a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unknown {
    /// The connection's state: the packet left it open.
    State,
    /// The packet's address: some of those that are evaluated at once are meant.
    Address,
    /// A condition that can't be read or foreseen.
    Condition(String),
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::State => f.write_str("the connection's state"),
            Self::Address => f.write_str("the packet's address"),
            Self::Condition(words) => f.write_str(words),
        }
    }
}

/// Whether something holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tristate {
    Yes,
    No,
    Maybe(Unknown),
}

impl Tristate {
    pub(super) fn inverted(self, inverted: bool) -> Self {
        match self {
            Self::Yes if inverted => Self::No,
            Self::No if inverted => Self::Yes,
            same => same,
        }
    }

    pub(super) fn and(self, other: impl FnOnce() -> Self) -> Self {
        match self {
            Self::No => Self::No,
            Self::Yes => other(),
            Self::Maybe(why) => match other() {
                Self::No => Self::No,
                Self::Yes => Self::Maybe(why),
                Self::Maybe(other) => Self::Maybe(why.min(other)),
            },
        }
    }

    pub(super) fn or(self, other: impl FnOnce() -> Self) -> Self {
        let inverted = |truth: Self| truth.inverted(true);
        inverted(inverted(self).and(|| inverted(other())))
    }
}

impl From<bool> for Tristate {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// Some bytes: which bits are known, and what these are. Bits that are open are zero in `value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bits {
    value: Vec<u8>,
    known: Vec<u8>,
    /// Why the rest is open.
    why: Option<Unknown>,
}

impl Bits {
    pub(super) fn known(value: impl Into<Vec<u8>>) -> Self {
        let value = value.into();
        Self { known: vec![0xff; value.len()], value, why: None }
    }

    pub(super) fn open(len: usize, why: Unknown) -> Self {
        Self { value: vec![0; len], known: vec![0; len], why: Some(why) }
    }

    /// Of which only the bits of `known` are known.
    pub(super) fn partly(value: impl Into<Vec<u8>>, known: impl Into<Vec<u8>>, why: Unknown) -> Self {
        let (mut value, known) = (value.into(), known.into());
        value.iter_mut().zip(&known).for_each(|(value, known)| *value &= known);
        Self { value, known, why: Some(why) }
    }

    pub(super) fn len(&self) -> usize {
        self.value.len()
    }

    /// These bytes; as many zeros as are missing behind the end.
    pub(super) fn part(&self, from: usize, len: usize) -> Self {
        let take = |bytes: &[u8], fill| {
            bytes.iter().copied().skip(from).chain(std::iter::repeat(fill)).take(len).collect::<Vec<u8>>()
        };
        let known = take(&self.known, 0xff);
        let why = self.why.clone().filter(|_| known.iter().any(|byte| *byte != 0xff));
        Self { value: take(&self.value, 0), known, why }
    }

    /// Overwrites what begins at `at`.
    pub(super) fn put(&mut self, at: usize, bits: &Self) {
        let end = at + bits.len();
        if self.value.len() < end {
            self.value.resize(end, 0);
            self.known.resize(end, 0xff);
        }
        self.value[at..end].copy_from_slice(&bits.value);
        self.known[at..end].copy_from_slice(&bits.known);
        if bits.why.is_some() {
            self.why.clone_from(&bits.why);
        }
    }

    /// `self & mask ^ xor`.
    pub(super) fn bitwise(&self, mask: &[u8], xor: &[u8]) -> Self {
        let mut result = self.part(0, mask.len());
        for (at, mask) in mask.iter().enumerate() {
            result.known[at] |= !mask;
            result.value[at] = (result.value[at] & mask ^ xor.get(at).copied().unwrap_or(0)) & result.known[at];
        }
        if result.known.iter().all(|byte| *byte == 0xff) {
            result.why = None;
        }
        result
    }

    pub(super) fn swapped(&self, size: usize) -> Self {
        let swap = |bytes: &[u8]| bytes.chunks(size.max(1)).flat_map(|number| number.iter().rev()).copied().collect();
        Self { value: swap(&self.value), known: swap(&self.known), why: self.why.clone() }
    }

    /// The bytes, if all bits are known.
    pub(super) fn exact(&self) -> Option<&[u8]> {
        self.known.iter().all(|byte| *byte == 0xff).then_some(&self.value)
    }

    /// The smallest and the largest that it can be.
    fn bounds(&self) -> (&[u8], Vec<u8>) {
        (&self.value, self.value.iter().zip(&self.known).map(|(value, known)| value | !known).collect())
    }

    fn maybe(&self) -> Tristate {
        Tristate::Maybe(self.why.clone().unwrap_or(Unknown::Address))
    }

    pub(super) fn equals(&self, with: &[u8]) -> Tristate {
        let mut all_known = self.len() == with.len();
        for ((value, known), with) in self.value.iter().zip(&self.known).zip(with) {
            if (value ^ with) & known != 0 {
                return Tristate::No;
            }
            all_known &= *known == 0xff;
        }
        match self.maybe() {
            _ if all_known => Tristate::Yes,
            // No packet that comes from another machine or goes to one has a loopback address (RFC 1122 section 3.2.1.3).
            Tristate::Maybe(Unknown::Address) if self.known.first() == Some(&0) && with.first() == Some(&127) => {
                Tristate::No
            }
            maybe => maybe,
        }
    }

    pub(super) fn compare(&self, how: Comparison, with: &[u8]) -> Tristate {
        let (low, high) = self.bounds();
        let (low, high) = (low.cmp(with), high.as_slice().cmp(with));
        let by_order = |holds: fn(Ordering) -> bool| match (holds(low), holds(high)) {
            (true, true) => Tristate::Yes,
            (false, false) => Tristate::No,
            _ => self.maybe(),
        };
        match how {
            Comparison::Equal => self.equals(with),
            Comparison::Different => self.equals(with).inverted(true),
            Comparison::Less => by_order(Ordering::is_lt),
            Comparison::LessOrEqual => by_order(Ordering::is_le),
            Comparison::Greater => by_order(Ordering::is_gt),
            Comparison::GreaterOrEqual => by_order(Ordering::is_ge),
        }
    }

    /// Whether it lies between both.
    pub(super) fn within(&self, low: &[u8], high: &[u8]) -> Tristate {
        if low == high {
            return self.equals(low);
        }
        let above = self.compare(Comparison::GreaterOrEqual, low);
        above.and(|| self.compare(Comparison::LessOrEqual, high))
    }

    /// Whether all bits of `mask` that are set in `with` are set in it too, as the kernel's `a & mask == with`.
    pub(super) fn masked(&self, mask: &[u8], with: &[u8]) -> Tristate {
        self.bitwise(mask, &[]).equals(with)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparisons_know_what_open_bits_leave_open() {
        // 10.244.0.0/16
        let net = Bits::partly([10, 244, 0, 0], [255, 255, 0, 0], Unknown::Address);
        let maybe = Tristate::Maybe(Unknown::Address);
        assert_eq!(net.equals(&[10, 244, 3, 2]), maybe);
        assert_eq!(net.equals(&[10, 245, 3, 2]), Tristate::No);
        assert_eq!(net.masked(&[255, 254, 0, 0], &[10, 244, 0, 0]), Tristate::Yes);
        assert_eq!(net.masked(&[255, 255, 255, 0], &[10, 244, 3, 0]), maybe);
        assert_eq!(net.within(&[10, 0, 0, 0], &[10, 255, 255, 255]), Tristate::Yes);
        assert_eq!(net.within(&[10, 244, 1, 0], &[10, 255, 255, 255]), maybe);
        assert_eq!(net.within(&[10, 245, 0, 0], &[10, 255, 255, 255]), Tristate::No);
        assert_eq!(net.compare(Comparison::Less, &[10, 245, 0, 0]), Tristate::Yes);
        assert_eq!(net.compare(Comparison::Greater, &[10, 244, 255, 255]), Tristate::No);
        assert_eq!(net.bitwise(&[0, 0, 255, 0], &[]).equals(&[0, 0, 1, 0]), maybe);
        assert_eq!(net.part(0, 2).equals(&[10, 244]), Tristate::Yes);
        let anybody = Bits::open(4, Unknown::Address);
        assert_eq!(anybody.masked(&[255, 0, 0, 0], &[10, 0, 0, 0]), maybe);
        assert_eq!(anybody.masked(&[255, 0, 0, 0], &[127, 0, 0, 0]), Tristate::No);
        assert_eq!(Bits::open(4, Unknown::State).equals(&[127, 0, 0, 0]), Tristate::Maybe(Unknown::State));
    }

    #[test]
    fn what_is_false_is_false_whatever_else_is_open() {
        let maybe = || Tristate::Maybe(Unknown::State);
        assert_eq!(maybe().and(|| Tristate::No), Tristate::No);
        assert_eq!(Tristate::No.and(maybe), Tristate::No);
        assert_eq!(Tristate::Yes.and(maybe), maybe());
        assert_eq!(maybe().or(|| Tristate::Yes), Tristate::Yes);
        assert_eq!(Tristate::No.or(maybe), maybe());
        assert_eq!(maybe().inverted(true), maybe());
    }
}
