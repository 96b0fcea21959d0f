//! Which device is to be this node's own in a family, or what of others stands in its way.

use std::net::IpAddr;

use super::Conflict;
use crate::device;
use crate::model::{Family, IfName, MacAddr, PerFamily};
use crate::network::NetworkConfig;
use crate::state::{Foreign, Routing, VxlanLink};

/// The name of the device that is to be like `want`.
///
/// # Errors
/// Another interface has it, or a VXLAN device of others has the same VNI, port and underlay family.
pub(super) fn own_device(
    family: Family,
    want: &VxlanLink,
    have: &Routing,
    foreign: &Foreign,
) -> Result<IfName, Conflict> {
    let name = device::choose(family, want, &have.links, &foreign.links);
    if let Some(link) = foreign.links.get(&name) {
        let what = match link.vxlan {
            Some((vni, port, _)) => format!("vxlan with VNI {vni}, UDP port {port}"),
            None if link.kind.is_empty() => "a physical interface".into(),
            None => link.kind.clone(),
        };
        return Err(Conflict::Name { name, what });
    }
    let same = (want.vni.get(), want.port, Family::of(want.local));
    match foreign.links.iter().find(|(_, link)| link.vxlan == Some(same)) {
        Some((other, _)) => Err(Conflict::Vni { name: *other, vni: want.vni, port: want.port }),
        None => Ok(name),
    }
}

/// What keeps this node from having a device of its own that sends from these underlay addresses: known before there is a
/// lease, so that a node which can't have one claims nothing.
#[must_use]
pub fn device_conflict(
    network: &NetworkConfig,
    locals: &PerFamily<IpAddr>,
    have: &Routing,
    foreign: &Foreign,
) -> Option<Conflict> {
    let vxlan = &network.vxlan;
    locals.iter().find_map(|(family, local)| {
        // Neither MAC address nor MTU decide about it.
        let mac = MacAddr::try_from([2, 0, 0, 0, 0, 0]).expect("a unicast address");
        let (vni, port, gbp, learning) = (vxlan.vni, vxlan.port, vxlan.gbp, vxlan.learning);
        let want = VxlanLink { vni, port, gbp, mac, local: *local, mtu: 0, learning, up: true };
        own_device(family, &want, have, foreign).err()
    })
}
