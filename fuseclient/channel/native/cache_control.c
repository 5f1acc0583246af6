// SPDX-License-Identifier: Apache-2.0
/*
 * What the BPF programs read beside the maps' entries: the control page, the counters of open handles; and which inodes have a
 * backing file.
 */
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include "cache_internal.h"

/* The control page */

void bpfuse_cache_set_profile(struct bpfuse_cache *cache, __u32 profile)
{
	__atomic_store_n(&cache->control->profile, profile, __ATOMIC_SEQ_CST);
}

void bpfuse_cache_set_deadline(struct bpfuse_cache *cache, __u64 deadline_ns)
{
	__atomic_store_n(&cache->control->deadline, deadline_ns, __ATOMIC_SEQ_CST);
}

void bpfuse_cache_set_ttl(struct bpfuse_cache *cache, __u64 kernel_ttl_ns)
{
	__atomic_store_n(&cache->control->kernel_ttl_max, kernel_ttl_ns, __ATOMIC_SEQ_CST);
}

void bpfuse_cache_set_statfs(struct bpfuse_cache *cache, const struct bpfuse_statfs *figures)
{
	struct bpfuse_statfs *out = &cache->control->statfs;
	__u32 odd = out->seq | 1; /* it may have been left odd by a worker that died in here */

	__atomic_store_n(&out->seq, odd, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	memcpy(&out->bsize, &figures->bsize, sizeof(*out) - offsetof(struct bpfuse_statfs, bsize));
	__atomic_store_n(&out->seq, odd + 1, __ATOMIC_RELEASE);
}

void bpfuse_cache_bump_epoch(struct bpfuse_cache *cache)
{
	__atomic_store_n(&cache->control->epoch, cache->control->epoch + 1, __ATOMIC_SEQ_CST);
	groups_cool(cache->groups);
	memset(cache->owners, 0, cache->options.page_count * sizeof(*cache->owners));
	memset(cache->stored, 0, BPFUSE_OPEN_SLOTS / 8);
	memset(cache->listed, 0, BPFUSE_OPEN_SLOTS / 8);
	memset(cache->tagged, 0, BPFUSE_OPEN_SLOTS / 8);
	memset(cache->wholes, 0, BPFUSE_OPEN_SLOTS / 8);
}

/* Handles */

__u64 bpfuse_cache_opens(const struct bpfuse_cache *cache, __u64 ino)
{
	return __atomic_load_n(&cache->opens[bpfuse_open_slot(ino)].handles, __ATOMIC_SEQ_CST);
}

/* Counts one less, unless there are none. */
static void count_down(__u32 *counter)
{
	__u32 count = __atomic_load_n(counter, __ATOMIC_RELAXED);

	while (count &&
	       !__atomic_compare_exchange_n(counter, &count, count - 1, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
		;
}

void bpfuse_cache_released(struct bpfuse_cache *cache, __u64 ino)
{
	count_down(&cache->opens[bpfuse_open_slot(ino)].handles);
}

void bpfuse_cache_opened(struct bpfuse_cache *cache, __u64 ino)
{
	__atomic_fetch_add(&cache->opens[bpfuse_open_slot(ino)].handles, 1, __ATOMIC_SEQ_CST);
}

void bpfuse_cache_locked(struct bpfuse_cache *cache, __u64 ino)
{
	__atomic_fetch_add(&cache->opens[bpfuse_open_slot(ino)].locks, 1, __ATOMIC_SEQ_CST);
}

void bpfuse_cache_unlocked(struct bpfuse_cache *cache, __u64 ino)
{
	count_down(&cache->opens[bpfuse_open_slot(ino)].locks);
}

int bpfuse_cache_set_backing(struct bpfuse_cache *cache, __u64 ino, __u32 backing_id)
{
	struct backing *backing = cache_find_backing(cache, ino);

	if (!backing) {
		if (cache->backing_count == BPFUSE_BACKINGS)
			return -ENOSPC;
		backing = &cache->backings[cache->backing_count++];
	}
	*backing = (struct backing){ .ino = ino, .id = backing_id };
	return 0;
}

void bpfuse_cache_forget_backing(struct bpfuse_cache *cache, __u64 ino)
{
	struct backing *backing = cache_find_backing(cache, ino);

	if (backing)
		*backing = cache->backings[--cache->backing_count];
}
struct backing *cache_find_backing(struct bpfuse_cache *cache, __u64 ino)
{
	for (__u32 i = 0; i < cache->backing_count; i++)
		if (cache->backings[i].ino == ino)
			return &cache->backings[i];
	return NULL;
}
