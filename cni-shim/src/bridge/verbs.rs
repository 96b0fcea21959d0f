//! ADD, DEL, CHECK, GC and STATUS of `fabric-bridge` (CNI spec section 2).

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use fabric_core::model::{IfName, MacAddr};
use fabric_netlink::EventSocket;
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;
use serde_json::{Value, json};

use super::conf::{BridgeConf, Route};
use super::errors::{Failure, refused, ungiven};
use super::netns::{inside, namespace, sysctl};
use super::wiring::{self, Link, Veth};
use super::{in_the_way, make, open_netlink, port_name, random_mac};
use crate::conf::Conf;
use crate::error::{CniError, Code};
use crate::host_local::{AllocateError, IpamState};
use crate::netlink::{self, Netlink, Refused};
use crate::request::{Action, Attachment, Call};
use crate::spec::AttachmentId;
use crate::version::{SpecVersion, convert};

/// How long the bridge may take to forward what comes from a new port. It takes it half a millisecond.
const PORT_PATIENCE: Duration = Duration::from_secs(5);

/// `RTNLGRP_LINK` of linux/rtnetlink.h.
const LINK_GROUP: u32 = 1;

/// An address for a pod, as the ipam gives it.
#[derive(Clone, Copy, Debug)]
struct PodAddress {
    address: IpNetwork,
    gateway: IpAddr,
}

impl Call<BridgeConf> {
    /// Does what is asked, and returns what to print, if anything.
    ///
    /// # Errors
    /// What the runtime is to be told.
    pub fn answer(&self) -> Result<Option<Value>, CniError> {
        match &self.action {
            Action::Add(pod) => self.add(pod).map(Some),
            Action::Del(pod) => self.del(pod).map(|()| None),
            Action::Check(pod, prev_result) => self.check(pod, prev_result).map(|()| None),
            Action::Gc(valid) => self.gc(valid).map(|()| None),
            Action::Status => self.status().map(|()| None),
        }
    }

    fn add(&self, pod: &Attachment) -> Result<Value, CniError> {
        let path = pod.netns.as_deref().unwrap_or(Path::new(""));
        let netns = File::open(path).map_err(|e| {
            CniError::new(
                Code::InvalidEnvironment,
                format!("cannot open the network namespace {}: {e}", path.display()),
            )
        })?;
        let veth = Veth {
            port: port_name(&self.conf.name, &pod.id),
            port_mac: random_mac(),
            ifname: pod.id.ifname,
            mac: self.conf.requested_mac(&self.args)?.unwrap_or_else(random_mac),
            mtu: self.conf.mtu,
        };
        let given = self.reserve(&pod.id)?;
        let mut host = open_netlink()?;
        let wired = self.wire(&mut host, &veth, &netns, &given);
        let bridge = wired.map_err(|failure| match self.unwire(&mut host, &veth, &pod.id, &failure) {
            Ok(()) => failure.told,
            Err(e) => failure.told.with_details(format!("cleaning up failed as well, DEL has to finish it: {e}")),
        })?;
        self.result(&bridge, &veth, path, &given)
    }

    /// An address of each set of ranges.
    fn reserve(&self, id: &AttachmentId) -> Result<Vec<PodAddress>, CniError> {
        let requested = self.conf.requested_ips(&self.args)?;
        let ipam = self.ipam()?;
        if let Some(ip) = ipam.held_by(id).map_err(|e| self.unreadable(&e))?.first() {
            return Err(ungiven(&AllocateError::Duplicate(*ip, id.clone())));
        }
        let sets = self.conf.ipam.ranges.iter().enumerate();
        let given: Result<Vec<_>, _> = sets
            .map(|(set, ranges)| ipam.reserve(id, set, ranges, &requested))
            .map(|given| given.map(|(address, gateway)| PodAddress { address, gateway }))
            .collect();
        let given = given.and_then(|given| {
            let unmet = requested.iter().find(|ip| !given.iter().any(|given| given.address.ip() == **ip));
            unmet.map_or(Ok(given.clone()), |ip| Err(AllocateError::Taken(*ip, "of this network".into())))
        });
        given.map_err(|e| {
            // What an earlier set has given.
            let freed = ipam.release(id);
            freed.map_or_else(|failed| ungiven(&e).with_details(self.unreadable(&failed)), |_| ungiven(&e))
        })
    }

    fn wire(&self, host: &mut Netlink, veth: &Veth, netns: &File, given: &[PodAddress]) -> Result<Link, Failure> {
        let conf = &self.conf;
        let bridge = self.bridge(host)?;
        if conf.is_gateway() {
            self.address_bridge(host, &bridge, given)?;
        }
        let mut plug = vec![veth.add(&bridge, netns)];
        plug.extend(conf.hairpin_mode.then(|| veth.hairpin()));
        host.write(&plug).map_err(|e| Failure { unmade: e.position == 0, ..refused(&e).into() })?;

        let ifname = &veth.ifname;
        let switches = || {
            // A kernel without IPv6 has no use for most of these; one that has gets an address in the next step.
            let v6 = given.iter().any(|given| given.address.is_ipv6());
            for (name, value) in [("disable_ipv6", "0"), ("accept_dad", "0"), ("ndisc_notify", "1")] {
                let set = sysctl(&format!("ipv6/conf/{ifname}/{name}"), value);
                if v6 { set? } else { drop(set) }
            }
            sysctl(&format!("ipv4/conf/{ifname}/arp_notify"), "1")?;
            Netlink::open()
        };
        let mut inside = inside(netns, switches).map_err(|e| {
            CniError::new(Code::Kernel, format!("cannot prepare {ifname} in the pod's network namespace: {e}"))
        })?;
        let index = wiring::link(&mut inside, ifname).map_err(|e| refused(&e))?.map(|link| link.index);
        let index = index.ok_or_else(|| CniError::new(Code::Kernel, format!("{ifname} was taken out of the pod")))?;
        let name = ifname.as_str();
        let mut dress = vec![wiring::raise(index, ifname, false)];
        dress.extend(given.iter().map(|given| wiring::add_address(index, name, given.address)));
        inside.write(&dress).map_err(|e| refused(&e))?;
        let mut routes = Vec::new();
        for route in self.routes(given) {
            let gateway = route.gw.or_else(|| gateway_for(given, route.dst));
            // The kernel has made the way to the pod's own subnet by itself.
            let connected = given.iter().any(|given| network_of(given.address) == route.dst);
            routes.extend(gateway.filter(|_| !connected).map(|gw| wiring::add_route(index, name, route.dst, gw)));
        }
        add_routes(&mut inside, &routes)?;
        await_forwarding(host, &veth.port)?;
        inside.write(&[veth.announce(index)]).map_err(|e| refused(&e))?;
        Ok(bridge)
    }

    /// Undoes what a failed ADD has done.
    fn unwire(&self, host: &mut Netlink, veth: &Veth, id: &AttachmentId, failure: &Failure) -> Result<(), CniError> {
        if !failure.unmade {
            remove_link(host, &veth.port)?;
        }
        self.release(id)
    }

    /// The bridge, made if it isn't there.
    fn bridge(&self, host: &mut Netlink) -> Result<Link, CniError> {
        let name = &self.conf.bridge;
        let show = |host: &mut Netlink| wiring::link(host, name).map_err(|e| refused(&e));
        let mut shown = show(host)?;
        if shown.is_none() {
            make(host, name, self.conf.mtu)?;
            shown = show(host)?;
        }
        let bridge =
            shown.ok_or_else(|| CniError::new(Code::Kernel, format!("{name} vanished as soon as it was made")))?;
        if !bridge.is_bridge {
            let msg = format!("{name} exists but is not a bridge; say another \"bridge\" in the network configuration");
            return Err(CniError::new(Code::InvalidConfig, msg));
        }
        let promiscuous = self.conf.promiscuous() && !bridge.promiscuous;
        if !bridge.up || promiscuous {
            host.write(&[wiring::raise(bridge.index, name, promiscuous)]).map_err(|e| refused(&e))?;
        }
        Ok(bridge)
    }

    /// Gives the bridge the gateways' addresses, and lets the host forward.
    fn address_bridge(&self, host: &mut Netlink, bridge: &Link, given: &[PodAddress]) -> Result<(), CniError> {
        let has = wiring::addresses(host, bridge.index, &bridge.name).map_err(|e| refused(&e))?;
        let mut changes = Vec::new();
        for given in given {
            let wanted = IpNetwork::new(given.gateway, given.address.prefix()).expect("the subnet's own length");
            if has.contains(&wanted) {
                continue;
            }
            for other in has.iter().filter(|other| in_the_way(**other, wanted)) {
                if !self.conf.force_address {
                    let msg = format!(
                        "{} already has an IP address different from {wanted}: {other}; remove it when no pod uses it, \
                         or say \"forceAddress\": true",
                        bridge.name
                    );
                    return Err(CniError::new(Code::Kernel, msg));
                }
                changes.push(wiring::delete_address(bridge.index, &bridge.name, *other));
            }
            changes.push(wiring::add_address(bridge.index, &bridge.name, wanted));
        }
        match host.write(&changes) {
            // Another ADD was faster.
            Err(e) if e.errno() != Some(Errno::EXIST) => return Err(refused(&e)),
            _ => {}
        }
        for given in given {
            let switch = if given.address.is_ipv4() { "ipv4/ip_forward" } else { "ipv6/conf/all/forwarding" };
            sysctl(switch, "1").map_err(|e| {
                CniError::new(Code::Kernel, format!("cannot set net/{switch}, without which pods reach nobody: {e}"))
            })?;
        }
        Ok(())
    }

    /// The routes of the configuration, and the default route if it is asked for.
    fn routes(&self, given: &[PodAddress]) -> Vec<Route> {
        let mut routes = self.conf.ipam.routes.clone();
        for given in given.iter().filter(|_| self.conf.is_default_gateway) {
            let dst = default_of(given.address);
            if !routes.iter().any(|route| route.dst == dst) {
                routes.push(Route { dst, gw: Some(given.gateway) });
            }
        }
        let mut seen = BTreeSet::new();
        routes.retain(|route| seen.insert(route.dst));
        routes
    }

    fn result(&self, bridge: &Link, veth: &Veth, netns: &Path, given: &[PodAddress]) -> Result<Value, CniError> {
        let ip = |given: &PodAddress| json!({ "interface": 2, "address": given.address, "gateway": given.gateway });
        let mut result = json!({
            "cniVersion": SpecVersion::NEWEST.as_str(),
            "interfaces": [
                { "name": bridge.name, "mac": bridge.mac },
                { "name": veth.port, "mac": veth.port_mac },
                { "name": veth.ifname, "mac": veth.mac, "sandbox": netns },
            ],
            "ips": given.iter().map(ip).collect::<Vec<_>>(),
            "routes": self.routes(given),
            "dns": self.conf.dns.clone().unwrap_or_else(|| json!({})),
        });
        if veth.mtu > 0 {
            for end in [1, 2] {
                result["interfaces"][end]["mtu"] = veth.mtu.into();
            }
        }
        convert(result, self.conf.version()).map_err(|e| CniError::new(Code::Decode, e.to_string()))
    }

    /// The veth first, so that nobody is given an address that is still in use; but the address is freed even if the
    /// veth can't be.
    fn del(&self, pod: &Attachment) -> Result<(), CniError> {
        let removed = self.remove_veth_of(pod);
        self.release(&pod.id)?;
        removed
    }

    fn remove_veth_of(&self, pod: &Attachment) -> Result<(), CniError> {
        if remove_link(&mut open_netlink()?, &port_name(&self.conf.name, &pod.id))? {
            return Ok(());
        }
        // It may be a veth of the plugin bridge, whose end in the host has a random name.
        let Some(netns) = pod.netns.as_deref().and_then(namespace) else { return Ok(()) };
        let mut inside = inside(&netns, Netlink::open)
            .map_err(|e| CniError::new(Code::Kernel, format!("cannot enter the pod's network namespace: {e}")))?;
        remove_link(&mut inside, &pod.id.ifname).map(drop)
    }

    fn check(&self, pod: &Attachment, prev_result: &Value) -> Result<(), CniError> {
        let missing = |what: String| CniError::new(Code::NotAttached, format!("{what}; DEL and ADD {} again", pod.id));
        let held = self.ipam()?.held_by(&pod.id).map_err(|e| self.unreadable(&e))?;
        let result = convert(prev_result.clone(), SpecVersion::NEWEST)
            .map_err(|e| CniError::new(Code::InvalidConfig, format!("prevResult can't be used: {e}")))?;
        let of = |list: &str| result[list].as_array().cloned().unwrap_or_default();
        let interfaces = of("interfaces");
        let ours = interfaces.iter().position(|i| i["name"] == pod.id.ifname.as_str() && i.get("sandbox").is_some());
        let ours = ours.ok_or_else(|| missing(format!("prevResult has no interface {}", pod.id.ifname)))?;

        let mut host = open_netlink()?;
        let find = |netlink: &mut Netlink, name: &IfName| wiring::link(netlink, name).map_err(|e| refused(&e));
        let bridge = find(&mut host, &self.conf.bridge)?;
        let bridge = bridge.ok_or_else(|| missing(format!("the bridge {} is gone", self.conf.bridge)))?;
        // Plugins that ran after us may have added devices of theirs, as bandwidth does.
        let outside = interfaces.iter().filter(|i| i["sandbox"].as_str().unwrap_or_default().is_empty());
        let mut attached = false;
        for name in outside.filter_map(|i| i["name"].as_str()?.parse().ok()) {
            let link = find(&mut host, &name)?;
            attached |= link.is_some_and(|link| link.is_veth && link.controller == Some(bridge.index));
        }
        if !attached {
            return Err(missing(format!("no veth of prevResult is attached to {}", bridge.name)));
        }

        let path = pod.netns.as_deref().unwrap_or(Path::new(""));
        let mut inside = File::open(path)
            .and_then(|netns| inside(&netns, Netlink::open))
            .map_err(|e| missing(format!("cannot enter the network namespace {}: {e}", path.display())))?;
        let link = find(&mut inside, &pod.id.ifname)?.ok_or_else(|| missing(format!("{} is gone", pod.id.ifname)))?;
        let told_mac = interfaces[ours]["mac"].as_str().and_then(|mac| mac.parse::<MacAddr>().ok());
        if told_mac.is_some() && link.mac != told_mac {
            return Err(missing(format!("{} has another MAC address than ADD gave it", link.name)));
        }
        let has = wiring::addresses(&mut inside, link.index, &link.name).map_err(|e| refused(&e))?;
        for ip in of("ips").iter().filter(|ip| ip["interface"] == ours) {
            let address: Option<IpNetwork> = ip["address"].as_str().and_then(|text| text.parse().ok());
            if address.is_none_or(|address| !has.contains(&address)) {
                return Err(missing(format!("{} does not have the address {}", link.name, ip["address"])));
            }
            if address.is_some_and(|address| !held.contains(&address.ip())) {
                return Err(missing(format!("the address {} is not this pod's by the IPAM state", ip["address"])));
            }
        }
        let has = wiring::routes(&mut inside, link.index).map_err(|e| refused(&e))?;
        for route in of("routes") {
            let wanted: Option<Route> = serde_json::from_value(route.clone()).ok();
            let there =
                |wanted: Route| has.iter().any(|r| r.dst == wanted.dst && (wanted.gw.is_none() || r.gw == wanted.gw));
            if !wanted.is_some_and(there) {
                return Err(missing(format!("the route {route} is gone")));
            }
        }
        Ok(())
    }

    /// Frees what belongs to no valid attachment of this network, veths included.
    fn gc(&self, valid: &BTreeSet<AttachmentId>) -> Result<(), CniError> {
        let Some(ipam) =
            IpamState::existing(&self.conf.ipam.data_dir, &self.conf.name).map_err(|e| self.unreadable(&e))?
        else {
            return Ok(());
        };
        let doomed = |_, holder: Option<&AttachmentId>| holder.is_none_or(|id| !valid.contains(id));
        let freed = ipam.release_where(doomed).map_err(|e| self.unreadable(&e))?;
        let mut host = open_netlink()?;
        let owners: BTreeSet<_> = freed.into_iter().filter_map(|(_, holder)| holder).collect();
        owners.iter().try_for_each(|id| remove_link(&mut host, &port_name(&self.conf.name, id)).map(drop))
    }

    fn status(&self) -> Result<(), CniError> {
        let unavailable = |reason: String| CniError::new(Code::NotAvailable, reason);
        self.ipam().map_err(|e| unavailable(e.to_string()))?;
        open_netlink().map(drop).map_err(|e| unavailable(e.to_string()))
    }

    fn ipam(&self) -> Result<IpamState, CniError> {
        IpamState::open(&self.conf.ipam.data_dir, &self.conf.name).map_err(|e| self.unreadable(&e))
    }

    fn release(&self, id: &AttachmentId) -> Result<(), CniError> {
        let ipam = IpamState::existing(&self.conf.ipam.data_dir, &self.conf.name).map_err(|e| self.unreadable(&e))?;
        ipam.map_or(Ok(()), |ipam| ipam.release(id).map(drop).map_err(|e| self.unreadable(&e)))
    }

    fn unreadable(&self, e: &io::Error) -> CniError {
        let ipam = self.conf.ipam.data_dir.join(self.conf.name.as_str());
        CniError::new(Code::Io, format!("cannot use the IPAM state {}: {e}", ipam.display()))
    }
}

/// Waits until the bridge forwards what comes from `port`: the kernel tells the bridge of a veth that has been attached
/// in by a work queue, and what the pod sent before would be lost.
fn await_forwarding(host: &mut Netlink, port: &IfName) -> Result<(), CniError> {
    let mut forwards = || Ok(wiring::link(host, port).map_err(|e| refused(&e))?.is_some_and(|link| link.operational));
    if forwards()? {
        return Ok(());
    }
    let deadline = Instant::now() + PORT_PATIENCE;
    let lost = |e: io::Error| CniError::new(Code::Kernel, format!("cannot hear of changes of {port}: {e}"));
    let mut events = EventSocket::open(NETLINK_ROUTE, &[LINK_GROUP]).map_err(lost)?;
    loop {
        if forwards()? {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || !events.wait(left).map_err(lost)? {
            let msg = format!("{port} carries nothing {PORT_PATIENCE:?} after the pod was attached; is the bridge up?");
            return Err(CniError::new(Code::Kernel, msg));
        }
    }
}

/// Adds the routes of a pod's interface. One that another interface of the pod has already stays, as in the reference.
fn add_routes(inside: &mut Netlink, routes: &[netlink::Request]) -> Result<(), CniError> {
    let is_there = |e: &Refused| e.errno() == Some(Errno::EXIST);
    match inside.write(routes) {
        Err(e) if is_there(&e) => {
            let one_by_one = routes.iter().map(|route| inside.write(std::slice::from_ref(route)));
            one_by_one.filter(|written| !written.as_ref().is_err_and(is_there)).collect::<Result<(), _>>()
        }
        written => written,
    }
    .map_err(|e| refused(&e))
}

/// Deletes a link. False when there is none.
fn remove_link(netlink: &mut Netlink, name: &IfName) -> Result<bool, CniError> {
    match netlink.write(&[wiring::delete(name)]) {
        Ok(()) => Ok(true),
        Err(e) if e.errno() == Some(Errno::NODEV) => Ok(false),
        Err(e) => Err(refused(&e)),
    }
}

fn network_of(address: IpNetwork) -> IpNetwork {
    IpNetwork::new(address.network(), address.prefix()).expect("the address's own length")
}

fn default_of(address: IpNetwork) -> IpNetwork {
    const ANY: &str = "no bits are always a prefix";
    match address {
        IpNetwork::V4(_) => IpNetwork::V4(Ipv4Network::new([0; 4].into(), 0).expect(ANY)),
        IpNetwork::V6(_) => IpNetwork::V6(Ipv6Network::new([0; 16].into(), 0).expect(ANY)),
    }
}

fn gateway_for(given: &[PodAddress], dst: IpNetwork) -> Option<IpAddr> {
    given.iter().find(|given| given.address.is_ipv4() == dst.is_ipv4()).map(|given| given.gateway)
}
