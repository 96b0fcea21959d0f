//! [`LeasedRanges`]: what of an address space is leased.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::model::Subnet;
use crate::network::AddressSpace;

/// Leased subnets of one family that can be asked for the one in a place.
#[derive(Clone, Debug, Default)]
pub struct LeasedRanges {
    /// First address → last address, merged: no two ranges overlap.
    ranges: BTreeMap<IpAddr, IpAddr>,
}

impl LeasedRanges {
    /// The leased subnets of `space`'s family. Ranges that no node can hold under any config of this network
    /// (shorter than two bits over the network's length, or outside of it) take nothing: a garbage record
    /// must not use up the address space.
    pub fn new(space: &AddressSpace, leased: impl IntoIterator<Item = Subnet>) -> Self {
        let possible = |s: &Subnet| space.network.covers(*s) && s.prefix_len() >= space.network.prefix_len() + 2;
        Self::all(leased.into_iter().filter(possible))
    }

    /// All of these subnets.
    pub fn all(leased: impl IntoIterator<Item = Subnet>) -> Self {
        let mut subnets: Vec<Subnet> = leased.into_iter().collect();
        subnets.sort_by_key(|s| (s.base(), s.prefix_len()));
        let mut ranges: BTreeMap<IpAddr, IpAddr> = BTreeMap::new();
        for subnet in subnets {
            // Subnets nest or lie apart, so one inside another adds nothing.
            if ranges.last_key_value().is_none_or(|(_, last)| *last < subnet.base()) {
                ranges.insert(subnet.base(), subnet.last());
            }
        }
        Self { ranges }
    }

    /// The range that shares an address with `subnet`: its last address.
    pub(crate) fn blocking(&self, subnet: Subnet) -> Option<IpAddr> {
        let (_, last) = self.ranges.range(..=subnet.last()).next_back()?;
        (*last >= subnet.base()).then_some(*last)
    }

    /// True when nothing of `subnet` is leased.
    #[must_use]
    pub fn leaves(&self, subnet: Subnet) -> bool {
        self.blocking(subnet).is_none()
    }
}
