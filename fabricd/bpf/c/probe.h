/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whether this kernel can do what pod_out does with a packet. It is run on one by BPF_PROG_TEST_RUN, and attached nowhere.
 */
#ifndef PROBE_H
#define PROBE_H

#include "pod_out.h"

SECTION("tc/probe") int fabric_probe(struct __sk_buff *skb)
{
	return make_room4(skb) < 0 ? DROP : NEXT;
}

#endif
