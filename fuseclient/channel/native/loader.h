/* SPDX-License-Identifier: Apache-2.0 */
/* Loading of the BPF object: sizes its maps, loads it, runs its syscall programs, attaches the tracepoint. */
#ifndef BPFUSE_LOADER_H
#define BPFUSE_LOADER_H

#include <stddef.h>
#include <linux/types.h>

struct bpfuse_bpf;

struct bpfuse_bpf_options {
	const char *object_path;
	__u32 name_capacity, inode_capacity, page_count, ring_entries;
};

/* All return 0 (or a descriptor) or a negative errno; `error` then holds one line for the user. */
int bpfuse_bpf_open(struct bpfuse_bpf **out, const struct bpfuse_bpf_options *options, char *error, size_t error_size);
int bpfuse_bpf_map_fd(const struct bpfuse_bpf *bpf, const char *map);
/* The number that a map has on this machine, and a descriptor of the caller's own for a map of such a number. */
int bpfuse_bpf_map_id(const struct bpfuse_bpf *bpf, const char *map, __u32 *id);
int bpfuse_map_open(__u32 id);
/* The descriptor of a program, for another process to run; it belongs to `bpf`. */
int bpfuse_bpf_program_fd(const struct bpfuse_bpf *bpf, const char *program);
/* Runs a program of type syscall with `context` in and out; returns what it returned. */
int bpfuse_bpf_run(const struct bpfuse_bpf *bpf, const char *program, void *context, size_t size);
int bpfuse_bpf_run_fd(int program, void *context, size_t size);
/* Makes the calling process the owner whose ring completions are answered, and attaches the tracepoint program. */
int bpfuse_bpf_attach(struct bpfuse_bpf *bpf);
void bpfuse_bpf_close(struct bpfuse_bpf *bpf);

#endif
