/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Compiled by bcc for `bpfuse trace`: how long the requests of one mount take, from their making to their end, by opcode
 * and by who answered. DEVICE is the minor number of the mount's device; RECENT_SLOTS is of the map `recent` of the
 * program that answers, which stands in `answering` at 0 unless the mount is not accelerated.
 */
#include <uapi/linux/fuse.h>

struct begun {
	u64 at; /* ns */
	u32 opcode;
};

struct kind {
	u32 opcode;
	u32 in_kernel;
};

struct bucket {
	struct kind kind;
	u32 power; /* from 2^power to before 2^(power + 1) ns */
	u32 padding;
};

struct sum {
	u64 count;
	u64 ns;
	u64 longest_ns;
};

BPF_TABLE("lru_hash", u64, struct begun, begun, 65536);
BPF_TABLE("percpu_hash", struct bucket, u64, buckets, 8192);
BPF_TABLE("percpu_hash", struct kind, struct sum, sums, 256);
BPF_TABLE("array", u32, u64, form_of_recent, RECENT_SLOTS);
BPF_ARRAY_OF_MAPS(answering, "form_of_recent", 1);

static inline u32 was_in_kernel(u64 unique)
{
	u32 zero = 0, slot = unique / 2 & (RECENT_SLOTS - 1);
	void *recent = answering.lookup(&zero);
	u64 *recently;

	if (!recent)
		return 0;
	recently = bpf_map_lookup_elem(recent, &slot);
	return recently && *recently == unique;
}

static inline void add(struct kind kind, u64 ns)
{
	struct bucket bucket = { .kind = kind };
	struct sum none = {}, *sum;
	u64 zero = 0, *count;

	bucket.power = ns ? bpf_log2l(ns) - 1 : 0;
	count = buckets.lookup_or_try_init(&bucket, &zero);
	if (count)
		*count += 1;
	sum = sums.lookup_or_try_init(&kind, &none);
	if (!sum)
		return;
	sum->count += 1;
	sum->ns += ns;
	if (ns > sum->longest_ns)
		sum->longest_ns = ns;
}

TRACEPOINT_PROBE(fuse, fuse_request_send)
{
	struct begun request = {};
	u64 unique = args->unique;

	if (args->connection != DEVICE)
		return 0;
	request.at = bpf_ktime_get_ns();
	request.opcode = args->opcode;
	begun.update(&unique, &request);
	return 0;
}

TRACEPOINT_PROBE(fuse, fuse_request_end)
{
	u64 unique = args->unique;
	struct begun *request;
	struct kind kind = {};

	if (args->connection != DEVICE)
		return 0;
	request = begun.lookup(&unique);
	if (!request)
		return 0;
	kind.opcode = request->opcode;
	kind.in_kernel = was_in_kernel(unique);
	add(kind, bpf_ktime_get_ns() - request->at);
	begun.delete(&unique);
	return 0;
}
