//! Writes of routing: links, addresses, FDB, neighbours, nexthop objects, routes, settings.

use std::net::IpAddr;

use fabric_core::diff::{Change, routing};
use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::state::{ROUTE_PROTOCOL, Via};

use super::Tables;

impl Tables {
    /// One write of routing, as the kernel takes it. Deleting what is gone is fine.
    pub(super) fn write(&mut self, op: &routing::Op) -> Result<(), i32> {
        use routing::Op;
        match op {
            Op::Link(name, Change::Create(link)) => self.add_vxlan(*name, *link)?,
            Op::Link(name, Change::Replace { now, .. }) => {
                let was = *self.our_link(name).ok_or(libc::ENODEV)?;
                if !was.can_become(now) {
                    return Err(libc::EOPNOTSUPP);
                }
                if was.up && !now.up {
                    self.set_down(name);
                }
                if was.mac != now.mac {
                    self.neighbours.retain(|(dev, _), _| dev != name);
                }
                let link = self.links.get_mut(name).expect("just seen");
                (link.up, link.mtu, link.vxlan) = (now.up, now.mtu, Some(*now));
            }
            Op::Link(name, Change::Delete(_)) | Op::Outgrown(name, _) => {
                if self.our_link(name).is_some() {
                    self.delete_link(name);
                }
            }
            Op::Sysctl(setting, value) => {
                *self.sysctls.get_mut(setting).ok_or(libc::ENOENT)? = *value;
            }
            Op::Address(dev, Change::Create(address) | Change::Replace { now: address, .. }) => {
                self.present(dev)?;
                self.addresses.insert((*dev, address.base(), *address));
            }
            Op::Address(dev, Change::Delete(address)) => {
                self.addresses.remove(&(*dev, address.base(), *address));
            }
            Op::Fdb(dev, mac, Change::Create(dst) | Change::Replace { now: dst, .. }) => {
                self.present(dev)?;
                self.fdb.insert((*dev, *mac), *dst);
            }
            Op::Fdb(dev, mac, Change::Delete(_)) => {
                self.fdb.remove(&(*dev, *mac));
            }
            Op::Neighbour(dev, ip, Change::Create(mac) | Change::Replace { now: mac, .. }) => {
                self.present(dev)?;
                self.neighbours.insert((*dev, *ip), *mac);
            }
            Op::Neighbour(dev, ip, Change::Delete(_)) => {
                self.neighbours.remove(&(*dev, *ip));
            }
            Op::Nexthop(..) if self.without_nexthop_objects => return Err(libc::EOPNOTSUPP),
            Op::Nexthop(id, Change::Create(to)) => {
                self.usable(&to.dev)?;
                if self.nexthops.contains_key(id) {
                    return Err(libc::EEXIST);
                }
                self.nexthops.insert(*id, (ROUTE_PROTOCOL, *to));
            }
            Op::Nexthop(id, Change::Replace { now: to, .. }) => {
                self.usable(&to.dev)?;
                self.nexthops.insert(*id, (ROUTE_PROTOCOL, *to));
            }
            Op::Nexthop(id, Change::Delete(_)) => self.delete_nexthop(*id),
            Op::Route(dst, Change::Create(via)) => {
                self.check_route(*dst, via)?;
                if self.routes.contains_key(dst) {
                    return Err(libc::EEXIST);
                }
                self.routes.insert(*dst, (ROUTE_PROTOCOL, via.clone()));
            }
            Op::Route(dst, Change::Replace { now: via, .. }) => {
                self.check_route(*dst, via)?;
                self.routes.insert(*dst, (ROUTE_PROTOCOL, via.clone()));
            }
            Op::Route(dst, Change::Delete(via)) => {
                if self.routes.get(dst) == Some(&(ROUTE_PROTOCOL, via.clone())) {
                    self.routes.remove(dst);
                }
            }
        }
        Ok(())
    }

    /// A device that something can be led out of.
    fn usable(&self, dev: &IfName) -> Result<(), i32> {
        match self.links.get(dev) {
            None => Err(libc::ENODEV),
            Some(link) if !link.up => Err(libc::ENETDOWN),
            Some(_) => Ok(()),
        }
    }

    fn present(&self, dev: &IfName) -> Result<(), i32> {
        self.links.contains_key(dev).then_some(()).ok_or(libc::ENODEV)
    }

    fn check_route(&self, dst: Subnet, via: &Via) -> Result<(), i32> {
        match via {
            Via::Nexthop(id) => self.nexthops.contains_key(id).then_some(()).ok_or(libc::EINVAL),
            Via::Gateway(to) => self.usable(&to.dev),
            Via::Direct(to) => {
                self.usable(&to.dev)?;
                let on_link =
                    |(dev, _, prefix): &(IfName, IpAddr, Subnet)| *dev == to.dev && prefix.contains(to.gateway);
                let unreachable = if dst.family() == Family::V4 { libc::ENETUNREACH } else { libc::EHOSTUNREACH };
                self.addresses.iter().any(on_link).then_some(()).ok_or(unreachable)
            }
            Via::Other(_) => Err(libc::EINVAL),
        }
    }
}
