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

INLINE void *packet_end(const struct __sk_buff *skb)
{
	return (void *)(long)skb->data_end;
}

/* The bytes from `offset` to `offset + size`, if the packet has them. */
#define AT(skb, offset, size)                                                                                          \
	({                                                                                                             \
		void *at = (void *)(long)(skb)->data + (offset);                                                       \
		at + (size) > packet_end(skb) ? (void *)0 : at;                                                        \
	})

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
	struct address6 key;

	__builtin_memcpy(key.bytes, address, sizeof(key.bytes));
	return number_in(&pod_index6, &key);
}

INLINE void map_address4(__u8 *mapped, __u32 address)
{
	__builtin_memset(mapped, 0, 10);
	__builtin_memset(mapped + 10, 0xff, 2);
	__builtin_memcpy(mapped + 12, &address, sizeof(address));
}

#endif
