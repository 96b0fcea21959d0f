/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What connection tracking may translate has to take the kernel's path in both directions: a pod's ports that talked to
 * something which is no pod, and flows that came to the pod by the kernel's path. In doubt it is slow.
 */
#ifndef GUARD_H
#define GUARD_H

#include "packet.h"

INLINE __u32 nat_word(__u32 slot, __u8 is_udp, __u16 port)
{
	return slot * NAT_WORDS_OF_POD + (is_udp ? NAT_WORDS_OF_PROTOCOL : 0) + net16(port) / 64;
}

INLINE __u64 nat_bit(__u16 port)
{
	return 1ULL << (net16(port) & 63);
}

/* The port of a pod has talked to something that is no pod. */
INLINE void mark(__u32 slot, __u8 is_udp, __u16 port)
{
	__u32 key = nat_word(slot, is_udp, port), zero = 0;
	__u64 *word, bit = nat_bit(port);

	if (number_in(&nat_current, &zero))
		word = map_lookup(&nat_bits1, &key);
	else
		word = map_lookup(&nat_bits0, &key);
	if (word && !(*word & bit))
		__sync_fetch_and_or(word, bit);
}

INLINE int is_marked(const struct config *node, __u32 slot, __u8 is_udp, __u16 port)
{
	__u32 key = nat_word(slot, is_udp, port);
	__u64 *word, bit = nat_bit(port);

	if (!(node->flags & CONFIG_GUARD))
		return 0;
	word = map_lookup(&nat_bits0, &key);
	if (!word || *word & bit)
		return 1;
	word = map_lookup(&nat_bits1, &key);
	return !word || *word & bit;
}

INLINE int has_slow_flows(const struct config *node, __u32 slot)
{
	__u64 *latest;

	if (!(node->flags & CONFIG_GUARD))
		return 0;
	latest = map_lookup(&slow_pods, &slot);
	return !latest || *latest;
}

/* `flow` has the addresses: the pod's is the source. */
INLINE int is_slow_flow(struct flow *flow, const struct packet *packet, __u16 source, __u16 destination)
{
	flow->protocol = packet->is_udp ? IPPROTO_UDP : IPPROTO_TCP;
	__builtin_memcpy(flow->source_port, &source, 2);
	__builtin_memcpy(flow->destination_port, &destination, 2);
	return map_lookup(&slow_flows, flow) != 0;
}

/* A flow of a pod takes the kernel's path from now on: the flow before the word that tells of flows. */
INLINE int note(struct flow *flow, __u32 slot)
{
	__u64 *latest = map_lookup(&slow_pods, &slot);
	__u64 now = coarse_time();

	if (!latest)
		return NOT_OURS;
	map_update(&slow_flows, flow, &now, BPF_ANY);
	*latest = now;
	return -SLOW_RECORDED;
}

/* The transport's ports at `offset`, of a packet to something that is no pod: mark the pod's. */
INLINE void mark_at(struct __sk_buff *skb, __u32 slot, __u8 protocol, __u32 offset)
{
	struct ports *ports;

	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP)
		return;
	make_readable(skb, offset + sizeof(*ports));
	ports = at(skb, offset);
	if (has_at(skb, ports, sizeof(*ports)))
		mark(slot, protocol == IPPROTO_UDP, ports->source);
}

/* Of fragments the first one has the ports. Whoever only ever sends others has no connection to translate. */
INLINE void mark4(struct __sk_buff *skb, __u32 slot, const struct iphdr *ip)
{
	if (!(ip->frag_off & FRAGMENT_OFFSET) && ip->ihl >= 5)
		mark_at(skb, slot, ip->protocol, ETH_HLEN + ip->ihl * 4);
}

/* What all extension headers that are passed over begin with (RFC 8200 section 4); a fragment's is 8 bytes long. */
struct extension {
	__u8 next;
	__u8 length;
	__u16 fragment;
};

/* At most this many extension headers before the transport's are passed over. */
#define EXTENSIONS 4

INLINE void mark6(struct __sk_buff *skb, __u32 slot, __u8 next)
{
	__u32 offset = ETH_HLEN + sizeof(struct ipv6hdr);

#pragma unroll
	for (int i = 0; i < EXTENSIONS; i++) {
		struct extension *extension;

		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
		    next != IPPROTO_FRAGMENT)
			break;
		make_readable(skb, offset + 8);
		extension = at(skb, offset);
		if (!has_at(skb, extension, 8))
			return;
		if (next == IPPROTO_FRAGMENT) {
			if (extension->fragment & net16(0xfff8))
				return;
			offset += 8;
		} else {
			offset += (extension->length + 1) * 8;
		}
		next = extension->next;
	}
	mark_at(skb, slot, next, offset);
}

#endif
