/* SPDX-License-Identifier: Apache-2.0 */
/*
 * At the egress of our VXLAN devices, and of an uplink by which peers are reached without a tunnel: what pods of this node
 * send to pods of others by the kernel's path. Connection tracking has seen it, and may have given it another source port
 * than the pod did, where two connections of the pod would look the same to the other end: answers to that port must go
 * back through it. So the flow is noted as it leaves, and is slow in both directions from then on. What pod_out has handed
 * to this interface has a mark, which goes here.
 */
#ifndef WIRE_OUT_H
#define WIRE_OUT_H

#include "pod_out.h"

/* The pod's flow, unless its port is slow already. */
INLINE int note_sent(const struct config *node, struct flow *flow, __u32 slot, __u16 source)
{
	if (!slot || is_marked(node, slot, flow->protocol == IPPROTO_UDP, source))
		return NOT_OURS;
	return note(flow, slot);
}

INLINE int wire_out4(struct __sk_buff *skb, const struct config *node)
{
	struct flow flow ALIGNED = {};
	struct iphdr *ip;
	struct ports *ports;
	__u32 slot, offset;

	make_readable(skb, HEADERS4_UDP);
	ip = at(skb, ETH_HLEN);
	if (!has(skb, HEADERS4_UDP) || ip->version != 4 || ip->ihl < 5 || ip->frag_off & FRAGMENT_OFFSET)
		return NOT_OURS;
	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
		return NOT_OURS;
	if (!is_own4(node, net32(ip->saddr)) || is_own4(node, net32(ip->daddr)) || !peer_of4(node, net32(ip->daddr)))
		return NOT_OURS;
	slot = pod_of4(node, net32(ip->saddr));
	flow.protocol = ip->protocol;
	map_address4(flow.source, ip->saddr);
	map_address4(flow.destination, ip->daddr);
	offset = ETH_HLEN + ip->ihl * 4;
	make_readable(skb, offset + sizeof(*ports));
	ports = at(skb, offset);
	if (!has_at(skb, ports, sizeof(*ports)))
		return NOT_OURS;
	__builtin_memcpy(flow.source_port, &ports->source, 2);
	__builtin_memcpy(flow.destination_port, &ports->destination, 2);
	return note_sent(node, &flow, slot, ports->source);
}

INLINE int wire_out6(struct __sk_buff *skb, const struct config *node)
{
	struct flow flow ALIGNED = {};
	struct ipv6hdr *ip;
	struct ports *ports;
	__u32 slot;

	make_readable(skb, HEADERS6_UDP);
	ip = at(skb, ETH_HLEN);
	if (!has(skb, HEADERS6_UDP) || ip->version != 6 || (ip->nexthdr != IPPROTO_TCP && ip->nexthdr != IPPROTO_UDP))
		return NOT_OURS;
	if (!is_own6(node, &ip->saddr) || is_own6(node, &ip->daddr) || !peer_of6(node, &ip->daddr))
		return NOT_OURS;
	slot = pod_of6(&ip->saddr);
	ports = (struct ports *)(ip + 1);
	flow.protocol = ip->nexthdr;
	__builtin_memcpy(flow.source, &ip->saddr, sizeof(flow.source));
	__builtin_memcpy(flow.destination, &ip->daddr, sizeof(flow.destination));
	__builtin_memcpy(flow.source_port, &ports->source, 2);
	__builtin_memcpy(flow.destination_port, &ports->destination, 2);
	return note_sent(node, &flow, slot, ports->source);
}

INLINE int wire_out(struct __sk_buff *skb)
{
	const struct config *node = node_config();

	if (skb->mark == MARK_FAST) {
		skb->mark = 0;
		return NOT_OURS;
	}
	if (!node || !(node->flags & CONFIG_GUARD))
		return NOT_OURS;
	if (skb->protocol == net16(ETH_P_IP) && node->flags & CONFIG_IPV4)
		return wire_out4(skb, node);
	if (skb->protocol == net16(ETH_P_IPV6) && node->flags & CONFIG_IPV6)
		return wire_out6(skb, node);
	return NOT_OURS;
}

SECTION("tc/wire_out") int fabric_wire_out(struct __sk_buff *skb)
{
	return answer(WIRE_OUT, wire_out(skb));
}

#endif
