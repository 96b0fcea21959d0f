/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Keys and values of the maps, as programs and fabricd share them. src/abi/ says the same in Rust and has the words for
 * each field; a test compares the two line by line. Whoever changes anything here, names and order included, raises
 * LAYOUT there.
 *
 * Numbers are in the order of this machine. What is only compared with a packet, or copied into one, is bytes.
 * An index or slot of 0 is nobody's: arrays are zero until somebody writes to them.
 */
#ifndef FABRIC_H
#define FABRIC_H

#include <linux/bpf.h>

#define SIZE(type, size) _Static_assert(sizeof(struct type) == size, #type)
#define FIELD(type, field, offset) _Static_assert(__builtin_offsetof(struct type, field) == offset, #type "." #field)

/* config.flags */
#define CONFIG_IPV4 1
#define CONFIG_IPV6 2
#define CONFIG_GUARD 4

struct config {
	__u32 flags;
	__u8 vni[4];
	__u32 network4;
	__u32 network4_mask;
	__u32 own4;
	__u32 own4_mask;
	__u32 subnet4_shift;
	__u32 subnet6_shift;
	__u64 network6[2];
	__u64 network6_mask[2];
	__u64 own6[2];
	__u64 own6_mask[2];
	__u8 local4[4];
	__u8 port[2];
	__u8 reserved[2];
	__u8 local6[16];
	__u8 vtep4[6];
	__u8 reserved4[2];
	__u8 vtep6[6];
	__u8 reserved6[2];
};
SIZE(config, 136);
FIELD(config, flags, 0);
FIELD(config, vni, 4);
FIELD(config, network4, 8);
FIELD(config, network4_mask, 12);
FIELD(config, own4, 16);
FIELD(config, own4_mask, 20);
FIELD(config, subnet4_shift, 24);
FIELD(config, subnet6_shift, 28);
FIELD(config, network6, 32);
FIELD(config, network6_mask, 48);
FIELD(config, own6, 64);
FIELD(config, own6_mask, 80);
FIELD(config, local4, 96);
FIELD(config, port, 100);
FIELD(config, local6, 104);
FIELD(config, vtep4, 120);
FIELD(config, vtep6, 128);

/* peer.flags */
#define PEER_DIRECT 1
#define PEER_NEXTHOP_IPV6 2

/* Where things are in peer.template: outer Ethernet, IPv4, UDP, VXLAN, and the Ethernet header inside. */
#define TEMPLATE_IP 14
#define TEMPLATE_UDP 34
#define TEMPLATE_VXLAN 42
#define TEMPLATE_INNER 50
#define TEMPLATE_SIZE 64

struct peer {
	__u32 flags;
	__u32 ifindex;
	__u32 mtu;
	__u32 template_sum;
	__u8 underlay[16];
	__u8 former[16];
	__u8 nexthop[16];
	__u8 template[TEMPLATE_SIZE];
};
SIZE(peer, 128);
FIELD(peer, flags, 0);
FIELD(peer, ifindex, 4);
FIELD(peer, mtu, 8);
FIELD(peer, template_sum, 12);
FIELD(peer, underlay, 16);
FIELD(peer, former, 32);
FIELD(peer, nexthop, 48);
FIELD(peer, template, 64);

/* pod.flags */
#define POD_FAST 1

struct pod {
	__u32 ifindex;
	__u32 flags;
	__u32 mtu;
	__u8 mac[6];
	__u8 reserved[2];
	__u8 gateway[6];
	__u8 reserved_gateway[2];
};
SIZE(pod, 28);
FIELD(pod, ifindex, 0);
FIELD(pod, flags, 4);
FIELD(pod, mtu, 8);
FIELD(pod, mac, 12);
FIELD(pod, gateway, 20);

struct address6 {
	__u8 bytes[16];
};
SIZE(address6, 16);
FIELD(address6, bytes, 0);

struct flow {
	__u8 source[16];
	__u8 destination[16];
	__u8 source_port[2];
	__u8 destination_port[2];
	__u8 protocol;
	__u8 reserved[3];
};
SIZE(flow, 40);
FIELD(flow, source, 0);
FIELD(flow, destination, 16);
FIELD(flow, source_port, 32);
FIELD(flow, destination_port, 34);
FIELD(flow, protocol, 36);

struct traffic {
	__u64 sent_packets;
	__u64 sent_bytes;
	__u64 received_packets;
	__u64 received_bytes;
};
SIZE(traffic, 32);
FIELD(traffic, sent_packets, 0);
FIELD(traffic, sent_bytes, 8);
FIELD(traffic, received_packets, 16);
FIELD(traffic, received_bytes, 24);

/* A bit of nat_bits: for each slot of a pod 1,024 words of TCP's ports and then as many of UDP's. */
#define NAT_WORDS_OF_PROTOCOL 1024
#define NAT_WORDS_OF_POD 2048

/* An entry of counters is REASONS * program + reason. */
#define REASONS 32

enum program {
	POD_OUT = 0,
	WIRE_IN = 1,
	POD_IN = 2,
	WIRE_OUT = 3,
};

enum reason {
	FAST_TUNNEL = 0,
	FAST_DEVICE = 1,
	FAST_DIRECT = 2,
	FAST_SAME_NODE = 3,
	SLOW_NOT_IP = 4,
	SLOW_TRUNCATED = 5,
	SLOW_OPTIONS = 6,
	SLOW_FRAGMENT = 7,
	SLOW_PROTOCOL = 8,
	SLOW_TTL = 9,
	SLOW_TOO_LARGE = 10,
	SLOW_CONGESTION = 11,
	SLOW_SENDER = 12,
	SLOW_POD_OFF = 13,
	SLOW_MAC = 14,
	SLOW_NOT_A_POD = 15,
	SLOW_NAT = 16,
	SLOW_FLOW = 17,
	SLOW_TUNNEL_PORT = 18,
	SLOW_NO_ROUTE = 19,
	SLOW_VNI = 20,
	SLOW_CHECKSUM = 21,
	SLOW_REFUSED = 22,
	SLOW_RECORDED = 23,
	DROPPED_REWRITE = 24,
};

#endif
