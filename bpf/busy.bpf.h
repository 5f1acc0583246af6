/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Who makes requests, and for which inodes: counted only while somebody watches (`bpfuse top`). */
#ifndef BPFUSE_BUSY_BPF_H
#define BPFUSE_BUSY_BPF_H

#include "maps.bpf.h"
#include "request.bpf.h"

static void count_busy(__u64 id, __u32 kind, bool answered)
{
	struct bpfuse_busy_key key = { .id = id, .kind = kind };
	struct bpfuse_busy none = {}, *busy = bpf_map_lookup_elem(&busiest, &key);

	if (!busy) {
		/* If it is full the least recent goes; if another CPU was first, that one's is found. */
		bpf_map_update_elem(&busiest, &key, &none, BPF_NOEXIST);
		busy = bpf_map_lookup_elem(&busiest, &key);
		if (!busy)
			return;
	}
	__sync_fetch_and_add(&busy->requests, 1);
	if (answered)
		__sync_fetch_and_add(&busy->answered, 1);
}

static void watch(const struct request *request, __u32 process, bool answered)
{
	__u32 zero = 0;
	const __u64 *until = bpf_map_lookup_elem(&watched, &zero);

	if (!until || READ_ONCE(*until) <= request->now)
		return;
	count_busy(request->nodeid, BPFUSE_BUSY_INODE, answered);
	count_busy(process, BPFUSE_BUSY_PROCESS, answered);
}

#endif
