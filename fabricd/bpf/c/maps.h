/* SPDX-License-Identifier: Apache-2.0 */
/* The maps, by the names that src/abi/ describes. */
#ifndef MAPS_H
#define MAPS_H

#include "fabric.h"
#include "kernel.h"

MAP(config);
MAP(peer_index4);
MAP(peer_index6);
MAP(peers);
MAP(pod_index4);
MAP(pod_index6);
MAP(pods);
MAP(nat_bits0);
MAP(nat_bits1);
MAP(nat_current);
MAP(slow_flows);
MAP(slow_pods);
MAP(counters);
MAP(peer_counters);

INLINE void count(enum program program, enum reason reason)
{
	__u32 key = REASONS * program + reason;
	__u64 *counter = map_lookup(&counters, &key);

	if (counter)
		*counter += 1;
}

INLINE __u32 number_in(void *map, const void *key)
{
	const __u32 *value = map_lookup(map, key);

	return value ? *value : 0;
}

#endif
