/* SPDX-License-Identifier: Apache-2.0 */
/* Reading headers, and where addresses lead. Reads are direct, writes go by store_bytes: it copies no more than it must. */
#ifndef PACKET_H
#define PACKET_H

#include "maps.h"

/* Ethernet, IP and the first bytes of TCP or UDP. */
#define HEADERS4_UDP (ETH_HLEN + sizeof(struct iphdr) + sizeof(struct udphdr))
#define HEADERS4_TCP (ETH_HLEN + sizeof(struct iphdr) + sizeof(struct tcphdr))
#define HEADERS6_UDP (ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct udphdr))
#define HEADERS6_TCP (ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct tcphdr))

/* Flags and offset of a fragment (RFC 791), in network order. */
#define FRAGMENT net16(0x3fff)
#define FRAGMENT_OFFSET net16(0x1fff)

/* Congestion (RFC 3168 section 5). */
#define ECN_MASK 3
#define ECN_NOT_CAPABLE 0
#define ECN_CAPABLE1 1
#define ECN_CAPABLE0 2
#define ECN_EXPERIENCED 3

struct ports {
	__u16 source;
	__u16 destination;
};

INLINE const struct config *node_config(void)
{
	__u32 key = 0;

	return map_lookup(&config, &key);
}

/* Has the first `length` bytes, or all of a shorter packet, where they can be read. */
INLINE void make_readable(struct __sk_buff *skb, __u32 length)
{
	__u32 wanted = skb->len < length ? skb->len : length;

	if (unlikely((__u64)skb->data_end - (__u64)skb->data < wanted))
		pull_data(skb, wanted);
}

INLINE void *at(const struct __sk_buff *skb, __u32 offset)
{
	return (void *)(long)skb->data + offset;
}

/* Whether the first `length` bytes can be read. */
INLINE int has(const struct __sk_buff *skb, __u32 length)
{
	return at(skb, length) <= (void *)(long)skb->data_end;
}

/* The same of `length` bytes at a pointer that isn't always at one place: the verifier goes by the pointer. */
INLINE int has_at(const struct __sk_buff *skb, const void *pointer, __u32 length)
{
	return pointer + length <= (void *)(long)skb->data_end;
}

INLINE int is_mac(const __u8 *packet, const __u8 *mac)
{
	return *(const __u32 *)packet == *(const __u32 *)mac && *(const __u16 *)(packet + 4) == *(const __u16 *)(mac + 4);
}

/* A sum of sixteen-bit words (RFC 1071). */
INLINE __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* The checksum of a header in which one word became another (RFC 1624, equation 3). */
INLINE __u16 updated(__u16 checksum, __u16 before, __u16 after)
{
	return ~fold((__u16)~checksum + (__u16)~before + after);
}

INLINE void set_ttl4(struct iphdr *ip, __u8 ttl)
{
	/* The word of time to live and protocol, the first in the lower byte. */
	ip->check = updated(ip->check, ip->ttl, ttl);
	ip->ttl = ttl;
}

INLINE void set_tos4(struct iphdr *ip, __u8 tos)
{
	ip->check = updated(ip->check, (__u16)ip->tos << 8, (__u16)tos << 8);
	ip->tos = tos;
}

/* What the programs want to know of a packet between pods. */
struct packet {
	/* Bytes from the IP header on, and how many of them are headers. */
	__u32 length;
	__u32 headers;
	/* In network order. */
	__u16 source_port;
	__u16 destination_port;
	__u8 is_udp;
};

/*
 * What is asked of a packet answers FINE, or a reason for the kernel's path as a negative number. So does what sends it on,
 * whose other answers are verdicts.
 */
#define FINE 0
/* For the kernel's path, without counting: none of ours. */
#define NOT_OURS (-REASONS)

/* What the program answers the kernel. */
INLINE int answer(enum program program, int verdict)
{
	if (likely(verdict >= 0))
		return verdict;
	if (verdict != NOT_OURS)
		count(program, -verdict);
	return NEXT;
}

/* TCP or UDP at `offset`, behind an IP header of `header` bytes. */
INLINE int look_transport(struct __sk_buff *skb, __u32 offset, __u32 header, __u8 protocol, struct packet *packet)
{
	struct tcphdr *tcp = at(skb, offset);
	struct ports *ports = at(skb, offset);

	packet->is_udp = protocol == IPPROTO_UDP;
	packet->headers = header + (packet->is_udp ? sizeof(struct udphdr) : sizeof(*tcp));
	if (packet->length < packet->headers)
		return -SLOW_TRUNCATED;
	if (!packet->is_udp) {
		if (!has(skb, offset + sizeof(*tcp)))
			return -SLOW_TRUNCATED;
		packet->headers = header + tcp->doff * 4;
	} else if (!has(skb, offset + sizeof(struct udphdr))) {
		return -SLOW_TRUNCATED;
	}
	packet->source_port = ports->source;
	packet->destination_port = ports->destination;
	return FINE;
}

/* Looks at a whole IPv4 packet, whose header is at `offset` and was seen to be complete. */
INLINE int look4(struct __sk_buff *skb, __u32 offset, const struct iphdr *ip, struct packet *packet)
{
	if (unlikely(ip->ihl != 5))
		return -SLOW_OPTIONS;
	if (unlikely(ip->frag_off & FRAGMENT))
		return -SLOW_FRAGMENT;
	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
		return -SLOW_PROTOCOL;
	packet->length = net16(ip->tot_len);
	return look_transport(skb, offset + sizeof(*ip), sizeof(*ip), ip->protocol, packet);
}

/* The same of IPv6. */
INLINE int look6(struct __sk_buff *skb, __u32 offset, const struct ipv6hdr *ip, struct packet *packet)
{
	switch (ip->nexthdr) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
		packet->length = sizeof(*ip) + net16(ip->payload_len);
		return look_transport(skb, offset + sizeof(*ip), sizeof(*ip), ip->nexthdr, packet);
	case IPPROTO_FRAGMENT:
		return -SLOW_FRAGMENT;
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_DSTOPTS:
		return -SLOW_OPTIONS;
	default:
		return -SLOW_PROTOCOL;
	}
}

/* Whether it, or each segment that it will be cut into, is no larger than `mtu`. */
INLINE int fits(const struct __sk_buff *skb, const struct packet *packet, __u32 mtu)
{
	__u32 segment = skb->gso_size;

	return (segment ? segment + packet->headers : packet->length) <= mtu;
}

/* IPv4: the slot of the peer that has this address, 0 if none. */
INLINE __u32 peer_of4(const struct config *node, __u32 address)
{
	__u32 number;

	if ((address & node->network4_mask) != node->network4)
		return 0;
	number = (address - node->network4) >> (node->subnet4_shift & 31);
	return number_in(&peer_index4, &number);
}

INLINE int is_own4(const struct config *node, __u32 address)
{
	return (address & node->own4_mask) == node->own4;
}

/* IPv4: the slot of the pod of this node that has this address, 0 if none. */
INLINE __u32 pod_of4(const struct config *node, __u32 address)
{
	__u32 number = address & ~node->own4_mask;

	return number_in(&pod_index4, &number);
}

INLINE int is_within6(const struct in6_addr *address, const __u64 *network, const __u64 *mask)
{
	const __u64 *halves = (const __u64 *)address;

	return (net64(halves[0]) & mask[0]) == network[0] && (net64(halves[1]) & mask[1]) == network[1];
}

INLINE int is_own6(const struct config *node, const struct in6_addr *address)
{
	return is_within6(address, node->own6, node->own6_mask);
}

/* IPv6: the slot of the peer that has this address, 0 if none. Numbers of more than 32 bits are nobody's. */
INLINE __u32 peer_of6(const struct config *node, const struct in6_addr *address)
{
	const __u64 *halves = (const __u64 *)address;
	__u64 upper = net64(halves[0]) - node->network6[0];
	__u64 lower = net64(halves[1]);
	__u32 shift = node->subnet6_shift;
	__u64 number;
	__u32 key;

	if (!is_within6(address, node->network6, node->network6_mask))
		return 0;
	/* The network's first address ends in zeros, so nothing is borrowed from the upper half. */
	lower -= node->network6[1];
	if (shift >= 64)
		number = upper >> (shift & 63);
	else if (shift == 0 || upper >> 32)
		return 0;
	else
		number = upper << (64 - shift) | lower >> shift;
	if (number >> 32)
		return 0;
	key = number;
	return number_in(&peer_index6, &key);
}

/* IPv6: the slot of the pod of this node that has this address, 0 if none. */
INLINE __u32 pod_of6(const struct in6_addr *address)
{
	struct address6 key ALIGNED;

	__builtin_memcpy(key.bytes, address, sizeof(key.bytes));
	return number_in(&pod_index6, &key);
}

/* A peer, and what is counted for it. */
struct way {
	const struct peer *peer;
	struct traffic *traffic;
};

INLINE int find_way(__u32 slot, struct way *way)
{
	way->peer = map_lookup(&peers, &slot);
	way->traffic = map_lookup(&peer_counters, &slot);
	return slot && way->peer && way->traffic;
}

INLINE void map_address4(__u8 *mapped, __u32 address)
{
	__builtin_memset(mapped, 0, 10);
	__builtin_memset(mapped + 10, 0xff, 2);
	__builtin_memcpy(mapped + 12, &address, sizeof(address));
}

#endif
