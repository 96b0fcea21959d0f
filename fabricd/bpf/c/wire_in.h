/* SPDX-License-Identifier: Apache-2.0 */
/*
 * At the ingress of an uplink: what peers send to pods of this node, encapsulated or, from peers on the same link, as it is.
 * What isn't for the tunnel or a pod is none of ours, and isn't counted.
 */
#ifndef WIRE_IN_H
#define WIRE_IN_H

#include "guard.h"

struct vxlanhdr {
	__u32 flags;
	__u32 vni;
};

#define OUTER4 (ETH_HLEN + sizeof(struct iphdr) + sizeof(struct udphdr))
#define OUTER6 (ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct udphdr))
#define TUNNEL (sizeof(struct vxlanhdr) + ETH_HLEN)

INLINE void count_received(struct __sk_buff *skb, struct traffic *traffic, __u32 length)
{
	traffic->received_packets += skb->gso_segs ?: 1;
	traffic->received_bytes += length;
}

/* VXLAN with our VNI and no flag but that which says so, for our device. */
INLINE int look_tunnel(const struct config *node, const struct vxlanhdr *vxlan, const __u8 *vtep, __u16 protocol)
{
	const struct ethernet *eth = (const void *)(vxlan + 1);

	if (vxlan->flags != net32(0x08000000) || vxlan->vni != *(const __u32 *)node->vni)
		return -SLOW_VNI;
	if (!is_mac(eth->destination, vtep))
		return -SLOW_MAC;
	return eth->protocol == protocol ? FINE : -SLOW_NOT_IP;
}

/*
 * What the packet inside has for a traffic class when the outer one was `outer`: RFC 6040 section 4.2, as the kernel's
 * tunnels. Where that would drop or note something, -1: it is left to them.
 */
INLINE int inner_ecn(__u8 outer, __u8 inner)
{
	outer &= ECN_MASK;
	inner &= ECN_MASK;
	if (likely(outer == ECN_NOT_CAPABLE || outer == inner))
		return inner;
	if (inner == ECN_NOT_CAPABLE)
		return -1;
	if (outer == ECN_EXPERIENCED)
		return ECN_EXPERIENCED;
	if (outer == ECN_CAPABLE1 && inner == ECN_CAPABLE0)
		return -1;
	return inner;
}

/* The pod that it is for, if it may have the packet. */
INLINE int look_pod(struct __sk_buff *skb, const struct config *node, const struct packet *packet, __u32 slot,
		    const struct pod **found)
{
	const struct pod *pod = map_lookup(&pods, &slot);

	if (!slot || !pod || !pod->ifindex)
		return -SLOW_NOT_A_POD;
	if (!(pod->flags & POD_FAST))
		return -SLOW_POD_OFF;
	if (!fits(skb, packet, pod->mtu))
		return -SLOW_TOO_LARGE;
	if (is_marked(node, slot, packet->is_udp, packet->destination_port))
		return -SLOW_NAT;
	*found = pod;
	return FINE;
}

/* Flows are noted as the pod answers them. */
INLINE int is_slow4(const struct config *node, __u32 slot, const struct iphdr *ip, const struct packet *packet)
{
	struct flow flow ALIGNED = {};

	if (likely(!has_slow_flows(node, slot)))
		return 0;
	map_address4(flow.source, ip->daddr);
	map_address4(flow.destination, ip->saddr);
	return is_slow_flow(&flow, packet, packet->destination_port, packet->source_port);
}

INLINE int is_slow6(const struct config *node, __u32 slot, const struct ipv6hdr *ip, const struct packet *packet)
{
	struct flow flow ALIGNED = {};

	if (likely(!has_slow_flows(node, slot)))
		return 0;
	__builtin_memcpy(flow.source, &ip->daddr, sizeof(flow.source));
	__builtin_memcpy(flow.destination, &ip->saddr, sizeof(flow.destination));
	return is_slow_flow(&flow, packet, packet->destination_port, packet->source_port);
}

INLINE int hand_over(struct __sk_buff *skb, const struct pod *pod, struct traffic *traffic, __u32 length,
		     enum reason reason)
{
	skb->mark = 0;
	count_received(skb, traffic, length);
	count(WIRE_IN, reason);
	return redirect_peer(pod->ifindex, 0);
}

/* Ethernet and IPv4 as the pod is to see them. Two bytes in front put the IP header where it can be calculated with. */
struct delivered4 {
	__u8 reserved[2];
	struct ethernet eth;
	struct iphdr ip;
};

INLINE void address(struct ethernet *eth, const struct pod *pod, __u16 protocol)
{
	__builtin_memcpy(eth->destination, pod->mac, ETH_ALEN);
	__builtin_memcpy(eth->source, pod->gateway, ETH_ALEN);
	eth->protocol = protocol;
}

/* It reaches us without a tunnel, by the interface that it came from. */
INLINE int is_on_link(struct __sk_buff *skb, const struct peer *peer)
{
	return peer->flags & PEER_DIRECT && peer->ifindex == skb->ifindex;
}

INLINE int dropped(void)
{
	count(WIRE_IN, DROPPED_REWRITE);
	return DROP;
}

INLINE int is_sender4(const struct peer *peer, __u32 address)
{
	return address && (*(const __u32 *)peer->underlay == address || *(const __u32 *)peer->former == address);
}

/* To one of our underlay addresses at the tunnel's port. */
INLINE int tunnel_in4(struct __sk_buff *skb, const struct config *node)
{
	struct delivered4 headers ALIGNED;
	struct packet packet;
	struct iphdr *outer, *ip;
	struct udphdr *udp;
	const struct pod *pod;
	struct way way;
	__u32 slot, destination;
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	int reason, ecn;

	make_readable(skb, OUTER4 + TUNNEL + sizeof(*ip) + sizeof(struct tcphdr));
	outer = at(skb, ETH_HLEN);
	if (!has(skb, OUTER4 + TUNNEL + sizeof(*ip)))
		return -SLOW_TRUNCATED;
	udp = (void *)(outer + 1);
	ip = (void *)(udp + 1) + TUNNEL;
	if (net16(outer->tot_len) + ETH_HLEN != skb->len || net16(udp->len) + sizeof(*outer) != net16(outer->tot_len))
		return -SLOW_TRUNCATED;
	reason = look_tunnel(node, (void *)(udp + 1), node->vtep4, net16(ETH_P_IP));
	if (reason != FINE)
		return reason;
	if (ip->version != 4 || ip->ihl < 5)
		return -SLOW_TRUNCATED;
	slot = peer_of4(node, net32(ip->saddr));
	if (!find_way(slot, &way) || !is_sender4(way.peer, outer->saddr))
		return -SLOW_SENDER;
	reason = look4(skb, OUTER4 + TUNNEL, ip, &packet);
	if (reason != FINE)
		return reason;
	if (packet.length + OUTER4 + TUNNEL != skb->len)
		return -SLOW_TRUNCATED;
	if (ip->ttl <= 1)
		return -SLOW_TTL;
	ecn = inner_ecn(outer->tos, ip->tos);
	if (ecn < 0)
		return -SLOW_CONGESTION;
	destination = net32(ip->daddr);
	slot = is_own4(node, destination) ? pod_of4(node, destination) : 0;
	reason = look_pod(skb, node, &packet, slot, &pod);
	if (reason != FINE)
		return reason;
	if (is_slow4(node, slot, ip, &packet))
		return -SLOW_FLOW;
	headers.ip = *ip;
	set_ttl4(&headers.ip, ip->ttl - 1);
	if (unlikely(ecn != (ip->tos & ECN_MASK)))
		set_tos4(&headers.ip, (ip->tos & ~ECN_MASK) | ecn);
	address(&headers.eth, pod, net16(ETH_P_IP));
	/*
	 * A checksum that the card has verified is the outer one, and says nothing of the inner one; without an outer one it is
	 * the inner one, which stays verified. What is rewritten below keeps the sum of the header as it was.
	 */
	if (!udp->check)
		flags |= BPF_F_ADJ_ROOM_NO_CSUM_RESET;
	if (adjust_room(skb, -(int)(OUTER4 - ETH_HLEN + TUNNEL), BPF_ADJ_ROOM_MAC, flags) < 0)
		return -SLOW_REFUSED;
	if (store_bytes(skb, 0, &headers.eth, ETH_HLEN + sizeof(headers.ip), 0) < 0)
		return dropped();
	return hand_over(skb, pod, way.traffic, packet.length, FAST_TUNNEL);
}

/* To a pod, as it is: from a peer on this link, or from anybody. */
INLINE int direct_in4(struct __sk_buff *skb, const struct config *node, const struct iphdr *ip)
{
	struct delivered4 headers ALIGNED;
	struct packet packet;
	const struct pod *pod;
	struct way way;
	__u32 slot = peer_of4(node, net32(ip->saddr));
	int reason;

	if (!find_way(slot, &way) || !is_on_link(skb, way.peer))
		return -SLOW_SENDER;
	make_readable(skb, HEADERS4_TCP);
	ip = at(skb, ETH_HLEN);
	if (!has(skb, ETH_HLEN + sizeof(*ip)))
		return -SLOW_TRUNCATED;
	reason = look4(skb, ETH_HLEN, ip, &packet);
	if (reason != FINE)
		return reason;
	/* Ethernet fills up small frames. */
	if (packet.length + ETH_HLEN > skb->len)
		return -SLOW_TRUNCATED;
	if (ip->ttl <= 1)
		return -SLOW_TTL;
	slot = pod_of4(node, net32(ip->daddr));
	reason = look_pod(skb, node, &packet, slot, &pod);
	if (reason != FINE)
		return reason;
	if (is_slow4(node, slot, ip, &packet))
		return -SLOW_FLOW;
	headers.ip = *ip;
	set_ttl4(&headers.ip, ip->ttl - 1);
	address(&headers.eth, pod, net16(ETH_P_IP));
	if (store_bytes(skb, 0, &headers.eth, ETH_HLEN + sizeof(headers.ip), 0) < 0)
		return -SLOW_REFUSED;
	return hand_over(skb, pod, way.traffic, packet.length, FAST_DIRECT);
}

INLINE int wire_in4(struct __sk_buff *skb, const struct config *node)
{
	struct iphdr *ip;
	struct udphdr *udp;

	make_readable(skb, OUTER4);
	ip = at(skb, ETH_HLEN);
	if (!has(skb, OUTER4) || ip->version != 4 || ip->ihl < 5)
		return NOT_OURS;
	udp = (void *)(ip + 1);
	if (ip->protocol == IPPROTO_UDP && ip->ihl == 5 && !(ip->frag_off & FRAGMENT) &&
	    ip->daddr == *(const __u32 *)node->local4 && udp->dest == *(const __u16 *)node->port)
		return tunnel_in4(skb, node);
	if (is_own4(node, net32(ip->daddr)))
		return direct_in4(skb, node, ip);
	return NOT_OURS;
}

INLINE int is_same6(const __u8 *one, const struct in6_addr *other)
{
	const __u64 *a = (const __u64 *)one, *b = (const __u64 *)other;

	return a[0] == b[0] && a[1] == b[1];
}

INLINE int is_sender6(const struct peer *peer, const struct in6_addr *address)
{
	const __u64 *halves = (const __u64 *)address;

	return (halves[0] || halves[1]) && (is_same6(peer->underlay, address) || is_same6(peer->former, address));
}

struct delivered6 {
	__u8 reserved[2];
	struct ethernet eth;
	__u8 ip[8];
};

#define HOP_LIMIT_AT 7

/* The pod's frame. The card's sum over the packet, if there is one, has to follow the hop limit and the class. */
INLINE int rewrite6(struct __sk_buff *skb, struct delivered6 *headers)
{
	return store_bytes(skb, 0, &headers->eth, ETH_HLEN, 0) < 0 ||
	       store_bytes(skb, ETH_HLEN, headers->ip, sizeof(headers->ip), BPF_F_RECOMPUTE_CSUM) < 0;
}

INLINE __u8 class_of(const struct ipv6hdr *ip)
{
	return ip->priority << 4 | ip->flow_lbl[0] >> 4;
}

INLINE int tunnel_in6(struct __sk_buff *skb, const struct config *node)
{
	struct delivered6 headers ALIGNED;
	struct packet packet;
	struct ipv6hdr *outer, *ip;
	struct udphdr *udp;
	const struct pod *pod;
	struct way way;
	__u32 slot;
	int reason, ecn;

	make_readable(skb, OUTER6 + TUNNEL + sizeof(*ip) + sizeof(struct tcphdr));
	outer = at(skb, ETH_HLEN);
	if (!has(skb, OUTER6 + TUNNEL + sizeof(*ip)))
		return -SLOW_TRUNCATED;
	udp = (void *)(outer + 1);
	ip = (void *)(udp + 1) + TUNNEL;
	if (!udp->check)
		return -SLOW_CHECKSUM;
	if (net16(outer->payload_len) + sizeof(*outer) + ETH_HLEN != skb->len || udp->len != outer->payload_len)
		return -SLOW_TRUNCATED;
	reason = look_tunnel(node, (void *)(udp + 1), node->vtep6, net16(ETH_P_IPV6));
	if (reason != FINE)
		return reason;
	if (ip->version != 6)
		return -SLOW_TRUNCATED;
	slot = peer_of6(node, &ip->saddr);
	if (!find_way(slot, &way) || !is_sender6(way.peer, &outer->saddr))
		return -SLOW_SENDER;
	reason = look6(skb, OUTER6 + TUNNEL, ip, &packet);
	if (reason != FINE)
		return reason;
	if (packet.length + OUTER6 + TUNNEL != skb->len)
		return -SLOW_TRUNCATED;
	if (ip->hop_limit <= 1)
		return -SLOW_TTL;
	ecn = inner_ecn(class_of(outer), class_of(ip));
	if (ecn < 0)
		return -SLOW_CONGESTION;
	slot = is_own6(node, &ip->daddr) ? pod_of6(&ip->daddr) : 0;
	reason = look_pod(skb, node, &packet, slot, &pod);
	if (reason != FINE)
		return reason;
	if (is_slow6(node, slot, ip, &packet))
		return -SLOW_FLOW;
	__builtin_memcpy(headers.ip, ip, sizeof(headers.ip));
	headers.ip[1] = (headers.ip[1] & ~(ECN_MASK << 4)) | ecn << 4;
	headers.ip[HOP_LIMIT_AT]--;
	address(&headers.eth, pod, net16(ETH_P_IPV6));
	/* What the card has verified is the outer checksum: of the inner one nothing is known. */
	if (adjust_room(skb, -(int)(OUTER6 - ETH_HLEN + TUNNEL), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO) < 0)
		return -SLOW_REFUSED;
	if (rewrite6(skb, &headers))
		return dropped();
	return hand_over(skb, pod, way.traffic, packet.length, FAST_TUNNEL);
}

INLINE int direct_in6(struct __sk_buff *skb, const struct config *node, const struct ipv6hdr *ip)
{
	struct delivered6 headers ALIGNED;
	struct packet packet;
	const struct pod *pod;
	struct way way;
	__u32 slot = peer_of6(node, &ip->saddr);
	int reason;

	if (!find_way(slot, &way) || !is_on_link(skb, way.peer))
		return -SLOW_SENDER;
	make_readable(skb, HEADERS6_TCP);
	ip = at(skb, ETH_HLEN);
	if (!has(skb, ETH_HLEN + sizeof(*ip)))
		return -SLOW_TRUNCATED;
	reason = look6(skb, ETH_HLEN, ip, &packet);
	if (reason != FINE)
		return reason;
	if (packet.length + ETH_HLEN > skb->len)
		return -SLOW_TRUNCATED;
	if (ip->hop_limit <= 1)
		return -SLOW_TTL;
	slot = pod_of6(&ip->daddr);
	reason = look_pod(skb, node, &packet, slot, &pod);
	if (reason != FINE)
		return reason;
	if (is_slow6(node, slot, ip, &packet))
		return -SLOW_FLOW;
	__builtin_memcpy(headers.ip, ip, sizeof(headers.ip));
	headers.ip[HOP_LIMIT_AT]--;
	address(&headers.eth, pod, net16(ETH_P_IPV6));
	if (rewrite6(skb, &headers))
		return dropped();
	return hand_over(skb, pod, way.traffic, packet.length, FAST_DIRECT);
}

INLINE int wire_in6(struct __sk_buff *skb, const struct config *node)
{
	struct ipv6hdr *ip;
	struct udphdr *udp;

	make_readable(skb, OUTER6);
	ip = at(skb, ETH_HLEN);
	if (!has(skb, OUTER6) || ip->version != 6)
		return NOT_OURS;
	udp = (void *)(ip + 1);
	if (ip->nexthdr == IPPROTO_UDP && is_same6(node->local6, &ip->daddr) && udp->dest == *(const __u16 *)node->port)
		return tunnel_in6(skb, node);
	if (is_own6(node, &ip->daddr))
		return direct_in6(skb, node, ip);
	return NOT_OURS;
}

INLINE int wire_in(struct __sk_buff *skb)
{
	const struct config *node = node_config();

	/* What isn't for this host, and what is for a VLAN's interface, is none of ours. */
	if (!node || skb->pkt_type != PACKET_HOST || skb->vlan_present)
		return NOT_OURS;
	if (skb->protocol == net16(ETH_P_IP) && node->flags & CONFIG_IPV4)
		return wire_in4(skb, node);
	if (skb->protocol == net16(ETH_P_IPV6) && node->flags & CONFIG_IPV6)
		return wire_in6(skb, node);
	return NOT_OURS;
}

SECTION("tc/wire_in") int fabric_wire_in(struct __sk_buff *skb)
{
	return answer(WIRE_IN, wire_in(skb));
}

#endif
