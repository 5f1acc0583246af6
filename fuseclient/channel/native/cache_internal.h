/* SPDX-License-Identifier: Apache-2.0 */
/* The state of the worker's side of the kernel cache, and what the files that work on it (cache_*.c) share. */
#ifndef BPFUSE_CACHE_INTERNAL_H
#define BPFUSE_CACHE_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <linux/types.h>
#include "abi.h"
#include "cache_fill.h"
#include "groups.h"
#include "hash.h"

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
	__u8 *stored;      /* a bit by slot of `opens`: inodes there may have pages, */
	__u8 *listed;      /* and directories there may have a listing, */
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

/* Marks of inodes, a bit by slot: there may be something, or is nothing. */
static inline void cache_mark(__u8 *marks, __u64 ino)
{
	__u32 slot = bpfuse_open_slot(ino);

	marks[slot / 8] |= 1 << slot % 8;
}

static inline bool cache_is_marked(const __u8 *marks, __u64 ino)
{
	__u32 slot = bpfuse_open_slot(ino);

	return marks[slot / 8] >> slot % 8 & 1;
}

static inline __u32 cache_pages_of(__u32 bytes)
{
	return (bytes + BPFUSE_PAGE - 1) / BPFUSE_PAGE;
}

static inline size_t cache_pages_size(const struct bpfuse_cache *cache)
{
	return (size_t)cache->options.page_count * BPFUSE_PAGE;
}

/* What is put from here on is given up last, to make room for the rest of it. */
static inline void cache_begin_batch(struct bpfuse_cache *cache)
{
	cache->batch_serial = groups_serial(cache->groups);
}

/* Entries of any map (cache_fill.c) */

/* Puts `count` values; what is refused is dropped and counted. */
void cache_put_all(struct bpfuse_cache *cache, int fd, const void *keys, size_t key_size, const void *values,
		   size_t value_size, __u32 count);
/* Deletes a key from a map that is not `names`; raises the epoch if that cannot be done. */
void cache_drop(struct bpfuse_cache *cache, int fd, const void *key);
/* A deletion had this result; raises the epoch if it failed. */
void cache_deleted(struct bpfuse_cache *cache, int result);

/* Inodes (cache_fill.c) */

void cache_put_inode(struct bpfuse_cache *cache, __u64 ino, struct bpfuse_inode_value *value);
/* Puts what is collected. */
void cache_put_inodes(struct bpfuse_cache *cache, struct inode_batch *batch);
/*
 * Moves the cursor over `count` pages for `ino`; false if this batch has been once around the ring. Who had them is
 * collected in `overtaken`, and to be put before they are written.
 */
bool cache_take_pages(struct bpfuse_cache *cache, __u64 ino, __u32 count, __u32 *first);
/* Drops what is in `xattrs` of an inode. */
void cache_drop_xattrs(struct bpfuse_cache *cache, __u64 ino);
/* What is known of an inode's backing file, or NULL (cache_control.c). */
struct backing *cache_find_backing(struct bpfuse_cache *cache, __u64 ino);

/* Names (cache_names.c) */

/* `names` is about to be changed, and was. A worker that died between them left the number odd. */
void cache_begin_names(struct bpfuse_cache *cache);
void cache_end_names(struct bpfuse_cache *cache);
/* Fills in the name at `index` of those that cache_put_names() puts. */
void cache_fill_name(struct bpfuse_cache *cache, __u32 index, __u64 parent, const __u8 *name, __u32 length, __u64 ino);
void cache_put_names(struct bpfuse_cache *cache, __u32 count);
/* For bpfuse_map_walk(): an entry of `names` that another worker left. `context` is the cache. */
void cache_take_over_name(void *context, const void *key, const void *value);
/* Deletes a name, and before it the mark that its directory is whole. */
void cache_drop_name(struct bpfuse_cache *cache, const struct bpfuse_name_key *key);

/* Groups (cache_evict.c) */

/* The group that entries of a directory (0: inodes without names) go to from now on. */
void cache_open_group(struct bpfuse_cache *cache, __u64 directory);
/* An entry is put as one of the group that is open; `hash` NULL: an inode without a name. */
void cache_join_group(struct bpfuse_cache *cache, const __u64 *hash, __u64 ino);

/* What there is no room in. */
enum cache_full { FULL_NAMES, FULL_INODES, FULL_GROUPS, FULL_MEMBERS };

/* Makes room by giving up the coldest groups; false if there is nothing to be given up. */
bool cache_evict(struct bpfuse_cache *cache, enum cache_full full);

#endif
