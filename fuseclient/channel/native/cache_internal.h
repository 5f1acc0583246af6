/* SPDX-License-Identifier: Apache-2.0 */
/* The state of the worker's side of the kernel cache, which cache_fill.c and cache_evict.c share. */
#ifndef BPFUSE_CACHE_INTERNAL_H
#define BPFUSE_CACHE_INTERNAL_H

#include <stdbool.h>
#include <linux/types.h>
#include "abi.h"
#include "cache_fill.h"
#include "groups.h"

/* Inode values that are collected to be put by one call. */
struct inode_batch {
	__u32 count;
	__u64 keys[BPFUSE_BATCH];
	struct bpfuse_inode_value values[BPFUSE_BATCH];
};

struct backing {
	__u64 ino;
	__u32 id;
};

struct bpfuse_cache {
	struct bpfuse_cache_options options;
	struct bpfuse_control *control;
	__u8 *pages;
	struct bpfuse_open_slot *opens;
	__u64 *uses;
	struct groups *groups;
	__u32 group;        /* that is being filled */
	__u64 batch_serial; /* of the groups: those above it belong to the batch at hand */
	struct {
		__u64 *keys;
		size_t count, room;
		bool lost; /* some are not told of */
	} evicted;
	__u64 *owners;     /* by page */
	__u8 *listed;      /* a bit by slot of `opens`: directories there may have a listing, */
	__u8 *tagged;      /* and inodes there may be in `xattrs`, */
	__u8 *wholes;      /* and directories there may be marked as whole */
	__u32 *losses;     /* by slot of directories: names that were taken from the map, or not put into it */
	__u64 version;     /* the last one used */
	__u32 batch_pages; /* how far the cursor went for the batch at hand */
	__u32 batch_epoch; /* when its pages were taken; a new epoch frees them */
	struct bpfuse_cache_figures figures;
	struct backing backings[BPFUSE_BACKINGS];
	__u32 backing_count;
	struct bpfuse_record records[BPFUSE_BATCH];
	struct inode_batch inodes;
	struct inode_batch overtaken;
	struct bpfuse_name_key name_keys[BPFUSE_BATCH];
	struct bpfuse_name_value name_values[BPFUSE_BATCH];
};

/* Deletes a key from a map that is not `names`; raises the epoch if that cannot be done. */
void cache_drop(struct bpfuse_cache *cache, int fd, const void *key);
/* Deletes a name, and before it the mark that its directory is whole. */
void cache_drop_name(struct bpfuse_cache *cache, const struct bpfuse_name_key *key);
/* Drops what is in `xattrs` of an inode. */
void cache_drop_xattrs(struct bpfuse_cache *cache, __u64 ino);
/* The group that entries of a directory (0: inodes without names) go to from now on. */
void cache_open_group(struct bpfuse_cache *cache, __u64 directory);
/* An entry is put as one of the group that is open; `hash` NULL: an inode without a name. */
void cache_join_group(struct bpfuse_cache *cache, const __u64 *hash, __u64 ino);

/* What there is no room in. */
enum cache_full { FULL_NAMES, FULL_INODES, FULL_GROUPS, FULL_MEMBERS };

/* Makes room by giving up the coldest groups; false if there is nothing to be given up. */
bool cache_evict(struct bpfuse_cache *cache, enum cache_full full);

#endif
