// SPDX-License-Identifier: Apache-2.0
/*
 * What is given up when `names` or `inodes` is full: whole groups, those first that nobody has asked for the longest, as BPF
 * programs and the worker have noted; as many as leave some room, because ranking them takes a while. What a group
 * remembers, and another has put anew, stays. Groups that the batch at hand belongs to stay, too: a value that says a group
 * which is no more would never be given up.
 */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <stdlib.h>
#include <string.h>
#include "cache_internal.h"

enum {
	ROOM_SHARE = 32,    /* this part of the capacity is made free at once */
	MEMBERS_FACTOR = 3, /* members remembered at most, by the capacity: most may be of entries that are gone */
	FIRST_EVICTED = 1024,
	MOST_EVICTED = 1 << 20, /* keys that wait to be taken; more are lost, which is told */
};

static void tell(struct bpfuse_cache *cache, __u64 key)
{
	size_t room = cache->evicted.room ? 2 * cache->evicted.room : FIRST_EVICTED;
	__u64 *keys;

	if (cache->evicted.count == cache->evicted.room) {
		keys = room > MOST_EVICTED ? NULL : realloc(cache->evicted.keys, room * sizeof(*keys));
		if (!keys) {
			cache->evicted.lost = true;
			return;
		}
		cache->evicted.keys = keys;
		cache->evicted.room = room;
	}
	cache->evicted.keys[cache->evicted.count++] = key;
}

static bool evict_name(struct bpfuse_cache *cache, __u32 slot, __u64 directory, const struct member *member)
{
	struct bpfuse_name_key key = { .parent = directory, .hash = { member->hash[0], member->hash[1] } };
	struct bpfuse_name_value value;

	if (bpf_map_lookup_elem(cache->options.names_fd, &key, &value) || value.group != slot)
		return false;
	cache_drop_name(cache, &key);
	return true;
}

static bool evict_inode(struct bpfuse_cache *cache, __u32 slot, __u64 ino)
{
	struct bpfuse_inode_value value;

	if (!ino)
		return false;
	if (bpf_map_lookup_elem(cache->options.inodes_fd, &ino, &value)) {
		tell(cache, ino);
		return false;
	}
	if (value.group != slot)
		return false;
	cache_drop(cache, cache->options.inodes_fd, &ino);
	cache_drop_xattrs(cache, ino);
	tell(cache, ino);
	return true;
}

static size_t most_members(const struct bpfuse_cache *cache)
{
	return MEMBERS_FACTOR * (size_t)cache->options.capacity + BPFUSE_BATCH;
}

/* Counts what has gone from each map, and groups. */
struct gone {
	__u32 names, inodes, groups;
};

static void evict_group(struct bpfuse_cache *cache, __u32 slot, struct gone *gone)
{
	const struct group *group = groups_get(cache->groups, slot);
	struct gone before = *gone;
	__u64 directory = group->directory;

	if (directory)
		bpfuse_cache_drop_whole(cache, directory);
	for (__u32 i = 0; i < group->count; i++) {
		if (directory)
			gone->names += evict_name(cache, slot, directory, &group->members[i]);
		gone->inodes += evict_inode(cache, slot, group->members[i].ino);
	}
	groups_remove(cache->groups, slot);
	gone->groups++;
	if (directory && !groups_newest(cache->groups, directory))
		tell(cache, directory | 1ULL << BPFUSE_EVICTED_DIRECTORY_BIT);
	cache->figures.evicted_groups++;
	cache->figures.evicted_entries += gone->names - before.names + gone->inodes - before.inodes;
}

static bool is_enough(const struct bpfuse_cache *cache, enum cache_full full, const struct gone *gone, __u32 wanted)
{
	switch (full) {
	case FULL_NAMES:
		return gone->names >= wanted;
	case FULL_INODES:
		return gone->inodes >= wanted;
	case FULL_GROUPS:
		return gone->groups >= wanted;
	default:
		return groups_members(cache->groups) + wanted <= most_members(cache);
	}
}

bool cache_evict(struct bpfuse_cache *cache, enum cache_full full)
{
	__u32 *ranked = malloc((groups_count(cache->groups) + 1) * sizeof(*ranked));
	__u32 wanted = cache->options.capacity / ROOM_SHARE + 1, count;
	struct gone gone = { 0 };

	if (!ranked)
		return false;
	count = groups_by_use(cache->groups, ranked);
	for (__u32 i = 0; i < count && !is_enough(cache, full, &gone, wanted); i++)
		if (groups_get(cache->groups, ranked[i])->serial <= cache->batch_serial)
			evict_group(cache, ranked[i], &gone);
	free(ranked);
	return full == FULL_NAMES ? gone.names : full == FULL_INODES ? gone.inodes : gone.groups;
}

void cache_open_group(struct bpfuse_cache *cache, __u64 directory)
{
	if (groups_members(cache->groups) >= most_members(cache))
		cache_evict(cache, FULL_MEMBERS);
	cache->group = groups_open(cache->groups, directory);
	if (!cache->group && cache_evict(cache, FULL_GROUPS))
		cache->group = groups_open(cache->groups, directory);
}

void cache_join_group(struct bpfuse_cache *cache, const __u64 *hash, __u64 ino)
{
	struct member member = { .hash = { hash ? hash[0] : 0, hash ? hash[1] : 0 }, .ino = ino };
	struct group *group = groups_get(cache->groups, cache->group);

	if (groups_add(cache->groups, cache->group, &member) || !group)
		return;
	cache_open_group(cache, group->directory);
	groups_add(cache->groups, cache->group, &member);
}

size_t bpfuse_cache_take_evicted(struct bpfuse_cache *cache, __u64 *out, size_t room, int *lost)
{
	size_t count = cache->evicted.count < room ? cache->evicted.count : room;

	*lost = cache->evicted.lost;
	cache->evicted.lost = false;
	if (!count)
		return 0;
	memcpy(out, cache->evicted.keys, count * sizeof(*out));
	cache->evicted.count -= count;
	memmove(cache->evicted.keys, cache->evicted.keys + count, cache->evicted.count * sizeof(*out));
	return count;
}

int bpfuse_cache_is_used(const struct bpfuse_cache *cache, __u64 directory)
{
	__u32 slot = groups_newest(cache->groups, directory);

	return slot ? groups_is_used(cache->groups, slot) : -1;
}

size_t bpfuse_cache_members(const struct bpfuse_cache *cache)
{
	return groups_members(cache->groups);
}
