//! The network config that the whole cluster shares: the JSON at `<prefix>/config`, as flannel defines it.

mod document;
mod json;

use std::net::IpAddr;

use self::document::members;
pub use self::document::{BackendDocument, ConfigError, NetworkDocument};
use crate::model::{Family, PerFamily, Subnet, Vni, from_bits, to_bits};

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

#[cfg(test)]
mod tests;
