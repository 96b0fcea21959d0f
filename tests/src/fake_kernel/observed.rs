//! What an observer sees: ours apart from what is foreign.

use std::collections::BTreeMap;
use std::sync::Arc;

use fabric_core::model::{Family, IfName};
use fabric_core::state::{Foreign, ForeignLink, ROUTE_PROTOCOL, Routing, Via};
use fabricd::host::underlay::{Host, HostLink};
use fabricd::kernel::{FastPathFound, Observed};

use super::{BOOT, Tables};

impl Tables {
    /// What an observer sees of it.
    #[must_use]
    pub fn observed(&self) -> Observed {
        let ours = |dev: &IfName| self.our_link(dev).is_some();
        let others = || self.links.iter().filter(|(name, _)| !ours(name));
        Observed {
            ours: Routing {
                links: self.links.keys().filter_map(|dev| Some((*dev, *self.our_link(dev)?))).collect(),
                addresses: self
                    .addresses
                    .iter()
                    .filter(|(dev, ip, prefix)| ours(dev) && *ip == prefix.base())
                    .map(|(dev, _, prefix)| (*dev, *prefix))
                    .collect(),
                fdb: self.fdb.iter().filter(|((dev, _), _)| ours(dev)).map(|(k, v)| (*k, *v)).collect(),
                neighbours: self.neighbours.iter().filter(|((dev, _), _)| ours(dev)).map(|(k, v)| (*k, *v)).collect(),
                nexthops: self
                    .nexthops
                    .iter()
                    .filter(|(id, (protocol, nexthop))| self.is_our_nexthop(**id, *protocol, nexthop))
                    .map(|(id, (_, nexthop))| (*id, *nexthop))
                    .collect(),
                routes: self
                    .routes
                    .iter()
                    .filter(|(_, (protocol, _))| *protocol == ROUTE_PROTOCOL)
                    .map(|(dst, (_, via))| (*dst, via.clone()))
                    .collect(),
                sysctls: self
                    .sysctls
                    .iter()
                    .filter(|(setting, _)| setting.device().is_none_or(|dev| ours(&dev)))
                    .map(|(setting, value)| (*setting, *value))
                    .collect(),
            },
            foreign: Foreign {
                nexthop_ids: self
                    .nexthops
                    .iter()
                    .filter(|(id, (protocol, nexthop))| !self.is_our_nexthop(**id, *protocol, nexthop))
                    .map(|(id, _)| *id)
                    .collect(),
                routes: self.routes_of_others(|dst, via| !self.is_plain(dst, via)),
                plain: self.routes_of_others(|dst, via| self.is_plain(dst, via)),
                direct: self
                    .routes
                    .iter()
                    .filter(|(dst, (protocol, via))| *protocol == BOOT && !self.is_plain(dst, via))
                    .filter_map(|(dst, (_, via))| match via {
                        Via::Direct(to) if self.our_link(&to.dev).is_none() => Some((*dst, to.gateway)),
                        _ => None,
                    })
                    .collect(),
                links: others()
                    .map(|(name, link)| {
                        let vxlan = link.vxlan.as_ref().map(|v| (v.vni.get(), v.port, Family::of(v.local)));
                        (*name, ForeignLink { kind: link.kind.clone(), vxlan })
                    })
                    .collect(),
            },
            host: Host {
                links: others()
                    .map(|(name, link)| HostLink {
                        index: link.index,
                        name: *name,
                        mtu: link.mtu,
                        up: link.up,
                        loopback: name.as_str() == "lo",
                        addresses: self
                            .addresses
                            .iter()
                            .filter(|(dev, _, _)| dev == name)
                            .map(|(_, ip, prefix)| (*ip, *prefix))
                            .collect(),
                        passing: vec![],
                    })
                    .collect(),
                default_routes: self.default_routes.clone(),
                reaches: self.reaches.clone(),
            },
            nexthop_objects: !self.without_nexthop_objects,
            firewall: Arc::clone(&self.firewall),
            filter: self.filter.clone(),
            dropped: BTreeMap::new(),
            docker_user: vec![],
            hazards: vec![],
            bridges: BTreeMap::new(),
            tracked: false,
            fast_path: FastPathFound {
                state: Arc::new(self.fast_path.clone()),
                trouble: self.fast_path_trouble.clone(),
                by_filters: self.without_tcx,
                paths: self.paths(),
                ports: self.ports.clone(),
                devices: self.links.iter().map(|(name, link)| (*name, link.index)).collect(),
                shaping: self.shaping.clone(),
                counts: BTreeMap::new(),
                traffic: Arc::default(),
            },
        }
    }
}
