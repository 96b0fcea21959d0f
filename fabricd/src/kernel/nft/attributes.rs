//! The attributes of nftables (linux/netfilter/nfnetlink.h): behind a `struct nfgenmsg`, with numbers in network order.

pub(in crate::kernel) use fabric_netlink::Attributes;

/// What nfnetlink adds to [`Attributes`].
pub(in crate::kernel) trait Nfnetlink: Sized {
    /// A message begins with a `struct nfgenmsg`: family, version 0, resource (network order).
    fn message(family: u8, resource: u16) -> Self;

    /// Numbers are in network order.
    fn number(self, kind: u16, value: u32) -> Self;
}

impl Nfnetlink for Attributes {
    fn message(family: u8, resource: u16) -> Self {
        let [high, low] = resource.to_be_bytes();
        Self::behind([family, 0, high, low])
    }

    fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }
}
