//! Attributes of netlink messages, to be written: type, length, value, and attributes within attributes.

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// A list of attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::kernel) struct Attributes(Vec<u8>);

impl Attributes {
    /// A message of nftables begins with a `struct nfgenmsg`: family, version 0, resource (network order).
    pub(in crate::kernel) fn message(family: u8, resource: u16) -> Self {
        let [high, low] = resource.to_be_bytes();
        Self(vec![family, 0, high, low])
    }

    pub(super) fn bytes(self, kind: u16, value: &[u8]) -> Self {
        self.written(kind, |bytes| bytes.extend(value))
    }

    /// An attribute whose value `write` appends.
    pub(super) fn written(mut self, kind: u16, write: impl FnOnce(&mut Vec<u8>)) -> Self {
        let start = self.0.len();
        self.0.extend([0, 0]);
        self.0.extend(kind.to_ne_bytes());
        write(&mut self.0);
        let length = u16::try_from(self.0.len() - start).expect("elements are sent in lists below 64 KiB");
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        pad(&mut self.0);
        self
    }

    /// Numbers of nftables are in network order.
    pub(super) fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(in crate::kernel) fn text(self, kind: u16, value: &str) -> Self {
        self.written(kind, |bytes| {
            bytes.extend(value.as_bytes());
            bytes.push(0);
        })
    }

    /// An attribute whose value is the attributes that `inner` appends.
    pub(super) fn nested(self, kind: u16, inner: impl FnOnce(Self) -> Self) -> Self {
        self.written(kind | NESTED, |bytes| *bytes = inner(Self(std::mem::take(bytes))).0)
    }

    pub(in crate::kernel) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Fills up to where the next attribute may begin.
pub(super) fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}
