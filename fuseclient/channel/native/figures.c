// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include "abi.h"
#include "figures.h"
#include "map_walk.h"

enum { COUNTERS = BPFUSE_OPCODES * BPFUSE_OUTCOMES };

int bpfuse_read_control(int control_fd, struct bpfuse_control *out)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(control_fd, &zero, out);
}

static void add_up(const __u32 *indices, const __u64 *values, __u32 count, int cpus, __u64 *out)
{
	memset(out, 0, COUNTERS * sizeof(*out));
	for (__u32 i = 0; i < count; i++)
		for (int cpu = 0; cpu < cpus; cpu++)
			out[indices[i]] += values[(size_t)i * cpus + cpu];
}

int bpfuse_read_counters(int counters_fd, __u64 *out)
{
	int cpus = libbpf_num_possible_cpus();
	__u32 indices[COUNTERS], position, count = COUNTERS;
	__u64 *values;
	int result;

	if (cpus < 0)
		return cpus;
	values = malloc((size_t)COUNTERS * cpus * sizeof(*values));
	if (!values)
		return -ENOMEM;
	result = bpf_map_lookup_batch(counters_fd, NULL, &position, indices, values, &count, NULL);
	if (!result || result == -ENOENT) {
		add_up(indices, values, count, cpus, out);
		result = 0;
	}
	free(values);
	return result;
}

int bpfuse_watch(int watched_fd, __u64 until)
{
	__u32 zero = 0;

	return bpf_map_update_elem(watched_fd, &zero, &until, BPF_ANY);
}

struct busy_reader {
	struct bpfuse_busy_entry *out;
	__u32 room, count;
};

static void read_one(void *context, const void *key, const void *value)
{
	struct busy_reader *reader = context;
	struct bpfuse_busy_entry *entry = &reader->out[reader->count];

	if (reader->count == reader->room)
		return;
	memcpy(&entry->key, key, sizeof(entry->key));
	memcpy(&entry->value, value, sizeof(entry->value));
	reader->count++;
}

int bpfuse_read_busiest(int busiest_fd, struct bpfuse_busy_entry *out, __u32 room)
{
	struct busy_reader reader = { .out = out, .room = room };
	int result = bpfuse_map_walk(busiest_fd, read_one, &reader);

	return result ? result : (int)reader.count;
}

static void count_one(void *context, const void *key, const void *value)
{
	(void)key;
	(void)value;
	++*(__u64 *)context;
}

int bpfuse_count_entries(int map_fd, __u64 *out)
{
	*out = 0;
	return bpfuse_map_walk(map_fd, count_one, out);
}
