//! The network config's JSON as values, what it means, and what can't work in it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use super::{AddressSpace, DEFAULT_PORT, MAX_CONFIG, NetworkConfig, VxlanConfig};
use crate::model::{Family, Invalid, PerFamily, Subnet, Vni, from_bits, to_bits};

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
pub(super) struct Members {
    family: Family,
    pub(super) network: &'static str,
    pub(super) example: &'static str,
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

pub(super) fn members(family: Family) -> &'static Members {
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
