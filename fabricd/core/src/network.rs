//! The network config that the whole cluster shares: the JSON at `<prefix>/config`, as flannel defines it.

mod json;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::model::{Family, Invalid, PerFamily, Subnet, Vni, from_bits, to_bits};

/// Linux's and flannel's VXLAN port. RFC 7348 assigned 4789 later.
pub const DEFAULT_PORT: u16 = 8472;

/// The largest config that is looked at, in bytes.
pub const MAX_CONFIG: usize = 64 * 1024;

/// One family's address space and how it is cut into the nodes' subnets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// All of it. A route to it leads into the fabric.
    pub network: Subnet,
    /// Prefix length of one node's subnet.
    pub subnet_len: u8,
    /// Base address of the first subnet that may be leased.
    pub min: IpAddr,
    /// Base address of the last one.
    pub max: IpAddr,
}

impl AddressSpace {
    /// How many subnets may be leased; saturates.
    #[must_use]
    pub fn capacity(&self) -> u128 {
        ((to_bits(self.max) - to_bits(self.min)) >> self.host_bits()).saturating_add(1)
    }

    /// The `index`th subnet that may be leased, counted from 0.
    #[must_use]
    pub fn subnet(&self, index: u128) -> Option<Subnet> {
        (index < self.capacity()).then(|| {
            let base = from_bits(self.network.family(), to_bits(self.min) + (index << self.host_bits()));
            Subnet::holding(base, self.subnet_len).expect("the length was checked with the config")
        })
    }

    /// True when a node may lease `subnet` under this config.
    #[must_use]
    pub fn admits(&self, subnet: Subnet) -> bool {
        subnet.family() == self.network.family()
            && subnet.prefix_len() == self.subnet_len
            && (self.min..=self.max).contains(&subnet.base())
    }

    fn host_bits(&self) -> u32 {
        u32::from(self.network.family().bits() - self.subnet_len)
    }
}

/// How packets travel between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanConfig {
    /// The VXLAN network identifier of every node.
    pub vni: Vni,
    /// UDP destination port.
    pub port: u16,
    /// MTU of the underlay to assume, in bytes; without it each node takes its interface's.
    pub underlay_mtu: Option<u32>,
    /// VXLAN group policy extension: the packet mark travels along.
    pub gbp: bool,
    /// Learn FDB entries from traffic too.
    pub learning: bool,
    /// Peers on the same link get a plain route instead of VXLAN.
    pub direct_routing: bool,
}

/// The validated network config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The address space of each enabled family.
    pub spaces: PerFamily<AddressSpace>,
    /// The backend's settings.
    pub vxlan: VxlanConfig,
    /// The address that a network is written with, where that is not its first: `10.10.10.0` of `10.10.10.0/16`.
    pub written: PerFamily<IpAddr>,
}

/// Why a network config can't be used: which member, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not the JSON object of a config.
    #[error("the network config is not valid JSON: {0}")]
    Json(String),
    /// JSON, but no object.
    #[error(
        "the network config is {0}, not a JSON object such as {{\"Network\": \"10.244.0.0/16\", \"Backend\": {{\"Type\": \
         \"vxlan\"}}}}"
    )]
    NoObject(String),
    /// A config of more than [`MAX_CONFIG`] bytes.
    #[error("the network config has {0} bytes, more than {MAX_CONFIG}")]
    TooLarge(usize),
    /// Both families are switched off.
    #[error("EnableIPv4 and EnableIPv6 are both false; enable one, as in \"EnableIPv4\": true")]
    NoFamily,
    /// A family is enabled without a network.
    #[error("{member} is missing; add a line such as \"{member}\": \"{example}\"")]
    NoNetwork {
        /// The member that lacks.
        member: &'static str,
        /// A value that would do.
        example: &'static str,
    },
    /// A member has a value that can't work.
    #[error("{member} is {value}: {reason}")]
    Member {
        /// The member.
        member: &'static str,
        /// What it says.
        value: String,
        /// What is wrong with that, and what would be right.
        reason: String,
    },
    /// An absent backend means `udp` to flannel, which no fabricd speaks.
    #[error("there is no Backend, which means \"udp\" to flannel; add \"Backend\": {{\"Type\": \"vxlan\"}}")]
    NoBackend,
    /// A backend that is not VXLAN.
    #[error("Backend.Type is {0:?}, which fabricd does not support; use \"Backend\": {{\"Type\": \"vxlan\"}}")]
    Backend(String),
}

/// The JSON as it is stored: flannel's members and their spelling.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct NetworkDocument {
    /// Default true.
    #[serde(rename = "EnableIPv4", skip_serializing_if = "Option::is_none")]
    pub enable_ipv4: Option<bool>,
    /// Default false.
    #[serde(rename = "EnableIPv6", skip_serializing_if = "Option::is_none")]
    pub enable_ipv6: Option<bool>,
    /// flannel's choice of nftables over iptables. fabricd always uses nftables.
    #[serde(rename = "EnableNFTables", skip_serializing_if = "Option::is_none")]
    pub enable_nftables: Option<bool>,
    /// The IPv4 address space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Subnet>,
    /// The IPv6 address space.
    #[serde(rename = "IPv6Network", skip_serializing_if = "Option::is_none")]
    pub ipv6_network: Option<Subnet>,
    /// Prefix length of a node's IPv4 subnet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet_len: Option<u8>,
    /// Prefix length of a node's IPv6 subnet.
    #[serde(rename = "IPv6SubnetLen", skip_serializing_if = "Option::is_none")]
    pub ipv6_subnet_len: Option<u8>,
    /// First IPv4 subnet to lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet_min: Option<Ipv4Addr>,
    /// Last IPv4 subnet to lease.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet_max: Option<Ipv4Addr>,
    /// First IPv6 subnet to lease.
    #[serde(rename = "IPv6SubnetMin", skip_serializing_if = "Option::is_none")]
    pub ipv6_subnet_min: Option<Ipv6Addr>,
    /// Last IPv6 subnet to lease.
    #[serde(rename = "IPv6SubnetMax", skip_serializing_if = "Option::is_none")]
    pub ipv6_subnet_max: Option<Ipv6Addr>,
    /// How packets travel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<BackendDocument>,
}

/// The `Backend` member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct BackendDocument {
    /// `vxlan`.
    #[serde(rename = "Type", default)]
    pub kind: String,
    /// Default 1.
    #[serde(rename = "VNI", skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// Default 0, the kernel's choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// MTU of the underlay.
    #[serde(rename = "MTU", skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Default false.
    #[serde(rename = "GBP", skip_serializing_if = "Option::is_none")]
    pub gbp: Option<bool>,
    /// Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning: Option<bool>,
    /// Default false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_routing: Option<bool>,
}

impl NetworkConfig {
    /// What differs in `wanted` that can't change under running pods, in words: family, network, subnet length, VNI,
    /// port and group policy. The rest can: MTU, first and last subnet, learning and direct routing.
    #[must_use]
    pub fn lasting_differences(&self, wanted: &Self) -> Vec<String> {
        let space = |config: &Self, family| match config.spaces.get(family) {
            Some(space) => format!("{} in /{}", space.network, space.subnet_len),
            None => "off".to_owned(),
        };
        let of_spaces = Family::ALL.map(|family| (family.to_string(), space(self, family), space(wanted, family)));
        let (ours, theirs) = (&self.vxlan, &wanted.vxlan);
        let of_vxlan = [
            ("VNI".to_owned(), ours.vni.to_string(), theirs.vni.to_string()),
            ("port".to_owned(), ours.port.to_string(), theirs.port.to_string()),
            ("GBP".to_owned(), ours.gbp.to_string(), theirs.gbp.to_string()),
        ];
        let differing = of_spaces.into_iter().chain(of_vxlan).filter(|(_, now, then)| now != then);
        differing.map(|(what, now, then)| format!("{what}: {now} → {then}")).collect()
    }

    /// What an operator should know about how this config was read, each with what to write instead.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let masked = |(family, ip): (Family, &IpAddr)| {
            let (member, network) = (members(family).network, self.spaces.get(family)?.network);
            let len = network.prefix_len();
            Some(format!(
                "the network config says \"{member}\": \"{ip}/{len}\", which has bits set after its prefix: as with flannel \
                 they are masked, and the network is {network}; write \"{member}\": \"{network}\" there"
            ))
        };
        self.written.iter().filter_map(masked).collect()
    }

    /// The document that says this, with nothing left to defaults.
    #[must_use]
    pub fn document(&self) -> NetworkDocument {
        let v4 = |ip: fn(&AddressSpace) -> IpAddr| match self.spaces.v4.as_ref().map(ip) {
            Some(IpAddr::V4(ip)) => Some(ip),
            _ => None,
        };
        let v6 = |ip: fn(&AddressSpace) -> IpAddr| match self.spaces.v6.as_ref().map(ip) {
            Some(IpAddr::V6(ip)) => Some(ip),
            _ => None,
        };
        NetworkDocument {
            enable_ipv4: Some(self.spaces.v4.is_some()),
            enable_ipv6: Some(self.spaces.v6.is_some()),
            enable_nftables: None,
            network: self.spaces.v4.map(|space| space.network),
            ipv6_network: self.spaces.v6.map(|space| space.network),
            subnet_len: self.spaces.v4.map(|space| space.subnet_len),
            ipv6_subnet_len: self.spaces.v6.map(|space| space.subnet_len),
            subnet_min: v4(|space| space.min),
            subnet_max: v4(|space| space.max),
            ipv6_subnet_min: v6(|space| space.min),
            ipv6_subnet_max: v6(|space| space.max),
            backend: Some(BackendDocument {
                kind: "vxlan".to_owned(),
                vni: Some(self.vxlan.vni.get()),
                port: Some(self.vxlan.port),
                mtu: self.vxlan.underlay_mtu,
                gbp: Some(self.vxlan.gbp),
                learning: Some(self.vxlan.learning),
                direct_routing: Some(self.vxlan.direct_routing),
            }),
        }
    }

    /// Reads and validates the JSON of `<prefix>/config`, as flannel reads it.
    ///
    /// # Errors
    /// The first thing that can't work, with the line that would.
    pub fn decode(json: &[u8]) -> Result<Self, ConfigError> {
        if json.len() > MAX_CONFIG {
            return Err(ConfigError::TooLarge(json.len()));
        }
        let (document, written) = json::read(json)?;
        Ok(Self { written, ..document.validate()? })
    }

    /// Address space that overlaps one of `underlay`, the prefixes of this node's own links, with that prefix.
    /// Packets to such an address would go to the link, or into the fabric, but never to both.
    #[must_use]
    pub fn overlap(&self, underlay: &[Subnet]) -> Option<(Subnet, Subnet)> {
        self.spaces
            .values()
            .find_map(|space| Some((space.network, *underlay.iter().find(|link| link.overlaps(space.network))?)))
    }
}

impl NetworkDocument {
    /// The config that this document describes, defaults filled in by flannel's rules.
    ///
    /// # Errors
    /// The first thing that can't work, with the line that would.
    pub fn validate(&self) -> Result<NetworkConfig, ConfigError> {
        let v4 = self.enable_ipv4.unwrap_or(true).then(|| {
            address_space(
                &V4_MEMBERS,
                self.network,
                self.subnet_len,
                self.subnet_min.map(IpAddr::V4),
                self.subnet_max.map(IpAddr::V4),
            )
        });
        let v6 = self.enable_ipv6.unwrap_or(false).then(|| {
            let (min, max) = (self.ipv6_subnet_min.map(IpAddr::V6), self.ipv6_subnet_max.map(IpAddr::V6));
            address_space(&V6_MEMBERS, self.ipv6_network, self.ipv6_subnet_len, min, max)
        });
        let spaces = PerFamily { v4: v4.transpose()?, v6: v6.transpose()? };
        if spaces.is_empty() {
            return Err(ConfigError::NoFamily);
        }
        let vxlan = self.backend.as_ref().ok_or(ConfigError::NoBackend)?.validate()?;
        Ok(NetworkConfig { spaces, vxlan, written: PerFamily::default() })
    }
}

impl BackendDocument {
    fn validate(&self) -> Result<VxlanConfig, ConfigError> {
        // flannel looks backends up by their names in lower case.
        if !self.kind.eq_ignore_ascii_case("vxlan") {
            return Err(if self.kind.is_empty() {
                ConfigError::NoBackend
            } else {
                ConfigError::Backend(self.kind.clone())
            });
        }
        let vni = self.vni.map_or(Ok(Vni::DEFAULT), Vni::try_from).map_err(|e: Invalid| ConfigError::Member {
            member: "Backend.VNI",
            value: self.vni.unwrap_or_default().to_string(),
            reason: e.to_string(),
        })?;
        // 1280 is the least that IPv6 allows (RFC 8200), 70 the overhead that comes on top.
        let mtu = self.mtu.filter(|mtu| *mtu != 0);
        if let Some(mtu) = mtu.filter(|mtu| !(1350..=65535).contains(mtu)) {
            let reason =
                "it is the underlay's MTU in bytes; use 1350 to 65535, or leave it out to take the interface's";
            return Err(ConfigError::Member { member: "Backend.MTU", value: mtu.to_string(), reason: reason.into() });
        }
        Ok(VxlanConfig {
            vni,
            port: self.port.filter(|port| *port != 0).unwrap_or(DEFAULT_PORT),
            underlay_mtu: mtu,
            gbp: self.gbp.unwrap_or(false),
            learning: self.learning.unwrap_or(false),
            direct_routing: self.direct_routing.unwrap_or(false),
        })
    }
}

/// What a family's members are called, and the lengths that flannel allows in it.
struct Members {
    family: Family,
    network: &'static str,
    example: &'static str,
    subnet_len: &'static str,
    min: &'static str,
    max: &'static str,
    default_len: u8,
    longest_len: u8,
}

const V4_MEMBERS: Members = Members {
    family: Family::V4,
    network: "Network",
    example: "10.244.0.0/16",
    subnet_len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
    default_len: 24,
    longest_len: 30,
};

const V6_MEMBERS: Members = Members {
    family: Family::V6,
    network: "IPv6Network",
    example: "fd00:10:244::/48",
    subnet_len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
    default_len: 64,
    longest_len: 126,
};

fn members(family: Family) -> &'static Members {
    match family {
        Family::V4 => &V4_MEMBERS,
        Family::V6 => &V6_MEMBERS,
    }
}

fn address_space(
    of: &Members,
    network: Option<Subnet>,
    subnet_len: Option<u8>,
    min: Option<IpAddr>,
    max: Option<IpAddr>,
) -> Result<AddressSpace, ConfigError> {
    let wrong =
        |member, value: &dyn ToString, reason: String| ConfigError::Member { member, value: value.to_string(), reason };

    let network = network.ok_or(ConfigError::NoNetwork { member: of.network, example: of.example })?;
    if network.family() != of.family {
        return Err(wrong(of.network, &network, format!("it must be {}, as in {}", of.family, of.example)));
    }
    if network.base().is_multicast() || network.base().is_loopback() {
        return Err(wrong(of.network, &network, format!("pods need unicast addresses, as in {}", of.example)));
    }
    let longest_network = of.longest_len - 2;
    if network.prefix_len() > longest_network {
        return Err(wrong(
            of.network,
            &network,
            format!("it is too small to be cut up; use /{longest_network} or larger"),
        ));
    }

    let least = network.prefix_len() + 2;
    // flannel: 24 (64) when that leaves at least four subnets, else four subnets.
    let subnet_len = subnet_len.filter(|len| *len != 0).unwrap_or(of.default_len.max(least));
    if !(least..=of.longest_len).contains(&subnet_len) {
        let reason = format!("with {} {network} it must be {least} to {}", of.network, of.longest_len);
        return Err(wrong(of.subnet_len, &subnet_len, reason));
    }

    let host_bits = u32::from(of.family.bits() - subnet_len);
    let nth = |bits: u128| from_bits(of.family, bits);
    let first = nth(to_bits(network.base()) + (1 << host_bits));
    let last = nth((to_bits(network.last()) >> host_bits) << host_bits);
    let bound = |member, given: Option<IpAddr>, default: IpAddr| -> Result<IpAddr, ConfigError> {
        let Some(ip) = given.filter(|ip| !ip.is_unspecified()) else { return Ok(default) };
        if !network.contains(ip) {
            return Err(wrong(member, &ip, format!("it lies outside {} {network}; use {first} to {last}", of.network)));
        }
        let base = Subnet::holding(ip, subnet_len).expect("checked above").base();
        if base != ip {
            return Err(wrong(member, &ip, format!("it is not the first address of a /{subnet_len}; use {base}")));
        }
        Ok(ip)
    };
    let (min, max) = (bound(of.min, min, first)?, bound(of.max, max, last)?);
    if min > max {
        return Err(wrong(of.min, &min, format!("it lies after {} {max}; swap them or leave both out", of.max)));
    }
    Ok(AddressSpace { network, subnet_len, min, max })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(json: &str) -> Result<NetworkConfig, ConfigError> {
        NetworkConfig::decode(json.as_bytes())
    }

    #[test]
    fn document_says_what_the_config_says() {
        for json in [
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#,
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan","VNI":7,"MTU":1400}}"#,
            r#"{"EnableIPv6":true,"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.1.0.0","SubnetMax":"10.9.0.0","IPv6Network":"fd00::/40","Backend":{"Type":"vxlan","Port":4789,"DirectRouting":true}}"#,
        ] {
            let config = NetworkConfig::decode(json.as_bytes()).expect(json);
            assert_eq!(config.document().validate().as_ref(), Ok(&config), "{json}");
        }
    }

    #[test]
    fn what_cannot_change_under_running_pods_is_told_apart() {
        let config = |json: &str| NetworkConfig::decode(json.as_bytes()).expect(json);
        let now = config(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let live = r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.9.0","Backend":{"Type":"vxlan","MTU":1400,"DirectRouting":true}}"#;
        assert_eq!(now.lasting_differences(&config(live)), Vec::<String>::new());
        let other = r#"{"Network":"10.96.0.0/16","SubnetLen":26,"EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan","VNI":2}}"#;
        let told = ["IPv4: 10.244.0.0/16 in /24 → 10.96.0.0/16 in /26", "IPv6: off → fd00::/48 in /64", "VNI: 1 → 2"];
        assert_eq!(now.lasting_differences(&config(other)), told);
    }

    #[test]
    fn config_is_read_as_flannel_reads_it() {
        let plain = |network: &str| decode(&format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#));
        let want = NetworkConfig { written: PerFamily::default(), ..plain("10.10.0.0/16").expect("valid") };
        for (json, why) in [
            (r#"{"network":"10.10.0.0/16","BACKEND":{"type":"vxlan"}}"#, "case of members"),
            (r#"{"Network":"10.10.0.0/16","Backend":{"Type":"VXLAN"}}"#, "case of the backend"),
            (
                r#"{"Network":"10.10.0.0/16","Backend":{"Type":"vxlan","vni":1,"port":8472,"directRouting":false}}"#,
                "vni",
            ),
            (r#"{"Network":"10.10.0.0/16","Backend":{"Type":"vxlan"},"Comment":[{"any":1}]}"#, "unknown members"),
            (r#"{"Network":"10.0.0.0/8","Network":"10.10.0.0/16","Backend":{"Type":"vxlan"}}"#, "twice"),
            (r#"{"network":"10.0.0.0/8","Network":"10.10.0.0/16","Backend":{"Type":"vxlan"}}"#, "twice, by case"),
            (r#"{"Network":"10.10.0.0/16","SubnetLen":null,"Backend":{"Type":"vxlan","VNI":null}}"#, "null"),
            (r#"{"Network":"10.10.0.0/16","SubnetLen":0,"SubnetMin":"0.0.0.0","Backend":{"Type":"vxlan"}}"#, "zero"),
            (r#"{"Network":"10.10.10.0/16","Backend":{"Type":"vxlan"}}"#, "host bits"),
        ] {
            let config = decode(json).expect(json);
            assert_eq!(NetworkConfig { written: PerFamily::default(), ..config }, want, "{why}: {json}");
        }

        let json = r#"{"Network": "10.10.10.0/16", "SubnetMin": "10.10.10.0", "SubnetMax": "10.10.99.0", "EnableIPv6": true,
            "IPv6Network": "2001:db8::7/48", "Backend": {"Type": "vxlan", "VNI": 1}}"#;
        let config = decode(json).expect("flannel runs on it");
        let v4 = config.spaces.v4.expect("IPv4");
        assert_eq!((v4.network.to_string(), v4.min.to_string()), ("10.10.0.0/16".into(), "10.10.10.0".into()));
        let [v4, v6]: [String; 2] = config.warnings().try_into().expect("one for each family");
        assert!(
            v4.contains(r#""Network": "10.10.10.0/16""#) && v4.ends_with(r#"write "Network": "10.10.0.0/16" there"#)
        );
        assert!(v6.ends_with(r#"write "IPv6Network": "2001:db8::/48" there"#), "{v6}");
        assert_eq!(
            decode(&serde_json::to_string(&config.document()).expect("JSON")).expect("valid").warnings(),
            [""; 0]
        );
    }

    #[test]
    fn defaults_are_flannels() {
        let config = decode(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).expect("valid");
        let v4 = config.spaces.v4.expect("IPv4");
        assert_eq!(
            (v4.subnet_len, v4.min.to_string(), v4.max.to_string()),
            (24, "10.244.1.0".into(), "10.244.255.0".into())
        );
        assert_eq!((config.vxlan.vni, config.vxlan.port), (Vni::DEFAULT, 8472));
        assert_eq!(v4.capacity(), 255);
        assert!(config.spaces.v6.is_none());
    }

    #[test]
    fn subnet_length_follows_the_network_in_both_families() {
        for (network, len) in [("10.0.0.0/22", 24), ("10.0.0.0/23", 25), ("10.0.0.0/28", 30)] {
            let config = decode(&format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#)).expect(network);
            assert_eq!(config.spaces.v4.expect("IPv4").subnet_len, len, "{network}");
        }
        for (network, len) in [("fd00::/48", 64), ("fd00::/62", 64), ("fd00::/63", 65), ("fd00::/124", 126)] {
            let json = format!(
                r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#
            );
            assert_eq!(decode(&json).expect(network).spaces.v6.expect("IPv6").subnet_len, len, "{network}");
        }
    }

    #[test]
    fn whole_address_space_of_ipv6_can_be_counted() {
        let json = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"::/0","IPv6SubnetLen":126,"Backend":{"Type":"vxlan"}}"#;
        let space = decode(json).expect("valid").spaces.v6.expect("IPv6");
        assert_eq!(space.capacity(), (1 << 126) - 1);
        assert!(space.subnet(space.capacity() - 1).is_some() && space.subnet(space.capacity()).is_none());
    }

    #[test]
    fn config_that_cannot_work_is_refused_with_the_way_out() {
        for (json, told) in [
            (r#"{"Network":"10.244.0.0/16"}"#, r#"add "Backend": {"Type": "vxlan"}"#),
            (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#, r#"use "Backend": {"Type": "vxlan"}"#),
            (r#"{"Backend":{"Type":"vxlan"}}"#, r#"add a line such as "Network": "10.244.0.0/16""#),
            (
                r#"{"Network":"10.10.0.0","Backend":{"Type":"vxlan"}}"#,
                r#"Network is "10.10.0.0": it must be an address and a prefix length, as in "Network": "10.10.0.0/16""#,
            ),
            (r#"{"Network":"10.10.0.0/33","Backend":{"Type":"vxlan"}}"#, r#"as in "Network": "10.10.0.0/16""#),
            (r#"{"Network":"10.10.0.0/+16","Backend":{"Type":"vxlan"}}"#, r#"as in "Network": "10.10.0.0/16""#),
            (r#"{"Network":["10.10.0.0/16"],"Backend":{"Type":"vxlan"}}"#, "Network is a list: it must be an address"),
            (
                r#"{"EnableIPv6":true,"Network":"10.10.0.0/16","IPv6Network":"2001:db8::","Backend":{"Type":"vxlan"}}"#,
                r#"as in "IPv6Network": "2001:db8::/48""#,
            ),
            (
                r#"{"Network":"10.10.0.0/16","SubnetLen":"26","Backend":{"Type":"vxlan"}}"#,
                r#"SubnetLen is "26": it must be a whole number without quotes, as in "SubnetLen": 26"#,
            ),
            (r#"{"Network":"10.10.0.0/16","SubnetLen":26.0,"Backend":{"Type":"vxlan"}}"#, r#"as in "SubnetLen": 26"#),
            (r#"{"Network":"10.10.0.0/16","SubnetLen":-1,"Backend":{"Type":"vxlan"}}"#, r#"as in "SubnetLen": 24"#),
            (
                r#"{"Network":"10.10.0.0/16","SubnetLen":300,"Backend":{"Type":"vxlan"}}"#,
                "SubnetLen is 300: it is too large",
            ),
            (
                r#"{"Network":"10.10.0.0/16","Backend":{"Type":"vxlan","VNI":"7"}}"#,
                r#"Backend.VNI is "7": it must be a whole number without quotes, as in "VNI": 7"#,
            ),
            (
                r#"{"Network":"10.10.0.0/16","Backend":{"Type":"vxlan","DirectRouting":"true"}}"#,
                r#"Backend.DirectRouting is "true": it must be true or false without quotes, as in "DirectRouting": true"#,
            ),
            (
                r#"{"Network":"10.10.0.0/16","SubnetMin":"x","Backend":{"Type":"vxlan"}}"#,
                r#"SubnetMin is "x": it must be an address of the network, as in "SubnetMin": "10.10.0.1""#,
            ),
            (r#"{"Network":"10.10.0.0/16","Backend":"vxlan"}"#, r#"Backend is "vxlan": it must be an object"#),
            (r#"{"Network":"10.10.0.0/16","Backend":null}"#, r#"add "Backend": {"Type": "vxlan"}"#),
            (r#"["10.10.0.0/16"]"#, "not a JSON object such as"),
            (r#"{"Network":"10.0.0.0/29","Backend":{"Type":"vxlan"}}"#, "use /28 or larger"),
            (r#"{"Network":"10.0.0.0/16","SubnetLen":17,"Backend":{"Type":"vxlan"}}"#, "it must be 18 to 30"),
            (
                r#"{"Network":"10.0.0.0/16","SubnetMin":"10.1.0.0","Backend":{"Type":"vxlan"}}"#,
                "use 10.0.1.0 to 10.0.255.0",
            ),
            (r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.0.7","Backend":{"Type":"vxlan"}}"#, "use 10.0.0.0"),
            (
                r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.9.0","SubnetMax":"10.0.8.0","Backend":{"Type":"vxlan"}}"#,
                "swap them",
            ),
            (r#"{"Network":"fd00::/48","Backend":{"Type":"vxlan"}}"#, "it must be IPv4"),
            (r#"{"Network":"224.0.0.0/16","Backend":{"Type":"vxlan"}}"#, "unicast"),
            (r#"{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#, "1 to 16777215"),
            (r#"{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan","MTU":60}}"#, "1350 to 65535"),
            (r#"{"EnableIPv4":false,"Backend":{"Type":"vxlan"}}"#, "both false"),
            (
                r#"{"EnableIPv6":true,"Network":"10.0.0.0/16","Backend":{"Type":"vxlan"}}"#,
                r#""IPv6Network": "fd00:10:244::/48""#,
            ),
            ("", "not valid JSON"),
        ] {
            let error = decode(json).expect_err(json).to_string();
            assert!(error.contains(told), "{json}\n{error}");
        }
    }

    #[test]
    fn overlap_with_a_link_is_found() {
        let config = decode(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).expect("valid");
        let links: Vec<Subnet> = ["192.0.2.0/24", "10.244.7.0/24"].map(|s| s.parse().expect("valid")).into();
        assert_eq!(config.overlap(&links).map(|(_, link)| link), Some(links[1]));
        assert_eq!(config.overlap(&links[..1]), None);
    }
}
