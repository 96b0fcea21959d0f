//! [`next_step`]: what a node does about its lease, given everything that it can see.
//!
//! The decision is a pure function, so that every situation can be put before it in a test. Who calls it has
//! the clock and the store.

use std::net::IpAddr;

use crate::alloc::{Taken, choose};
use crate::leases::{Lease, LeaseSet};
use crate::model::{Family, MacAddr, NodeName, PerFamily, Subnet, stable_hash};
use crate::network::NetworkConfig;
use crate::record::{Backend, Endpoint, LeaseKey, Owner, Record};

/// What tells one run of a node from another that has its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// Inode of the network namespace: nodes on one machine share its boot id.
    pub netns: u64,
}

/// A lease as its holder remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its subnets.
    pub key: LeaseKey,
    /// Revision of our last write: any later one is somebody else's.
    pub mod_revision: i64,
}

/// The state of a key that a claim is decided on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nobody has it, nor its IPv4 subnet in another pair.
    Absent,
    /// It was last changed at this revision, and is ours to take over.
    Revision(i64),
}

/// All that a decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// This node.
    pub node: &'a NodeName,
    /// This run of it.
    pub instance: &'a Instance,
    /// The cluster's config.
    pub network: &'a NetworkConfig,
    /// Everybody's leases.
    pub leases: &'a LeaseSet,
    /// The addresses that peers send to, one for each family of the network.
    pub public_ips: &'a PerFamily<IpAddr>,
    /// The lease that this run has claimed.
    pub held: Option<Held>,
    /// Subnets that this node had before, to be had again if they are free.
    pub previous: Option<LeaseKey>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: the lease is ours and says what it should.
    Keep,
    /// Ask the store for this.
    Claim(Bid),
    /// The lease is ours and should say this instead.
    Rewrite(Record),
    /// A record of ours no longer fits the config: claim it, give it back, then decide again.
    Withdraw(Bid),
    /// The lease that we held is not ours any more. Stop handing out addresses, then decide again without it.
    Lost(Loss),
    /// There is nothing to ask for, until something changes.
    Wait(Obstacle),
}

/// What to ask the store for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bid {
    /// The subnets.
    pub key: LeaseKey,
    /// What to say there.
    pub record: Record,
    /// What must be true of the key.
    pub expect: Expect,
}

/// How a lease was lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// Expired, revoked or deleted.
    #[error("the lease of {0} is gone from the store")]
    Gone(LeaseKey),
    /// Another node's record stands there.
    #[error("the lease of {0} was taken over by {1}")]
    Taken(LeaseKey, String),
}

/// Why there is nothing to ask for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// Every subnet is leased.
    #[error(
        "all {capacity} {family} subnets of {network} are leased; remove leases of nodes that are gone, or widen the network"
    )]
    Exhausted {
        /// The family.
        family: Family,
        /// How many there are.
        capacity: u128,
        /// The address space.
        network: Subnet,
    },
    /// Two nodes announce one underlay address.
    #[error(
        "the public address {ip} of this node, {node}, is also that of {other}; \
         choose the underlay interface with --iface, or say another address with --public-ip"
    )]
    SameAddress {
        /// The address.
        ip: IpAddr,
        /// This node.
        node: NodeName,
        /// The other one.
        other: String,
    },
}

/// What to do about the lease.
#[must_use]
pub fn next_step(now: &Situation<'_>) -> Step {
    match now.held {
        Some(held) => keep(now, held),
        None => acquire(now),
    }
}

fn keep(now: &Situation<'_>, held: Held) -> Step {
    match now.leases.get(&held.key) {
        Some(lease) if lease.mod_revision == held.mod_revision => {
            let endpoints = endpoints(now, Some(lease));
            if lease.record.endpoints() == endpoints {
                Step::Keep
            } else {
                Step::Rewrite(Record { backend: Backend::Vxlan(endpoints), ..lease.record.clone() })
            }
        }
        // The set shows the time before our write.
        _ if now.leases.revision() < held.mod_revision => Step::Keep,
        Some(lease) => Step::Lost(Loss::Taken(held.key, lease.holder())),
        None => Step::Lost(Loss::Gone(held.key)),
    }
}

fn acquire(now: &Situation<'_>) -> Step {
    let mine = now.leases.of_node(now.node).or_else(|| flannels_lease_of_this_node(now));
    if let Some(obstacle) = same_address(now, mine.map(AsRef::as_ref)) {
        return Step::Wait(obstacle);
    }
    if let Some(lease) = mine {
        let bid = bid(now, lease.key, Expect::Revision(lease.mod_revision), Some(lease));
        return if fits(now.network, &lease.key) { Step::Claim(bid) } else { Step::Withdraw(bid) };
    }
    match free_key(now) {
        Ok(key) => Step::Claim(bid(now, key, Expect::Absent, None)),
        Err(obstacle) => Step::Wait(obstacle),
    }
}

/// flannel knows a node by its public address alone: its record with ours is ours (flannel's own rule).
fn flannels_lease_of_this_node<'a>(now: &Situation<'a>) -> Option<&'a std::sync::Arc<Lease>> {
    now.leases.iter().find(|lease| {
        let endpoints = lease.record.endpoints();
        lease.record.owner.is_none()
            && !endpoints.is_empty()
            && endpoints.iter().all(|(family, e)| now.public_ips.get(family) == Some(&e.public_ip))
    })
}

fn same_address(now: &Situation<'_>, mine: Option<&Lease>) -> Option<Obstacle> {
    let others = now.leases.iter().filter(|lease| mine.is_none_or(|mine| mine.key != lease.key));
    let mut clashes = others.filter(|lease| lease.record.node() != Some(now.node)).filter_map(|lease| {
        let endpoints = lease.record.endpoints();
        let (_, endpoint) = endpoints.iter().find(|(family, e)| now.public_ips.get(*family) == Some(&e.public_ip))?;
        Some(Obstacle::SameAddress { ip: endpoint.public_ip, node: now.node.clone(), other: lease.holder() })
    });
    clashes.next()
}

/// True when the config still allows this lease, in all of its families and no other.
fn fits(network: &NetworkConfig, key: &LeaseKey) -> bool {
    Family::ALL.into_iter().all(|family| match (network.spaces.get(family), key.subnets().get(family)) {
        (Some(space), Some(subnet)) => space.admits(*subnet),
        (None, None) => true,
        _ => false,
    })
}

fn free_key(now: &Situation<'_>) -> Result<LeaseKey, Obstacle> {
    let seed = stable_hash(now.node.as_str().as_bytes());
    let subnets = now.network.spaces.try_map(|family, space| {
        let taken = Taken::new(space, now.leases.subnets(family));
        let previous = now.previous.and_then(|key| key.subnets().get(family).copied());
        choose(space, &taken, previous, seed).ok_or(Obstacle::Exhausted {
            family,
            capacity: space.capacity(),
            network: space.network,
        })
    })?;
    Ok(LeaseKey::new(subnets).expect("a valid config has a family"))
}

/// How peers reach this node. A VTEP keeps the MAC address that was once published.
fn endpoints(now: &Situation<'_>, published: Option<&Lease>) -> PerFamily<Endpoint> {
    let vni = now.network.vxlan.vni;
    let published = published.map(|lease| lease.record.endpoints()).unwrap_or_default();
    now.public_ips.map(|family, public_ip| {
        let vtep_mac = published.get(family).map_or_else(|| MacAddr::derived(now.node, vni, family), |e| e.vtep_mac);
        Endpoint { public_ip: *public_ip, vtep_mac, vni }
    })
}

/// A claim of `key`. What the record there says today, `before`, stays where we have nothing to say.
fn bid(now: &Situation<'_>, key: LeaseKey, expect: Expect, before: Option<&Lease>) -> Bid {
    let endpoints = endpoints(now, before);
    let before = before.map(|lease| &lease.record);
    let owner = before.and_then(|record| record.owner.as_ref());
    let owner = Owner {
        version: Owner::VERSION,
        node: now.node.clone(),
        boot: now.instance.boot.clone(),
        netns: now.instance.netns,
        epoch: owner.map_or(0, |owner| owner.epoch) + 1,
        unknown: owner.map(|owner| owner.unknown.clone()).unwrap_or_default(),
    };
    let unknown = before.map(|record| record.unknown.clone()).unwrap_or_default();
    Bid { key, record: Record { backend: Backend::Vxlan(endpoints), owner: Some(owner), unknown }, expect }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leases::Entry;

    struct Node {
        name: NodeName,
        instance: Instance,
        network: NetworkConfig,
        public_ips: PerFamily<IpAddr>,
        held: Option<Held>,
        previous: Option<LeaseKey>,
    }

    impl Node {
        fn new() -> Self {
            Self {
                name: "node-1".parse().expect("valid"),
                instance: Instance { boot: "boot".into(), netns: 7 },
                network: NetworkConfig::decode(br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#)
                    .expect("valid"),
                public_ips: PerFamily { v4: Some("192.0.2.1".parse().expect("ip")), v6: None },
                held: None,
                previous: None,
            }
        }

        fn step(&self, leases: &LeaseSet) -> Step {
            let Self { name, instance, network, public_ips, held, previous } = self;
            next_step(&Situation {
                node: name,
                instance,
                network,
                leases,
                public_ips,
                held: *held,
                previous: *previous,
            })
        }

        fn bid(&self, leases: &LeaseSet) -> Bid {
            match self.step(leases) {
                Step::Claim(bid) => bid,
                other => panic!("{other:?}"),
            }
        }
    }

    fn key(text: &str) -> LeaseKey {
        LeaseKey::decode(text).expect(text)
    }

    fn set(entries: &[(&str, Vec<u8>, i64)], revision: i64) -> LeaseSet {
        let entry = |(key, value, revision): &(&str, Vec<u8>, i64)| Entry {
            key: (*key).into(),
            value: value.clone(),
            create_revision: *revision,
            mod_revision: *revision,
        };
        LeaseSet::snapshot(&LeaseSet::default(), entries.iter().map(entry).collect(), revision)
    }

    fn flannel(ip: &str) -> Vec<u8> {
        format!(
            r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}}}"#
        )
        .into()
    }

    fn fabric(node: &str, ip: &str) -> Vec<u8> {
        let owner = format!(r#","Fabric":{{"v":1,"node":"{node}","boot":"old","netns":7,"epoch":4}}}}"#);
        let flannel = String::from_utf8(flannel(ip)).expect("text");
        (flannel[..flannel.len() - 1].to_owned() + &owner).into()
    }

    #[test]
    fn first_claim_is_for_a_free_subnet_that_only_the_name_decides() {
        let node = Node::new();
        let bid = node.bid(&LeaseSet::default());
        assert_eq!(bid, node.bid(&LeaseSet::default()));
        assert_eq!(bid.expect, Expect::Absent);
        let owner = bid.record.owner.expect("named");
        assert_eq!((owner.epoch, owner.boot.as_str()), (1, "boot"));
    }

    #[test]
    fn restarted_node_takes_its_own_record_over_and_keeps_subnet_and_mac() {
        let bid = Node::new().bid(&set(&[("10.244.9.0-24", fabric("node-1", "192.0.2.99"), 5)], 5));
        assert_eq!((bid.key, bid.expect), (key("10.244.9.0-24"), Expect::Revision(5)));
        let endpoint = bid.record.endpoints().v4.expect("IPv4");
        assert_eq!(endpoint.vtep_mac.to_string(), "c6:d2:32:6f:8f:44");
        assert_eq!(endpoint.public_ip.to_string(), "192.0.2.1", "the underlay address is today's");
        assert_eq!(bid.record.owner.expect("named").epoch, 5);
    }

    #[test]
    fn flannels_record_of_this_address_is_taken_over() {
        let bid = Node::new().bid(&set(&[("10.244.9.0-24", flannel("192.0.2.1"), 5)], 5));
        assert_eq!((bid.key, bid.expect), (key("10.244.9.0-24"), Expect::Revision(5)));
        assert_eq!(bid.record.endpoints().v4.expect("IPv4").vtep_mac.to_string(), "c6:d2:32:6f:8f:44");
    }

    #[test]
    fn two_nodes_with_one_address_are_both_named() {
        let step = Node::new().step(&set(&[("10.244.9.0-24", fabric("node-2", "192.0.2.1"), 5)], 5));
        let Step::Wait(obstacle) = step else { panic!("{step:?}") };
        let text = obstacle.to_string();
        assert!(text.contains("192.0.2.1") && text.contains("node-1") && text.contains("node-2"), "{text}");
    }

    #[test]
    fn record_that_no_longer_fits_the_config_is_withdrawn_first() {
        let step = Node::new().step(&set(&[("10.99.9.0-24", fabric("node-1", "192.0.2.1"), 5)], 5));
        let Step::Withdraw(bid) = step else { panic!("{step:?}") };
        assert_eq!((bid.key, bid.expect), (key("10.99.9.0-24"), Expect::Revision(5)));
    }

    #[test]
    fn subnet_of_before_is_asked_for_again() {
        let node = Node { previous: Some(key("10.244.77.0-24")), ..Node::new() };
        assert_eq!(node.bid(&LeaseSet::default()).key, key("10.244.77.0-24"));
        let taken = set(&[("10.244.77.0-24", fabric("node-2", "192.0.2.2"), 5)], 5);
        assert_ne!(node.bid(&taken).key, key("10.244.77.0-24"));
    }

    #[test]
    fn exhausted_address_space_is_a_clear_error() {
        let mut node = Node::new();
        node.network =
            NetworkConfig::decode(br#"{"Network":"192.0.2.0/24","SubnetLen":26,"Backend":{"Type":"vxlan"}}"#)
                .expect("valid");
        let full = [("192.0.2.64-26", "n2"), ("192.0.2.128-26", "n3"), ("192.0.2.192-26", "n4")];
        let full: Vec<_> = full.iter().map(|(key, name)| (*key, fabric(name, "198.51.100.1"), 3)).collect();
        let Step::Wait(obstacle) = node.step(&set(&full, 3)) else { panic!("expected to wait") };
        assert!(obstacle.to_string().starts_with("all 3 IPv4 subnets of 192.0.2.0/24 are leased"), "{obstacle}");
    }

    #[test]
    fn held_lease_is_kept_while_it_stands_and_rewritten_when_the_address_moves() {
        let mut node = Node { held: Some(Held { key: key("10.244.9.0-24"), mod_revision: 5 }), ..Node::new() };
        let leases = set(&[("10.244.9.0-24", fabric("node-1", "192.0.2.1"), 5)], 6);
        assert_eq!(node.step(&leases), Step::Keep);
        node.public_ips.v4 = Some("192.0.2.100".parse().expect("ip"));
        let step = node.step(&leases);
        let Step::Rewrite(record) = step else { panic!("{step:?}") };
        assert_eq!(record.endpoints().v4.expect("IPv4").public_ip.to_string(), "192.0.2.100");
        assert_eq!(record.owner.expect("named").epoch, 4, "moving is no new claim");
    }

    #[test]
    fn held_lease_that_is_gone_or_changed_by_another_is_lost() {
        let node = Node { held: Some(Held { key: key("10.244.9.0-24"), mod_revision: 5 }), ..Node::new() };
        assert_eq!(node.step(&set(&[], 6)), Step::Lost(Loss::Gone(key("10.244.9.0-24"))));
        let stolen = set(&[("10.244.9.0-24", flannel("192.0.2.1"), 6)], 6);
        assert!(matches!(node.step(&stolen), Step::Lost(Loss::Taken(..))));
        // A set from before our write proves nothing.
        assert_eq!(node.step(&set(&[], 4)), Step::Keep);
    }
}
