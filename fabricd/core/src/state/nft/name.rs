//! [`Name`]: what a chain or a set of ours is called.

use std::borrow::Borrow;
use std::fmt;
use std::hash::{Hash, Hasher};

/// The name of a chain or a set of ours. Some are numbered (`pick-3`), and all are parts of many keys, so it is kept in
/// place.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name([u8; Self::SIZE]);

impl Name {
    /// The longest name in bytes. The kernel allows 255 (`NFT_NAME_MAXLEN`).
    pub const SIZE: usize = 24;

    /// A name that the source code says.
    ///
    /// # Panics
    /// When it is longer than [`Name::SIZE`], or has a zero byte.
    #[must_use]
    pub const fn new(name: &str) -> Self {
        let (from, mut bytes, mut at) = (name.as_bytes(), [0; Self::SIZE], 0);
        assert!(from.len() <= Self::SIZE, "a name of a chain or set has at most 24 bytes");
        while at < from.len() {
            assert!(from[at] != 0, "a name has no zero byte");
            bytes[at] = from[at];
            at += 1;
        }
        Self(bytes)
    }

    /// A name with numbers behind it, each after a dash: `pick-3`, `stick-2-10800`.
    ///
    /// # Panics
    /// When it is longer than [`Name::SIZE`]: with two numbers of 32 bits the word may have two bytes, with one thirteen.
    #[must_use]
    pub fn numbered(word: &'static str, numbers: &[u32]) -> Self {
        let mut name = word.to_owned();
        for number in numbers {
            name.push('-');
            name.push_str(&number.to_string());
        }
        Self::new(&name)
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(Self::SIZE);
        std::str::from_utf8(&self.0[..end]).expect("made from text")
    }
}

impl From<&'static str> for Name {
    fn from(name: &'static str) -> Self {
        Self::new(name)
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl Hash for Name {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_ordered_as_text_is() {
        let mut names = ["pick-3", "pick", "pick-10", "a"].map(Name::new);
        let mut texts = names.map(|name| name.as_str().to_owned());
        names.sort_unstable();
        texts.sort_unstable();
        assert_eq!(names.map(|name| name.to_string()), texts);
        assert_eq!(Name::numbered("stick", &[2, 10_800]).as_str(), "stick-2-10800");
    }

    #[test]
    #[should_panic(expected = "24 bytes")]
    fn name_that_is_too_long_is_a_fault_of_the_source() {
        let _ = Name::numbered("a-word-of-14-b", &[u32::MAX]);
    }
}
