//! The codec of what the store holds for a lease: flannel's etcd v3 registry format, to the letter.
//!
//! A key is `<prefix>/subnets/10.5.52.0-24`, on dual stack `…/10.5.52.0-24&fd00:12:13::-64`, and its
//! value a JSON object that flannel writes and reads. What is ours alone lies in one extra member,
//! `Fabric`, which flannel ignores; members that we don't know (of a newer fabricd) survive a rewrite.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::model::{Family, MacAddr, NodeName, PerFamily, Subnet, Vni, stable_hash};

/// The largest value that is looked at, in bytes. A real one has about 300; etcd allows 1.5 MiB.
pub const MAX_VALUE: usize = 16 * 1024;

/// Why something in the store can't be read as a lease.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The key is not `<IPv4>-<length>`, with `&<IPv6>-<length>` behind it on dual stack.
    #[error("the key {0:?} is no subnet: expected 10.244.3.0-24, 10.244.3.0-24&fd00::-64 or 0.0.0.0-0&fd00::-64")]
    Key(String),
    /// The value is larger than [`MAX_VALUE`].
    #[error("the value has {0} bytes, more than {MAX_VALUE}")]
    TooLarge(usize),
    /// The value is not the JSON object of a lease.
    #[error("the value is not a lease: {0}")]
    Json(String),
    /// A family has a subnet but lacks what it takes to reach it.
    #[error("the value has no usable {0} for the {1} subnet of its key")]
    Missing(&'static str, Family),
}

/// The subnets of one lease. They are its identity: the store's key is made of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey(PerFamily<Subnet>);

impl LeaseKey {
    /// The key of these subnets; `None` when there is none.
    #[must_use]
    pub fn new(subnets: PerFamily<Subnet>) -> Option<Self> {
        (!subnets.is_empty()).then_some(Self(subnets))
    }

    /// The subnets.
    #[must_use]
    pub fn subnets(&self) -> &PerFamily<Subnet> {
        &self.0
    }

    /// Reads the last part of a key in the store (what follows `subnets/`).
    ///
    /// # Errors
    /// [`RecordError::Key`].
    pub fn decode(text: &str) -> Result<Self, RecordError> {
        Self::parse(text).ok_or_else(|| RecordError::Key(text.chars().take(80).collect()))
    }

    /// The last part of its key in the store.
    #[must_use]
    pub fn encode(&self) -> String {
        let half = |subnet: Subnet| format!("{}-{}", subnet.base(), subnet.prefix_len());
        let v4 = self.0.v4.map_or_else(|| "0.0.0.0-0".to_owned(), half);
        match self.0.v6 {
            Some(subnet) => format!("{v4}&{}", half(subnet)),
            None => v4,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (v4, v6) = text.split_once('&').map_or((text, None), |(v4, v6)| (v4, Some(v6)));
        let (ip, len) = parse_half::<Ipv4Addr>(v4)?;
        // flannel writes the IPv4 half of an IPv6-only lease as 0.0.0.0-0.
        let v4 = match (ip, len) {
            (Ipv4Addr::UNSPECIFIED, 0) => None,
            (ip, 1..=31) => Some(canonical(IpAddr::V4(ip), len)?),
            _ => return None,
        };
        let v6 = match v6 {
            None => None,
            Some(v6) => {
                let (ip, len) = parse_half::<Ipv6Addr>(v6)?;
                Some(canonical(IpAddr::V6(ip), Some(len).filter(|len| (1..=127).contains(len))?)?)
            }
        };
        Self::new(PerFamily { v4, v6 })
    }
}

fn parse_half<A: std::str::FromStr + ToString>(text: &str) -> Option<(A, u8)> {
    let (ip, len) = text.rsplit_once('-')?;
    let (address, bits) = (ip.parse::<A>().ok()?, len.parse::<u8>().ok()?);
    // One spelling only: two keys must never mean one subnet.
    (address.to_string() == ip && bits.to_string() == len).then_some((address, bits))
}

fn canonical(ip: IpAddr, len: u8) -> Option<Subnet> {
    Subnet::holding(ip, len).ok().filter(|subnet| subnet.base() == ip)
}

/// For people: `10.244.3.0/24`, on dual stack `10.244.3.0/24,fd00:3::/64`, as `fabricctl lease reserve` takes it.
impl std::fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, subnet) in self.0.values().enumerate() {
            write!(f, "{}{subnet}", if at == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// How a node is reached in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The underlay address that the node's encapsulated packets go to.
    pub public_ip: IpAddr,
    /// The address of its VXLAN device.
    pub vtep_mac: MacAddr,
    /// The VXLAN network that it is in.
    pub vni: Vni,
}

/// What tells one run of a node from another that has its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// Inode of the network namespace: nodes on one machine share its boot id.
    pub netns: u64,
}

/// What fabricd nodes say of themselves besides what flannel knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Version of this member's format; see [`Owner::VERSION`].
    #[serde(rename = "v")]
    pub version: u32,
    /// The node that holds the lease.
    pub node: NodeName,
    /// `/proc/sys/kernel/random/boot_id` of its machine.
    pub boot: String,
    /// Inode of its network namespace: tells apart nodes that share a machine.
    pub netns: u64,
    /// Rises with every claim of the node.
    pub epoch: u64,
    /// The run that the record was taken over from, where that was another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_from: Option<Instance>,
    /// True when it was taken back from a run that had taken it unasked: that one must not take it back in turn.
    #[serde(default, skip_serializing_if = "is_false")]
    pub taken_back: bool,
    /// Members of a newer version.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(value: &bool) -> bool {
    !value
}

impl Owner {
    /// The version that this fabricd writes.
    pub const VERSION: u32 = 1;

    /// One of which nothing is known but the node.
    #[must_use]
    pub fn of(node: NodeName) -> Self {
        Self {
            version: Self::VERSION,
            node,
            boot: String::new(),
            netns: 0,
            epoch: 0,
            taken_from: None,
            taken_back: false,
            unknown: Map::new(),
        }
    }

    /// The run of the node that wrote the record.
    #[must_use]
    pub fn instance(&self) -> Instance {
        Instance { boot: self.boot.clone(), netns: self.netns }
    }
}

/// What a node does with packets for its subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// VXLAN, an endpoint for each family of the lease.
    Vxlan(PerFamily<Endpoint>),
    /// No node at all: the subnet is kept for one that is away. The address is nobody's, for flannel, which takes
    /// records with one address for one node's.
    Reserved(Ipv4Addr),
    /// A backend of flannel's that is not VXLAN.
    Other(String),
}

/// The value of a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// How the node is reached.
    pub backend: Backend,
    /// Who holds the lease; flannel nodes don't say.
    pub owner: Option<Owner>,
    /// Members that this version doesn't know.
    pub unknown: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
struct Wire {
    #[serde(rename = "PublicIP")]
    public_ip: Option<Ipv4Addr>,
    #[serde(rename = "PublicIPv6", default)]
    public_ipv6: Option<Ipv6Addr>,
    #[serde(rename = "BackendType", default)]
    backend_type: String,
    #[serde(rename = "BackendData", default, skip_serializing_if = "Option::is_none")]
    backend_data: Option<Value>,
    #[serde(rename = "BackendV6Data", default, skip_serializing_if = "Option::is_none")]
    backend_v6_data: Option<Value>,
    #[serde(rename = "Fabric", default, skip_serializing_if = "Option::is_none")]
    fabric: Option<Value>,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

#[derive(Serialize, Deserialize)]
struct VxlanData {
    #[serde(rename = "VNI")]
    vni: Vni,
    #[serde(rename = "VtepMAC")]
    vtep_mac: MacAddr,
}

const VXLAN: &str = "vxlan";

/// The backend type of a placeholder. flannel nodes pass over records of a backend that is not theirs.
const RESERVED: &str = "fabric-reserved";

impl Record {
    /// Reads a value that stands under `key`.
    ///
    /// # Errors
    /// Any [`RecordError`] but `Key`; nothing of such a value should be used.
    pub fn decode(key: &LeaseKey, value: &[u8]) -> Result<Self, RecordError> {
        if value.len() > MAX_VALUE {
            return Err(RecordError::TooLarge(value.len()));
        }
        let wire: Wire = serde_json::from_slice(value).map_err(|e| RecordError::Json(e.to_string()))?;
        let backend = if wire.backend_type == VXLAN {
            Backend::Vxlan(key.subnets().try_map(|family, _| {
                let (public_ip, data) = match family {
                    Family::V4 => (wire.public_ip.map(IpAddr::V4), &wire.backend_data),
                    Family::V6 => (wire.public_ipv6.map(IpAddr::V6), &wire.backend_v6_data),
                };
                endpoint(family, public_ip, data.as_ref())
            })?)
        } else if wire.backend_type == RESERVED {
            Backend::Reserved(wire.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED))
        } else {
            Backend::Other(wire.backend_type)
        };
        // A foreign or broken `Fabric` member makes the node a flannel node to us, not an error.
        let owner = wire.fabric.and_then(|fabric| serde_json::from_value(fabric).ok());
        Ok(Self { backend, owner, unknown: wire.unknown })
    }

    /// The value as it is stored.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (endpoints, backend_type) = match &self.backend {
            Backend::Vxlan(endpoints) => (*endpoints, VXLAN),
            Backend::Reserved(_) => (PerFamily::default(), RESERVED),
            Backend::Other(name) => (PerFamily::default(), name.as_str()),
        };
        let data = |family| {
            endpoints.get(family).map(|e| {
                serde_json::to_value(VxlanData { vni: e.vni, vtep_mac: e.vtep_mac }).expect("two plain members")
            })
        };
        let wire = Wire {
            // flannel's type for this member can't be null, so an IPv6-only lease says 0.0.0.0.
            public_ip: Some(match (&self.backend, endpoints.v4.map(|e| e.public_ip)) {
                (Backend::Reserved(ip), _) => *ip,
                (_, Some(IpAddr::V4(ip))) => ip,
                _ => Ipv4Addr::UNSPECIFIED,
            }),
            public_ipv6: endpoints.v6.and_then(|e| match e.public_ip {
                IpAddr::V6(ip) => Some(ip),
                IpAddr::V4(_) => None,
            }),
            backend_type: backend_type.to_owned(),
            backend_data: data(Family::V4),
            backend_v6_data: data(Family::V6),
            fabric: self.owner.as_ref().map(|owner| serde_json::to_value(owner).expect("plain members")),
            unknown: self.unknown.clone(),
        };
        serde_json::to_vec(&wire).expect("plain members")
    }

    /// The node that says it holds the lease; flannel nodes have no name here.
    #[must_use]
    pub fn node(&self) -> Option<&NodeName> {
        self.owner.as_ref().map(|owner| &owner.node)
    }

    /// The endpoints, when the backend is VXLAN.
    #[must_use]
    pub fn endpoints(&self) -> PerFamily<Endpoint> {
        match &self.backend {
            Backend::Vxlan(endpoints) => *endpoints,
            Backend::Reserved(_) | Backend::Other(_) => PerFamily::default(),
        }
    }

    /// A placeholder that keeps `key` for a node that is away. Its address is one of 240.0.0.0/4, which nobody can
    /// have, and another for each subnet: flannel nodes would take two records with one address for one node's.
    #[must_use]
    pub fn placeholder(node: &NodeName, key: &LeaseKey) -> Self {
        // 27 bits: of the first address, past the two bits that tell no subnets apart, or of a hash, with a bit that
        // keeps these two kinds apart.
        let place = match key.subnets().v4.map(Subnet::base) {
            Some(IpAddr::V4(ip)) => ip.to_bits() >> 2 & 0x07ff_ffff,
            _ => 0x0800_0000 | (stable_hash(key.encode().as_bytes()) & 0x03ff_ffff) as u32,
        };
        let address = Ipv4Addr::from_bits(0xf000_0000 | place);
        Self { backend: Backend::Reserved(address), owner: Some(Owner::of(node.clone())), unknown: Map::new() }
    }

    /// True for a placeholder, behind which there is no node.
    #[must_use]
    pub fn is_placeholder(&self) -> bool {
        matches!(self.backend, Backend::Reserved(_))
    }
}

fn endpoint(family: Family, public_ip: Option<IpAddr>, data: Option<&Value>) -> Result<Endpoint, RecordError> {
    let public_ip = public_ip.filter(|ip| is_host(*ip)).ok_or(RecordError::Missing("public address", family))?;
    let data = data.ok_or(RecordError::Missing("backend data", family))?;
    let VxlanData { vni, vtep_mac } =
        VxlanData::deserialize(data).map_err(|e| RecordError::Json(format!("{family} backend data: {e}")))?;
    Ok(Endpoint { public_ip, vtep_mac, vni })
}

/// True for an address that another node can have: not unspecified, loopback, multicast or broadcast.
#[must_use]
pub fn is_host(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || broadcast)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLANNEL: &[u8] = br#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;

    fn key(text: &str) -> LeaseKey {
        LeaseKey::decode(text).expect(text)
    }

    #[test]
    fn flannels_own_value_is_read_and_written_byte_for_byte() {
        let key = key("10.5.52.0-24");
        let record = Record::decode(&key, FLANNEL).expect("flannel's value");
        assert_eq!(record.encode(), FLANNEL);
        assert_eq!(record.endpoints().v4.expect("IPv4").vtep_mac.to_string(), "c6:d2:32:6f:8f:44");
        assert_eq!(record.node(), None);
    }

    #[test]
    fn keys_have_one_spelling() {
        for text in ["10.5.52.0-24", "10.5.52.0-24&fd00:12:13::-64", "0.0.0.0-0&fd00:12:13::-64"] {
            assert_eq!(key(text).encode(), text);
        }
        assert_eq!(key("10.5.52.0-24&fd00:12:13::-64").to_string(), "10.5.52.0/24,fd00:12:13::/64", "for people");
        assert_eq!(key("0.0.0.0-0&fd00:12:13::-64").to_string(), "fd00:12:13::/64");
        for text in [
            "",
            "10.5.52.0",
            "10.5.52.1-24",
            "10.5.52.0/24",
            "10.5.52.0-024",
            "10.05.52.0-24",
            "10.5.52.0-32",
            "10.5.52.0-24&",
            "10.5.52.0-24&FD00::-64",
            "10.5.52.0-24&fd00::-128",
            "fd00::-64",
            "0.0.0.0-0",
            "../config",
            "10.5.52.0-24&fd00::-64&x",
        ] {
            assert!(LeaseKey::decode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn members_of_a_newer_version_survive_a_rewrite() {
        let key = key("10.5.52.0-24");
        let value = br#"{"PublicIP":"192.0.2.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:07"},"Fabric":{"v":9,"node":"node-1","boot":"b","netns":4026531840,"epoch":3,"colour":"red"},"Later":[1]}"#;
        let record = Record::decode(&key, value).expect("readable");
        let again = Record::decode(&key, &record.encode()).expect("readable");
        assert_eq!(again, record);
        assert_eq!(again.unknown["Later"], serde_json::json!([1]));
        assert_eq!(again.owner.expect("owner").unknown["colour"], "red");
    }

    #[test]
    fn hostile_values_are_refused() {
        let v4 = key("10.5.52.0-24");
        for value in [
            r#"{"PublicIP":"224.0.0.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:07"}}"#,
            r#"{"PublicIP":"192.0.2.7","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}}"#,
            r#"{"PublicIP":"192.0.2.7","BackendType":"vxlan","BackendData":{"VNI":16777216,"VtepMAC":"02:42:c0:00:02:07"}}"#,
            r#"{"PublicIP":"192.0.2.7; reboot","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:07"}}"#,
            r#"{"PublicIP":"192.0.2.7","BackendType":"vxlan"}"#,
            "[]",
            "",
            "null",
        ] {
            assert!(Record::decode(&v4, value.as_bytes()).is_err(), "{value}");
        }
        assert_eq!(Record::decode(&v4, &vec![b' '; MAX_VALUE + 1]), Err(RecordError::TooLarge(MAX_VALUE + 1)));
        // A dual-stack key whose value lacks the IPv6 half.
        assert!(Record::decode(&key("10.5.52.0-24&fd00::-64"), FLANNEL).is_err());
    }

    #[test]
    fn placeholders_have_addresses_that_nobody_can_have_and_no_two_share() {
        let node: NodeName = "node-1".parse().expect("valid");
        let mut addresses = std::collections::BTreeSet::new();
        for n in 1..=255_u8 {
            for text in [format!("10.244.{n}.0-24"), format!("0.0.0.0-0&fd00:{n:x}::-64")] {
                let record = Record::placeholder(&node, &key(&text));
                assert_eq!(Record::decode(&key(&text), &record.encode()), Ok(record.clone()));
                assert!(record.is_placeholder() && record.endpoints().is_empty());
                let Backend::Reserved(address) = record.backend else { unreachable!("just made") };
                assert!(address.octets()[0] >= 240 && !address.is_broadcast(), "{address}");
                assert!(addresses.insert(address), "{address} twice");
            }
        }
    }

    #[test]
    fn other_backends_are_told_apart_and_not_refused() {
        let value = br#"{"PublicIP":"192.0.2.7","BackendType":"host-gw"}"#;
        let record = Record::decode(&key("10.5.52.0-24"), value).expect("readable");
        assert_eq!(record.backend, Backend::Other("host-gw".into()));
    }
}
