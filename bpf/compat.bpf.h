/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Differences of kernels and processors, each in one place.
 *
 * Tracepoint io_uring_complete: (ctx, req, cqe) since Linux 6.15; (ctx, req, user_data, res, cflags, extra1, extra2)
 * before, which may go when 6.14 needs no support. answer.bpf.c has a program for each, and the loader loads the one
 * that fits the kernel's BTF.
 */
#ifndef BPFUSE_COMPAT_BPF_H
#define BPFUSE_COMPAT_BPF_H

#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#define READ_ONCE(x)         (*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile __typeof__(x) *)&(x) = (value))

/* Keeps loads before it ahead of loads after it. BPF has no load barrier: where the processor needs one, an atomic
 * operation that returns a value, which is a full barrier, stands in for it. */
static __always_inline void read_barrier(void)
{
#if defined(__TARGET_ARCH_x86)
	barrier();
#else
	__u64 word = 0, old;

	barrier();
	old = __sync_fetch_and_add(&word, 1);
	barrier_var(old);
	barrier();
#endif
}

/* The kernel's; libbpf compares the kinds of types, so it must be a whole one. */
struct bpf_map {
	__u32 id;
} __attribute__((preserve_access_index));

/* Kernel function since Linux 6.6; a null call is never made: the loader leaves count_maps out without it. */
extern __s64 bpf_map_sum_elem_count(const struct bpf_map *map) __ksym __weak;

#endif
