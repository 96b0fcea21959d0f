//! Values of [`fabric_core::state::fast_path`] as the maps have them, and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fabric_bpf::abi;
use fabric_core::model::{Family, MacAddr, PerFamily, Subnet, from_bits, to_bits};
use fabric_core::state::fast_path::{End, LocalVtep, Peer, Pod, UnderlayPath};

/// An address of IPv4, as the programs calculate with it.
fn v4(ip: IpAddr) -> Ipv4Addr {
    match ip {
        IpAddr::V4(ip) => ip,
        IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
    }
}

fn mask4(prefix_len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix_len.min(32))).unwrap_or(0)
}

fn mask6(prefix_len: u8) -> [u64; 2] {
    halves(u128::MAX.checked_shl(128 - u32::from(prefix_len.min(128))).unwrap_or(0))
}

fn halves(bits: u128) -> [u64; 2] {
    abi::halves(Ipv6Addr::from_bits(bits))
}

fn whole([upper, lower]: [u64; 2]) -> u128 {
    u128::from(upper) << 64 | u128::from(lower)
}

/// An address in a field for either family.
fn either(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => abi::padded(ip),
        IpAddr::V6(ip) => ip.octets(),
    }
}

pub(super) fn config(node: &LocalVtep) -> abi::Config {
    let mut config = abi::Config {
        flags: if node.guard { abi::CONFIG_GUARD } else { 0 },
        vni: abi::vxlan_vni(node.vni.get()),
        port: node.port.to_be_bytes(),
        ..abi::Config::default()
    };
    if let Some(End { vtep_mac, local, network, subnet }) = node.ends.v4 {
        config.flags |= abi::CONFIG_IPV4;
        (config.network4, config.network4_mask) = (v4(network.base()).to_bits(), mask4(network.prefix_len()));
        (config.own4, config.own4_mask) = (v4(subnet.base()).to_bits(), mask4(subnet.prefix_len()));
        config.subnet4_shift = 32 - u32::from(subnet.prefix_len());
        (config.local4, config.vtep4) = (v4(local).octets(), vtep_mac.octets());
    }
    if let Some(End { vtep_mac, local, network, subnet }) = node.ends.v6 {
        config.flags |= abi::CONFIG_IPV6;
        (config.network6, config.network6_mask) = (halves(to_bits(network.base())), mask6(network.prefix_len()));
        (config.own6, config.own6_mask) = (halves(to_bits(subnet.base())), mask6(subnet.prefix_len()));
        config.subnet6_shift = 128 - u32::from(subnet.prefix_len());
        (config.local6, config.vtep6) = (either(local), vtep_mac.octets());
    }
    config
}

/// `None` for what was never written, or not by us.
pub(super) fn local_vtep(config: &abi::Config) -> Option<LocalVtep> {
    let subnet =
        |family, base: u128, ones: u32| Subnet::holding(from_bits(family, base), u8::try_from(ones).ok()?).ok();
    let has = |flag| config.flags & flag != 0;
    let end4 = || {
        let subnet = |base: u32, mask: u32| subnet(Family::V4, base.into(), mask.leading_ones());
        Some(End {
            vtep_mac: MacAddr::try_from(config.vtep4).ok()?,
            local: Ipv4Addr::from(config.local4).into(),
            network: subnet(config.network4, config.network4_mask)?,
            subnet: subnet(config.own4, config.own4_mask)?,
        })
    };
    let end6 = || {
        let subnet = |base, mask| subnet(Family::V6, whole(base), whole(mask).leading_ones());
        Some(End {
            vtep_mac: MacAddr::try_from(config.vtep6).ok()?,
            local: Ipv6Addr::from(config.local6).into(),
            network: subnet(config.network6, config.network6_mask)?,
            subnet: subnet(config.own6, config.own6_mask)?,
        })
    };
    let ends =
        PerFamily { v4: has(abi::CONFIG_IPV4).then(end4).flatten(), v6: has(abi::CONFIG_IPV6).then(end6).flatten() };
    let node = LocalVtep {
        vni: (u32::from_be_bytes(config.vni) >> 8).try_into().ok()?,
        port: u16::from_be_bytes(config.port),
        guard: has(abi::CONFIG_GUARD),
        ends,
    };
    (!ends.is_empty()).then_some(node)
}

/// `None` where this node has no end of the peer's family.
pub(super) fn peer(peer: &Peer, node: &LocalVtep) -> Option<abi::Peer> {
    let end = node.ends.get(peer.family())?;
    let vteps = [end.vtep_mac.octets(), peer.vtep_mac.octets()];
    let template = match peer.family() {
        Family::V4 => abi::template4(v4(end.local), v4(peer.underlay), node.port, node.vni.get(), vteps),
        Family::V6 => abi::template6(vteps),
    };
    let direct = if peer.direct { abi::PEER_DIRECT } else { 0 };
    let nexthop = if peer.path.gateway.is_ipv6() { abi::PEER_NEXTHOP_IPV6 } else { 0 };
    Some(abi::Peer {
        flags: direct | nexthop,
        ifindex: peer.path.ifindex,
        mtu: peer.mtu,
        // Of IPv6 our device makes the outer header.
        template_sum: if peer.family() == Family::V4 { abi::template_sum(&template) } else { 0 },
        underlay: either(peer.underlay),
        former: [0; 16],
        nexthop: either(peer.path.gateway),
        template,
    })
}

/// A peer that was found. One that says anything else than what we would write has the MTU 0, which nobody wants.
pub(super) fn found_peer(found: &abi::Peer, node: &LocalVtep) -> Option<Peer> {
    if *found == abi::Peer::default() {
        return None;
    }
    let inner = &found.template[abi::TEMPLATE_INNER..];
    // The type of the Ethernet header inside is IPv6's.
    let is_v6 = inner[12..14] == [0x86, 0xdd];
    let ip = |bytes: [u8; 16], is_v6| match is_v6 {
        false => IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]),
        true => IpAddr::from(bytes),
    };
    let mut vtep_mac = [0; 6];
    vtep_mac.copy_from_slice(&inner[..6]);
    let gateway = ip(found.nexthop, found.flags & abi::PEER_NEXTHOP_IPV6 != 0);
    let nobody = MacAddr::try_from([2, 0, 0, 0, 0, 0]).expect("a unicast address");
    let read = Peer {
        underlay: ip(found.underlay, is_v6),
        vtep_mac: MacAddr::try_from(vtep_mac).unwrap_or(nobody),
        path: UnderlayPath { ifindex: found.ifindex, gateway },
        direct: found.flags & abi::PEER_DIRECT != 0,
        mtu: found.mtu,
    };
    let same = peer(&read, node) == Some(*found);
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

    fn node() -> LocalVtep {
        let end = |network, subnet, local| End {
            vtep_mac: v("02:42:c0:00:02:01"),
            local: v(local),
            network: v(network),
            subnet: v(subnet),
        };
        let ends = PerFamily {
            v4: Some(end("10.64.0.0/12", "10.64.1.0/24", "192.0.2.1")),
            v6: Some(end("2001:db8::/40", "2001:db8:1:100::/56", "2001:db8:ff::1")),
        };
        LocalVtep { vni: 0x01_0203_u32.try_into().expect("a VNI"), port: 8472, guard: true, ends }
    }

    fn a_peer(underlay: &str, gateway: &str) -> Peer {
        Peer {
            underlay: v(underlay),
            vtep_mac: v("02:42:c0:00:02:02"),
            path: UnderlayPath { ifindex: 3, gateway: v(gateway) },
            direct: false,
            mtu: 1450,
        }
    }

    /// Of IPv6 also by a next hop that is known on the link alone.
    fn peers() -> [Peer; 3] {
        [("192.0.2.2", "192.0.2.254"), ("2001:db8:ff::2", "2001:db8:ff::2"), ("2001:db8:ff::2", "fe80::1")]
            .map(|(underlay, gateway)| a_peer(underlay, gateway))
    }

    #[test]
    fn what_is_written_is_what_is_read_back() {
        for guard in [false, true] {
            let both = LocalVtep { guard, ..node() };
            let of_one = |family| {
                let mut ends = PerFamily::default();
                *ends.slot(family) = both.ends.get(family).copied();
                LocalVtep { ends, ..both }
            };
            for node in [both, of_one(Family::V4), of_one(Family::V6)] {
                assert_eq!(local_vtep(&config(&node)), Some(node));
            }
        }
        for wanted in peers().into_iter().flat_map(|peer| [false, true].map(|direct| Peer { direct, ..peer })) {
            let written = peer(&wanted, &node()).expect("this node has an end of its family");
            assert_eq!(found_peer(&written, &node()), Some(wanted));
        }
        let of_v4 = LocalVtep { ends: PerFamily { v6: None, ..node().ends }, ..node() };
        assert_eq!(peer(&peers()[1], &of_v4), None, "there is no end to send from");
        for fast in [false, true] {
            let wanted =
                Pod { ifindex: 7, mac: v("02:42:0a:40:01:05"), gateway_mac: v("02:42:0a:40:01:01"), mtu: 1450, fast };
            assert_eq!(found_pod(&pod(&wanted)), Some(wanted));
        }
        assert_eq!(local_vtep(&abi::Config::default()), None);
        assert_eq!(found_peer(&abi::Peer::default(), &node()), None);
        assert_eq!(found_pod(&abi::Pod::default()), None);
    }

    #[test]
    fn what_somebody_bent_is_nothing_that_anybody_wants() {
        for mut bent in peers().map(|of| peer(&of, &node()).expect("this node has an end of its family")) {
            bent.template[abi::TEMPLATE_UDP + 2] ^= 1;
            assert_eq!(found_peer(&bent, &node()).map(|peer| peer.mtu), Some(0));
        }
        let bent = abi::Pod { ifindex: 7, mtu: 1450, ..abi::Pod::default() };
        assert_eq!(found_pod(&bent).map(|pod| pod.mtu), Some(0), "it has no MAC address");
        let bent = abi::Config { network4_mask: 0, own4_mask: 0, ..config(&node()) };
        assert_ne!(local_vtep(&bent), Some(node()));
    }
}
