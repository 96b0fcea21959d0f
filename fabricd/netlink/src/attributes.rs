//! Attributes of messages (`struct nlattr`, linux/netlink.h): a length and a type of two bytes each, a value, and padding to
//! a multiple of four. A value may be attributes again.

/// `NLA_F_NESTED`: the value is attributes.
const NESTED: u16 = 0x8000;
/// `NLA_TYPE_MASK`: a type without `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const TYPE: u16 = 0x3fff;
/// Bytes of length and type.
const HEADER: usize = 4;

/// The attributes in a body: type without its flag bits, and value. They end where one is cut off or its length can't be.
pub fn attributes(mut body: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (&[l0, l1, k0, k1], _) = body.split_first_chunk::<HEADER>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = body.get(HEADER..length)?;
        body = body.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & TYPE, value))
    })
}

/// The value of the first attribute of a type.
#[must_use]
pub fn attribute(body: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(body).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// The body of a message to the kernel as it grows: a fixed header, and attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// Behind a family's fixed header, whose length is a multiple of four.
    pub fn behind(header: impl Into<Vec<u8>>) -> Self {
        Self(header.into())
    }

    /// An attribute of these bytes.
    ///
    /// # Panics
    /// When it has more than 65,531 bytes; what can grow has to be sent in parts.
    #[must_use]
    pub fn bytes(self, kind: u16, value: &[u8]) -> Self {
        self.written(kind, |bytes| bytes.extend(value))
    }

    /// An attribute whose value `write` appends.
    ///
    /// # Panics
    /// As [`Attributes::bytes`].
    #[must_use]
    pub fn written(mut self, kind: u16, write: impl FnOnce(&mut Vec<u8>)) -> Self {
        let start = self.0.len();
        self.0.extend([0, 0]);
        self.0.extend(kind.to_ne_bytes());
        write(&mut self.0);
        let length = u16::try_from(self.0.len() - start).expect("a value is sent in parts below 64 KiB");
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        pad(&mut self.0);
        self
    }

    /// An attribute of a text, which ends with a zero.
    ///
    /// # Panics
    /// As [`Attributes::bytes`].
    #[must_use]
    pub fn text(self, kind: u16, value: &str) -> Self {
        self.written(kind, |bytes| {
            bytes.extend(value.as_bytes());
            bytes.push(0);
        })
    }

    /// An attribute whose value is the attributes that `inner` appends.
    ///
    /// # Panics
    /// As [`Attributes::bytes`].
    #[must_use]
    pub fn nested(self, kind: u16, inner: impl FnOnce(Self) -> Self) -> Self {
        self.written(kind | NESTED, |bytes| *bytes = inner(Self(std::mem::take(bytes))).0)
    }

    /// Header and attributes, as a message's body.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Fills up to where the next attribute may begin.
pub fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let body = Attributes::behind([1, 2, 3, 4])
            .bytes(1, &[9])
            .nested(2, |list| list.text(1, "eth0").bytes(2, &[]))
            .bytes(3, &7_u32.to_be_bytes())
            .into_bytes();
        assert_eq!(body[..4], [1, 2, 3, 4]);
        assert_eq!(body.len() % 4, 0);
        let kinds: Vec<u16> = attributes(&body[4..]).map(|(kind, _)| kind).collect();
        assert_eq!(kinds, [1, 2, 3]);
        let list = attribute(&body[4..], 2).expect("written");
        assert_eq!(attributes(list).collect::<Vec<_>>(), [(1, &b"eth0\0"[..]), (2, &[][..])]);
        assert_eq!(attribute(&body[4..], 3), Some(&[0, 0, 0, 7][..]));
        assert_eq!(attribute(&body[4..], 4), None);
    }

    #[test]
    fn of_two_attributes_of_a_type_the_first_counts() {
        let body = Attributes::default().bytes(1, &[1]).bytes(1, &[2]).into_bytes();
        assert_eq!(attribute(&body, 1), Some(&[1][..]));
    }

    #[test]
    fn attribute_whose_length_lies_ends_the_list() {
        for length in [0, 1, 3, 13, u16::MAX] {
            let mut body = Attributes::default().bytes(1, &[1, 2, 3, 4]).bytes(2, &[]).into_bytes();
            body[..2].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(attributes(&body).count(), 0, "a length of {length} in a list of {} bytes", body.len());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_attributes_that_lie_within_them(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let taken: usize = attributes(&body).map(|(_, value)| HEADER + value.len()).sum();
            prop_assert!(taken <= body.len());
        }
    }
}
