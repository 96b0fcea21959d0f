//! Values of [`fabric_core::state::fast_path`] as the maps have them, and back.

use std::net::{IpAddr, Ipv4Addr};

use fabric_bpf::abi;
use fabric_core::model::{MacAddr, Subnet};
use fabric_core::state::fast_path::{OwnEnd, Peer, Pod, UnderlayPath};

/// The IPv4 address, as the programs calculate with it. Nothing else is planned.
fn v4(ip: IpAddr) -> Ipv4Addr {
    match ip {
        IpAddr::V4(ip) => ip,
        IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
    }
}

fn mask(prefix_len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix_len.min(32))).unwrap_or(0)
}

pub(super) fn config(node: &OwnEnd) -> abi::Config {
    abi::Config {
        flags: abi::CONFIG_IPV4 | if node.guard { abi::CONFIG_GUARD } else { 0 },
        vni: abi::vxlan_vni(node.vni.get()),
        network4: v4(node.network.base()).to_bits(),
        network4_mask: mask(node.network.prefix_len()),
        own4: v4(node.subnet.base()).to_bits(),
        own4_mask: mask(node.subnet.prefix_len()),
        subnet4_shift: 32 - u32::from(node.subnet.prefix_len()),
        local4: v4(node.local).octets(),
        port: node.port.to_be_bytes(),
        vtep4: node.vtep_mac.octets(),
        ..abi::Config::default()
    }
}

/// `None` for what was never written, or not by us.
pub(super) fn own_end(config: &abi::Config) -> Option<OwnEnd> {
    if config.flags & abi::CONFIG_IPV4 == 0 {
        return None;
    }
    let subnet = |base: u32, mask: u32| {
        let prefix_len = u8::try_from(mask.leading_ones()).ok()?;
        Subnet::holding(Ipv4Addr::from_bits(base).into(), prefix_len).ok()
    };
    let node = OwnEnd {
        vni: (u32::from_be_bytes(config.vni) >> 8).try_into().ok()?,
        port: u16::from_be_bytes(config.port),
        vtep_mac: MacAddr::try_from(config.vtep4).ok()?,
        local: Ipv4Addr::from(config.local4).into(),
        network: subnet(config.network4, config.network4_mask)?,
        subnet: subnet(config.own4, config.own4_mask)?,
        guard: config.flags & abi::CONFIG_GUARD != 0,
    };
    Some(node)
}

pub(super) fn peer(peer: &Peer, node: &OwnEnd) -> abi::Peer {
    let vteps = [node.vtep_mac.octets(), peer.vtep_mac.octets()];
    let template = abi::template4(v4(node.local), v4(peer.underlay), node.port, node.vni.get(), vteps);
    abi::Peer {
        flags: if peer.direct { abi::PEER_DIRECT } else { 0 },
        ifindex: peer.path.ifindex,
        mtu: peer.mtu,
        template_sum: abi::template_sum(&template),
        underlay: abi::padded(v4(peer.underlay)),
        former: [0; 16],
        nexthop: abi::padded(v4(peer.path.gateway)),
        template,
    }
}

/// A peer that was found. One that says anything else than what we would write has the MTU 0, which nobody wants.
pub(super) fn found_peer(found: &abi::Peer, node: &OwnEnd) -> Option<Peer> {
    if *found == abi::Peer::default() {
        return None;
    }
    let v4 = |bytes: [u8; 16]| IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let mut vtep_mac = [0; 6];
    vtep_mac.copy_from_slice(&found.template[abi::TEMPLATE_INNER..abi::TEMPLATE_INNER + 6]);
    let read = Peer {
        underlay: v4(found.underlay),
        vtep_mac: MacAddr::try_from(vtep_mac).unwrap_or(node.vtep_mac),
        path: UnderlayPath { ifindex: found.ifindex, gateway: v4(found.nexthop) },
        direct: found.flags & abi::PEER_DIRECT != 0,
        mtu: found.mtu,
    };
    let same = peer(&read, node) == *found;
    Some(Peer { mtu: if same { read.mtu } else { 0 }, ..read })
}

pub(super) fn pod(pod: &Pod) -> abi::Pod {
    abi::Pod {
        ifindex: pod.ifindex,
        flags: if pod.fast { abi::POD_FAST } else { 0 },
        mtu: pod.mtu,
        mac: pod.mac.octets(),
        gateway: pod.gateway_mac.octets(),
        ..abi::Pod::default()
    }
}

/// A pod that was found. One with something else than a pod's addresses has the MTU 0, which nobody wants.
pub(super) fn found_pod(found: &abi::Pod) -> Option<Pod> {
    if *found == abi::Pod::default() {
        return None;
    }
    let mac = MacAddr::try_from(found.mac).ok().zip(MacAddr::try_from(found.gateway).ok());
    let nobody = MacAddr::try_from([2, 0, 0, 0, 0, 0]).expect("a unicast address");
    let (mac, gateway_mac, mtu) = mac.map_or((nobody, nobody, 0), |(mac, gateway)| (mac, gateway, found.mtu));
    Some(Pod { ifindex: found.ifindex, mac, gateway_mac, mtu, fast: found.flags & abi::POD_FAST != 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v<T: std::str::FromStr>(text: &str) -> T {
        text.parse().unwrap_or_else(|_| panic!("{text} in a test is wrong"))
    }

    fn node() -> OwnEnd {
        OwnEnd {
            vni: 0x01_0203_u32.try_into().expect("a VNI"),
            port: 8472,
            vtep_mac: v("02:42:c0:00:02:01"),
            local: v("192.0.2.1"),
            network: v("10.64.0.0/12"),
            subnet: v("10.64.1.0/24"),
            guard: true,
        }
    }

    fn a_peer() -> Peer {
        Peer {
            underlay: v("192.0.2.2"),
            vtep_mac: v("02:42:c0:00:02:02"),
            path: UnderlayPath { ifindex: 3, gateway: v("192.0.2.254") },
            direct: false,
            mtu: 1450,
        }
    }

    #[test]
    fn what_is_written_is_what_is_read_back() {
        for guard in [false, true] {
            let node = OwnEnd { guard, ..node() };
            assert_eq!(own_end(&config(&node)), Some(node));
        }
        for direct in [false, true] {
            let wanted = Peer { direct, ..a_peer() };
            assert_eq!(found_peer(&peer(&wanted, &node()), &node()), Some(wanted));
        }
        for fast in [false, true] {
            let wanted =
                Pod { ifindex: 7, mac: v("02:42:0a:40:01:05"), gateway_mac: v("02:42:0a:40:01:01"), mtu: 1450, fast };
            assert_eq!(found_pod(&pod(&wanted)), Some(wanted));
        }
        assert_eq!(own_end(&abi::Config::default()), None);
        assert_eq!(found_peer(&abi::Peer::default(), &node()), None);
        assert_eq!(found_pod(&abi::Pod::default()), None);
    }

    #[test]
    fn what_somebody_bent_is_nothing_that_anybody_wants() {
        let mut bent = peer(&a_peer(), &node());
        bent.template[abi::TEMPLATE_UDP + 2] ^= 1;
        assert_eq!(found_peer(&bent, &node()).map(|peer| peer.mtu), Some(0));
        let bent = abi::Pod { ifindex: 7, mtu: 1450, ..abi::Pod::default() };
        assert_eq!(found_pod(&bent).map(|pod| pod.mtu), Some(0), "it has no MAC address");
        let bent = abi::Config { network4_mask: 0, own4_mask: 0, ..config(&node()) };
        assert_ne!(own_end(&bent), Some(node()));
    }
}
