/* SPDX-License-Identifier: Apache-2.0 */
/*
 * At the egress of a pod's veth: what comes to it by the kernel's path, since redirect_peer passes this hook by. If that
 * comes from a pod of another node, the kernel may have translated its destination (a NodePort or hostPort without
 * masquerade), and the answer must go back through the connection tracking that knows. So the flow is noted as the pod will
 * answer it, and from then on is slow in both directions: what was tracked once is tracked to its end. Of a pod of this node
 * the port that it comes from is marked in nat_bits: connection tracking may have given it that one (br_netfilter).
 */
#ifndef POD_IN_H
#define POD_IN_H

#include "guard.h"

INLINE int record(const struct config *node, struct flow *flow, __u32 slot, __u32 other, int is_here, __u32 ifindex)
{
	const struct pod *pod = map_lookup(&pods, &slot);
	__u8 is_udp = flow->protocol == IPPROTO_UDP;
	__u16 port;

	if (!slot || !other || !pod || pod->ifindex != ifindex)
		return NOT_OURS;
	if (!is_here)
		return note(flow, slot);
	__builtin_memcpy(&port, flow->destination_port, 2);
	if (!(node->flags & CONFIG_GUARD) || is_marked(node, other, is_udp, port))
		return NOT_OURS;
	mark(other, is_udp, port);
	return -SLOW_RECORDED;
}

INLINE int pod_in4(struct __sk_buff *skb, const struct config *node)
{
	struct flow flow ALIGNED = {};
	struct iphdr *ip;
	struct ports *ports;
	__u32 slot, other, offset;
	int is_here;

	make_readable(skb, HEADERS4_UDP);
	ip = at(skb, ETH_HLEN);
	if (!has(skb, HEADERS4_UDP) || ip->version != 4 || ip->ihl < 5 || ip->frag_off & FRAGMENT_OFFSET)
		return NOT_OURS;
	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
		return NOT_OURS;
	if (!is_own4(node, net32(ip->daddr)))
		return NOT_OURS;
	is_here = is_own4(node, net32(ip->saddr));
	other = is_here ? pod_of4(node, net32(ip->saddr)) : peer_of4(node, net32(ip->saddr));
	slot = pod_of4(node, net32(ip->daddr));
	flow.protocol = ip->protocol;
	map_address4(flow.source, ip->daddr);
	map_address4(flow.destination, ip->saddr);
	offset = ETH_HLEN + ip->ihl * 4;
	make_readable(skb, offset + sizeof(*ports));
	ports = at(skb, offset);
	if (!has_at(skb, ports, sizeof(*ports)))
		return NOT_OURS;
	__builtin_memcpy(flow.source_port, &ports->destination, 2);
	__builtin_memcpy(flow.destination_port, &ports->source, 2);
	return record(node, &flow, slot, other, is_here, skb->ifindex);
}

INLINE int pod_in6(struct __sk_buff *skb, const struct config *node)
{
	struct flow flow ALIGNED = {};
	struct ipv6hdr *ip;
	struct ports *ports;
	__u32 slot, other;
	int is_here;

	make_readable(skb, HEADERS6_UDP);
	ip = at(skb, ETH_HLEN);
	if (!has(skb, HEADERS6_UDP) || ip->version != 6 || (ip->nexthdr != IPPROTO_TCP && ip->nexthdr != IPPROTO_UDP))
		return NOT_OURS;
	if (!is_own6(node, &ip->daddr))
		return NOT_OURS;
	is_here = is_own6(node, &ip->saddr);
	other = is_here ? pod_of6(&ip->saddr) : peer_of6(node, &ip->saddr);
	slot = pod_of6(&ip->daddr);
	ports = (struct ports *)(ip + 1);
	flow.protocol = ip->nexthdr;
	__builtin_memcpy(flow.source, &ip->daddr, sizeof(flow.source));
	__builtin_memcpy(flow.destination, &ip->saddr, sizeof(flow.destination));
	__builtin_memcpy(flow.source_port, &ports->destination, 2);
	__builtin_memcpy(flow.destination_port, &ports->source, 2);
	return record(node, &flow, slot, other, is_here, skb->ifindex);
}

INLINE int pod_in(struct __sk_buff *skb)
{
	const struct config *node = node_config();

	if (!node)
		return NOT_OURS;
	if (skb->protocol == net16(ETH_P_IP) && node->flags & CONFIG_IPV4)
		return pod_in4(skb, node);
	if (skb->protocol == net16(ETH_P_IPV6) && node->flags & CONFIG_IPV6)
		return pod_in6(skb, node);
	return NOT_OURS;
}

SECTION("tc/pod_in") int fabric_pod_in(struct __sk_buff *skb)
{
	return answer(POD_IN, pod_in(skb));
}

#endif
