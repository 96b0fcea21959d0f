/* SPDX-License-Identifier: Apache-2.0 */
/*
 * At the ingress of a pod's veth on the host: what the pod sends. To a pod of another node it is encapsulated here and handed
 * to the uplink, to one of this node it goes straight through that pod's veth.
 */
#ifndef POD_OUT_H
#define POD_OUT_H

#include "guard.h"

/* What wire_out meets of ours, at the interface that it is handed to. Nobody else sees it. */
#define MARK_FAST 0x0fab0001

/* What is counted for a peer on sending. */
INLINE void count_sent(struct __sk_buff *skb, struct traffic *traffic, __u32 length)
{
	traffic->sent_packets += skb->gso_segs ?: 1;
	traffic->sent_bytes += length;
}

INLINE int to_neighbour(const struct peer *peer)
{
	struct bpf_redir_neigh nexthop = {};

	nexthop.nh_family = peer->flags & PEER_NEXTHOP_IPV6 ? FAMILY_IPV6 : FAMILY_IPV4;
	__builtin_memcpy(nexthop.ipv6_nh, peer->nexthop, sizeof(nexthop.ipv6_nh));
	return redirect_neigh(peer->ifindex, &nexthop, sizeof(nexthop), 0);
}

/* To another pod of this node: the frame is as the bridge would hand it on. */
INLINE int to_pod(struct __sk_buff *skb, const struct config *node, const struct packet *packet, __u32 from, __u32 slot,
		  const __u8 *destination)
{
	const struct pod *pod = map_lookup(&pods, &slot);

	if (!pod || !pod->ifindex || slot == from)
		return -SLOW_NOT_A_POD;
	if (!(pod->flags & POD_FAST))
		return -SLOW_POD_OFF;
	if (!is_mac(destination, pod->mac))
		return -SLOW_MAC;
	if (!fits(skb, packet, pod->mtu))
		return -SLOW_TOO_LARGE;
	if (is_marked(node, slot, packet->is_udp, packet->destination_port))
		return -SLOW_NAT;
	/* It was for another host as far as the veth knows. */
	if (change_type(skb, PACKET_HOST) < 0)
		return -SLOW_REFUSED;
	skb->mark = 0;
	count(POD_OUT, FAST_SAME_NODE);
	return redirect_peer(pod->ifindex, 0);
}

/* The pod that sends: whose address it has, if MAC address and interface are that pod's too. */
INLINE const struct pod *sender(struct __sk_buff *skb, __u32 slot, const __u8 *source)
{
	const struct pod *pod = map_lookup(&pods, &slot);

	if (!slot || !pod || pod->ifindex != skb->ifindex || !is_mac(source, pod->mac))
		return 0;
	return pod;
}

/* What counts for every destination, once the packet is known to be whole. */
INLINE int look_sent(struct __sk_buff *skb, const struct config *node, const struct pod *pod, __u32 slot,
		     const struct packet *packet)
{
	if (packet->length + ETH_HLEN != skb->len)
		return -SLOW_TRUNCATED;
	if (packet->is_udp && packet->destination_port == *(const __u16 *)node->port)
		return -SLOW_TUNNEL_PORT;
	if (!(pod->flags & POD_FAST))
		return -SLOW_POD_OFF;
	if (is_marked(node, slot, packet->is_udp, packet->source_port))
		return -SLOW_NAT;
	return FINE;
}

INLINE int look_way(struct __sk_buff *skb, __u32 slot, const struct packet *packet, __u8 ttl, struct way *way)
{
	if (!find_way(slot, way) || !way->peer->ifindex)
		return -SLOW_NO_ROUTE;
	if (ttl <= 1)
		return -SLOW_TTL;
	return fits(skb, packet, way->peer->mtu) ? FINE : -SLOW_TOO_LARGE;
}

struct encapsulated4 {
	__u64 template[TEMPLATE_SIZE / 8];
	struct iphdr ip;
};
/* The compiler fills the structure up to a multiple of 8. */
#define ENCAPSULATED4 (TEMPLATE_SIZE + sizeof(struct iphdr))

/* Room for the outer headers. An Ethernet header inside (ENCAP_L2_ETH) is known since 5.13. */
INLINE int make_room4(struct __sk_buff *skb)
{
	return adjust_room(skb, TEMPLATE_SIZE - ETH_HLEN, BPF_ADJ_ROOM_MAC,
			   BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
				   BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH);
}

INLINE int encapsulate4(struct __sk_buff *skb, const struct way *way, const struct iphdr *ip, __u32 length)
{
	const __u64 *template = (const __u64 *)way->peer->template;
	__u32 hash = get_hash(skb);
	struct encapsulated4 headers ALIGNED;
	struct iphdr *outer = (void *)headers.template + TEMPLATE_IP;
	struct udphdr *udp = (void *)headers.template + TEMPLATE_UDP;
	__u16 total = length + TEMPLATE_SIZE - ETH_HLEN;
	__u16 id = way->traffic->sent_packets + hash;
	__u8 ecn = ip->tos & ECN_MASK;

	for (int i = 0; i < TEMPLATE_SIZE / 8; i++)
		headers.template[i] = template[i];
	headers.ip = *ip;
	set_ttl4(&headers.ip, ip->ttl - 1);
	/* RFC 6040 section 4.1, compatibility mode: as the kernel's tunnels do. */
	outer->tos = ecn == ECN_EXPERIENCED ? ECN_CAPABLE0 : ecn;
	outer->tot_len = net16(total);
	outer->id = net16(id);
	outer->check = net16(~fold(way->peer->template_sum + outer->tos + total + id));
	/* One flow, one port: networks spread load by it (RFC 7348 section 5, ports as of RFC 6335). */
	udp->source = net16(0xc000 | (hash & 0x3fff));
	udp->len = net16(total - sizeof(*outer));
	if (make_room4(skb) < 0)
		return -SLOW_REFUSED;
	if (store_bytes(skb, 0, &headers, ENCAPSULATED4, 0) < 0) {
		count(POD_OUT, DROPPED_REWRITE);
		return DROP;
	}
	count_sent(skb, way->traffic, length);
	count(POD_OUT, FAST_TUNNEL);
	return to_neighbour(way->peer);
}

INLINE int direct4(struct __sk_buff *skb, const struct way *way, const struct iphdr *ip, __u32 length)
{
	struct iphdr changed = *ip;

	set_ttl4(&changed, ip->ttl - 1);
	if (store_bytes(skb, ETH_HLEN, &changed, sizeof(changed), 0) < 0)
		return -SLOW_REFUSED;
	skb->mark = MARK_FAST;
	count_sent(skb, way->traffic, length);
	count(POD_OUT, FAST_DIRECT);
	return to_neighbour(way->peer);
}

INLINE int pod_out4(struct __sk_buff *skb, const struct config *node)
{
	struct packet packet;
	struct ethernet *eth;
	struct iphdr *ip;
	const struct pod *pod;
	struct way way;
	__u32 slot, other, source, destination;
	int is_here, reason;

	make_readable(skb, HEADERS4_TCP);
	eth = at(skb, 0);
	if (!has(skb, ETH_HLEN + sizeof(*ip)))
		return -SLOW_TRUNCATED;
	ip = (void *)(eth + 1);
	if (ip->version != 4 || ip->ihl < 5)
		return -SLOW_TRUNCATED;
	source = net32(ip->saddr);
	destination = net32(ip->daddr);
	slot = is_own4(node, source) ? pod_of4(node, source) : 0;
	pod = sender(skb, slot, eth->source);
	if (!pod)
		return -SLOW_SENDER;
	is_here = is_own4(node, destination);
	other = is_here ? pod_of4(node, destination) : peer_of4(node, destination);
	if (!other) {
		mark4(skb, slot, ip);
		return -SLOW_NOT_A_POD;
	}
	reason = look4(skb, ETH_HLEN, ip, &packet);
	if (reason == FINE)
		reason = look_sent(skb, node, pod, slot, &packet);
	if (reason != FINE)
		return reason;
	if (unlikely(has_slow_flows(node, slot))) {
		struct flow flow ALIGNED = {};

		map_address4(flow.source, ip->saddr);
		map_address4(flow.destination, ip->daddr);
		if (is_slow_flow(&flow, &packet, packet.source_port, packet.destination_port))
			return -SLOW_FLOW;
	}
	if (is_here)
		return to_pod(skb, node, &packet, slot, other, eth->destination);
	if (!is_mac(eth->destination, pod->gateway))
		return -SLOW_MAC;
	reason = look_way(skb, other, &packet, ip->ttl, &way);
	if (reason != FINE)
		return reason;
	if (way.peer->flags & PEER_DIRECT)
		return direct4(skb, &way, ip, packet.length);
	if (packet.length > 0xffff - (TEMPLATE_SIZE - ETH_HLEN))
		return -SLOW_TOO_LARGE;
	return encapsulate4(skb, &way, ip, packet.length);
}

/* As far as it is rewritten: up to the hop limit. */
struct rewritten6 {
	__u8 reserved[2];
	struct ethernet eth;
	__u8 ip[8];
};

#define HOP_LIMIT 7

INLINE int to_peer6(struct __sk_buff *skb, const struct way *way, const struct ethernet *eth, const struct ipv6hdr *ip,
		    __u32 length)
{
	struct rewritten6 headers ALIGNED;
	int is_direct = way->peer->flags & PEER_DIRECT;

	/* Through our VXLAN device it goes from our VTEP to the peer's; to a neighbour the kernel finds both addresses. */
	__builtin_memcpy(&headers.eth, is_direct ? (const void *)eth : way->peer->template + TEMPLATE_INNER, ETH_HLEN);
	__builtin_memcpy(headers.ip, ip, sizeof(headers.ip));
	headers.ip[HOP_LIMIT]--;
	if (store_bytes(skb, 0, &headers.eth, ETH_HLEN + sizeof(headers.ip), 0) < 0)
		return -SLOW_REFUSED;
	skb->mark = MARK_FAST;
	count_sent(skb, way->traffic, length);
	if (is_direct) {
		count(POD_OUT, FAST_DIRECT);
		return to_neighbour(way->peer);
	}
	count(POD_OUT, FAST_DEVICE);
	return redirect(way->peer->ifindex, 0);
}

INLINE int pod_out6(struct __sk_buff *skb, const struct config *node)
{
	struct packet packet;
	struct ethernet *eth;
	struct ipv6hdr *ip;
	const struct pod *pod;
	struct way way;
	__u32 slot, other;
	int is_here, reason;

	make_readable(skb, HEADERS6_TCP);
	eth = at(skb, 0);
	if (!has(skb, ETH_HLEN + sizeof(*ip)))
		return -SLOW_TRUNCATED;
	ip = (void *)(eth + 1);
	if (ip->version != 6)
		return -SLOW_TRUNCATED;
	slot = is_own6(node, &ip->saddr) ? pod_of6(&ip->saddr) : 0;
	pod = sender(skb, slot, eth->source);
	if (!pod)
		return -SLOW_SENDER;
	is_here = is_own6(node, &ip->daddr);
	other = is_here ? pod_of6(&ip->daddr) : peer_of6(node, &ip->daddr);
	if (!other) {
		mark6(skb, slot, ip->nexthdr);
		return -SLOW_NOT_A_POD;
	}
	reason = look6(skb, ETH_HLEN, ip, &packet);
	if (reason == FINE)
		reason = look_sent(skb, node, pod, slot, &packet);
	if (reason != FINE)
		return reason;
	if (unlikely(has_slow_flows(node, slot))) {
		struct flow flow ALIGNED = {};

		__builtin_memcpy(flow.source, &ip->saddr, sizeof(flow.source));
		__builtin_memcpy(flow.destination, &ip->daddr, sizeof(flow.destination));
		if (is_slow_flow(&flow, &packet, packet.source_port, packet.destination_port))
			return -SLOW_FLOW;
	}
	if (is_here)
		return to_pod(skb, node, &packet, slot, other, eth->destination);
	if (!is_mac(eth->destination, pod->gateway))
		return -SLOW_MAC;
	reason = look_way(skb, other, &packet, ip->hop_limit, &way);
	if (reason != FINE)
		return reason;
	return to_peer6(skb, &way, eth, ip, packet.length);
}

INLINE int pod_out(struct __sk_buff *skb)
{
	const struct config *node = node_config();

	if (!node)
		return NOT_OURS;
	if (!skb->vlan_present && skb->protocol == net16(ETH_P_IP) && node->flags & CONFIG_IPV4)
		return pod_out4(skb, node);
	if (!skb->vlan_present && skb->protocol == net16(ETH_P_IPV6) && node->flags & CONFIG_IPV6)
		return pod_out6(skb, node);
	return -SLOW_NOT_IP;
}

SECTION("tc/pod_out") int fabric_pod_out(struct __sk_buff *skb)
{
	return answer(POD_OUT, pod_out(skb));
}

#endif
