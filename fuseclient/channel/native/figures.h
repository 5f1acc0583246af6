/* SPDX-License-Identifier: Apache-2.0 */
/* Figures of the BPF maps, for whoever has their descriptors. All return 0 or a negative errno. */
#ifndef BPFUSE_FIGURES_H
#define BPFUSE_FIGURES_H

#include <stddef.h>
#include <linux/types.h>
#include "abi.h"

int bpfuse_read_control(int control_fd, struct bpfuse_control *out);
/* Adds up over all CPUs: `out` takes BPFUSE_OPCODES * BPFUSE_OUTCOMES counts. */
int bpfuse_read_counters(int counters_fd, __u64 *out);
/* Has requests be counted by inode and process until a time of CLOCK_BOOTTIME. */
int bpfuse_watch(int watched_fd, __u64 until);
struct bpfuse_busy_entry {
	struct bpfuse_busy_key key;
	struct bpfuse_busy value;
};

/* Reads what was counted, in any order: at most `room` entries. Returns how many, or a negative errno. */
int bpfuse_read_busiest(int busiest_fd, struct bpfuse_busy_entry *out, __u32 room);
/* Counts the entries of a hash map one by one: about 0.1 us each. */
int bpfuse_count_entries(int map_fd, __u64 *out);

#endif
