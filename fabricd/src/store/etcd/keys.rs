//! Where everything lies in etcd.
//!
//! ```text
//! <prefix>/config                                 the network config          flannel's
//! <prefix>/subnets/10.244.3.0-24&fd00:3::-64      a lease                     flannel's
//! <prefix>/fabric/guard/4/10.244.3.0-24           the node that has the subnet    ours
//! <prefix>/fabric/guard/6/fd00:3::-64             the node that has the subnet    ours
//! <prefix>/fabric/guard/outdated                  who last claimed under a config of before    ours
//! <prefix>/fabric/guard/asked/node-3              who asks whether that node lives, and the answer    ours
//! <prefix>/fabric/reservations/10.244.3.0-24      the node that it is kept for    ours
//! ```
//!
//! flannel's key is the pair of subnets, so two different keys can hold the same IPv4 or IPv6 subnet. A guard is one
//! subnet alone: a transaction that must create both guards can't create such a pair. A guard doesn't hang on the node's
//! lease: when that has ended, the guard without a record keeps the subnet for its node for a grace. Keys of ours never begin with
//! `<prefix>/subnets`, which flannel lists as a plain string.

use fabric_core::model::{Family, NodeName, Subnet};
use fabric_core::record::LeaseKey;

/// The keys under one prefix.
#[derive(Clone, Debug)]
pub(super) struct Keys {
    prefix: String,
}

/// What a key stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum KeyKind {
    /// The network config.
    Config,
    /// A lease; the key's last part.
    Lease(String),
    /// A reservation; the key's last part.
    Reservation(String),
    /// A question about who holds the lease of a name; the name.
    Inquiry(String),
    /// A guard, or nothing that we know.
    Other,
}

impl Keys {
    /// The keys under `prefix`, with or without a slash at its end.
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.trim_end_matches('/').to_owned() }
    }

    /// What all keys begin with.
    pub(super) fn all(&self) -> String {
        format!("{}/", self.prefix)
    }

    /// The network config's key.
    pub(super) fn config(&self) -> String {
        format!("{}/config", self.prefix)
    }

    /// What the keys of all leases begin with.
    pub(super) fn subnets(&self) -> String {
        format!("{}/subnets/", self.prefix)
    }

    /// A lease's key.
    pub(super) fn lease(&self, key: &LeaseKey) -> String {
        format!("{}{}", self.subnets(), key.encode())
    }

    /// What the keys of all leases with the IPv4 subnet of `key` begin with: alone, or paired with any IPv6 subnet.
    pub(super) fn pairs(&self, key: &LeaseKey) -> Option<String> {
        key.subnets().v4.map(|subnet| format!("{}/subnets/{}-{}", self.prefix, subnet.base(), subnet.prefix_len()))
    }

    /// The keys of a lease's guards, one for each family.
    pub(super) fn guards(&self, key: &LeaseKey) -> Vec<String> {
        let guard = |(family, subnet): (Family, &Subnet)| {
            let digit = match family {
                Family::V4 => 4,
                Family::V6 => 6,
            };
            format!("{}/fabric/guard/{digit}/{}-{}", self.prefix, subnet.base(), subnet.prefix_len())
        };
        key.subnets().iter().map(guard).collect()
    }

    /// What every claim compares and one that was decided under a config of before writes.
    pub(super) fn outdated(&self) -> String {
        format!("{}outdated", self.all_guards())
    }

    /// What the keys of all questions about names begin with: among the guards, which every node may write.
    pub(super) fn inquiries(&self) -> String {
        format!("{}asked/", self.all_guards())
    }

    /// The key of a question about a name.
    pub(super) fn inquiry(&self, node: &NodeName) -> String {
        format!("{}{node}", self.inquiries())
    }

    /// What the keys of all guards begin with.
    pub(super) fn all_guards(&self) -> String {
        format!("{}/fabric/guard/", self.prefix)
    }

    /// The subnet that a guard's key is about.
    pub(super) fn guarded(&self, key: &[u8]) -> Option<Subnet> {
        let rest = key.strip_prefix(self.all_guards().as_bytes())?;
        let (_, subnet) = std::str::from_utf8(rest).ok()?.split_once('/')?;
        let (base, length) = subnet.rsplit_once('-')?;
        format!("{base}/{length}").parse().ok()
    }

    /// What the keys of all reservations begin with.
    pub(super) fn reservations(&self) -> String {
        format!("{}/fabric/reservations/", self.prefix)
    }

    /// The key of a subnet's reservation.
    pub(super) fn reservation(&self, key: &LeaseKey) -> String {
        format!("{}{}", self.reservations(), key.encode())
    }

    /// What `key` stands for. A key that is not text is a lease that can't be read.
    pub(super) fn kind(&self, key: &[u8]) -> KeyKind {
        match key.strip_prefix(self.all().as_bytes()) {
            Some(b"config") => KeyKind::Config,
            Some(rest) => {
                let last = |part: &[u8]| String::from_utf8_lossy(part).into_owned();
                if let Some(lease) = rest.strip_prefix(b"subnets/") {
                    KeyKind::Lease(last(lease))
                } else if let Some(reserved) = rest.strip_prefix(b"fabric/reservations/") {
                    KeyKind::Reservation(last(reserved))
                } else if let Some(name) = rest.strip_prefix(b"fabric/guard/asked/") {
                    KeyKind::Inquiry(last(name))
                } else {
                    KeyKind::Other
                }
            }
            None => KeyKind::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_has_one_guard_for_each_family() {
        let keys = Keys::new("/coreos.com/network/");
        let key = |text| LeaseKey::decode(text).expect(text);
        assert_eq!(
            keys.guards(&key("10.244.3.0-24&fd00:3::-64")),
            ["/coreos.com/network/fabric/guard/4/10.244.3.0-24", "/coreos.com/network/fabric/guard/6/fd00:3::-64"]
        );
        assert_eq!(keys.guards(&key("0.0.0.0-0&fd00:3::-64")), ["/coreos.com/network/fabric/guard/6/fd00:3::-64"]);
        for guard in keys.guards(&key("10.244.3.0-24&fd00:3::-64")) {
            let subnet = keys.guarded(guard.as_bytes()).expect("a guard").to_string();
            assert!(["10.244.3.0/24", "fd00:3::/64"].contains(&subnet.as_str()), "{subnet}");
        }
        assert_eq!(keys.guarded(b"/coreos.com/network/fabric/guard/4/nonsense"), None);
        assert_eq!(keys.guarded(keys.outdated().as_bytes()), None);
        let asked = keys.inquiry(&"node-3".parse().expect("a name"));
        assert_eq!(keys.guarded(asked.as_bytes()), None);
        assert_eq!(keys.kind(asked.as_bytes()), KeyKind::Inquiry("node-3".into()));
    }

    #[test]
    fn keys_beside_the_leases_are_told_apart() {
        let keys = Keys::new("/p");
        for (key, kind) in [
            ("/p/config", KeyKind::Config),
            ("/p/subnets/10.244.3.0-24", KeyKind::Lease("10.244.3.0-24".into())),
            ("/p/config/x", KeyKind::Other),
            ("/p/subnets", KeyKind::Other),
            ("/p/fabric/guard/4/10.244.3.0-24", KeyKind::Other),
            ("/p/fabric/reservations/10.244.3.0-24", KeyKind::Reservation("10.244.3.0-24".into())),
            ("/pq/config", KeyKind::Other),
        ] {
            assert_eq!(keys.kind(key.as_bytes()), kind, "{key}");
        }
    }
}
