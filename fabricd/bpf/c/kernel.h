/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the programs need of the kernel: helpers by their numbers (enum bpf_func_id in linux/bpf.h), none of which asks for
 * a licence, and what the packet's headers look like.
 */
#ifndef KERNEL_H
#define KERNEL_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#define SECTION(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(8)))
#define likely(condition) __builtin_expect(!!(condition), 1)
#define unlikely(condition) __builtin_expect(!!(condition), 0)

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "fabricd's kernels are little endian");
#define net16(value) ((__u16)__builtin_bswap16(value))
#define net32(value) ((__u32)__builtin_bswap32(value))
#define net64(value) ((__u64)__builtin_bswap64(value))

/*
 * On to the next program of the hook and to the rest of the kernel: TCX_NEXT (since 6.6), TC_ACT_UNSPEC (clsact before). 0
 * would end the chain and cut off programs of others.
 */
#define NEXT (-1)
/* TCX_DROP, TC_ACT_SHOT. */
#define DROP 2

/* Of the packet's kinds (linux/if_packet.h), that for this host. */
#define PACKET_HOST 0
/* Families of a next hop (sys/socket.h). */
#define FAMILY_IPV4 2
#define FAMILY_IPV6 10

static void *(*const map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*const map_update)(void *map, const void *key, const void *value,
				__u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*const store_bytes)(struct __sk_buff *skb, __u32 offset, const void *from, __u32 length,
				 __u64 flags) = (void *)BPF_FUNC_skb_store_bytes;
static long (*const pull_data)(struct __sk_buff *skb, __u32 length) = (void *)BPF_FUNC_skb_pull_data;
static long (*const adjust_room)(struct __sk_buff *skb, __s32 difference, __u32 mode,
				 __u64 flags) = (void *)BPF_FUNC_skb_adjust_room;
static long (*const change_type)(struct __sk_buff *skb, __u32 type) = (void *)BPF_FUNC_skb_change_type;
static __u32 (*const get_hash)(struct __sk_buff *skb) = (void *)BPF_FUNC_get_hash_recalc;
static __u64 (*const coarse_time)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static long (*const redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*const redirect_peer)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect_peer;
static long (*const redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *nexthop, int size,
				    __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

/* struct ethhdr is packed, so every field of it would be read byte by byte. IP headers behind it are just as unaligned. */
struct ethernet {
	__u8 destination[ETH_ALEN];
	__u8 source[ETH_ALEN];
	__u16 protocol;
};
_Static_assert(sizeof(struct ethernet) == ETH_HLEN, "ethernet");

/*
 * Maps are made by fabricd, which knows their layouts. Here they are names: the loader puts the descriptors in.
 */
struct map {
	char none;
};
#define MAP(name) struct map name SECTION(".maps")

#endif
