// SPDX-License-Identifier: Apache-2.0
/*
 * Names in the kernel cache, and which directories are whole.
 *
 * A directory is marked as whole when its caller has put all its names and none was lost since he began. It stays so through
 * names that are put. Whatever takes a name away, or fails to put one, takes the mark away first.
 */
#include <bpf/bpf.h>
#include <errno.h>
#include <string.h>
#include "cache_internal.h"

void bpfuse_hash_name(const __u8 *name, __u32 length, const __u64 *key, __u64 *out)
{
	__u64 words[(BPFUSE_NAME_MAX + 1) / 8];

	words[length / 8] = 0;
	memcpy(words, name, length);
	bpfuse_siphash(words, length, key, out);
}

void cache_begin_names(struct bpfuse_cache *cache)
{
	__atomic_store_n(&cache->control->names_changes, cache->control->names_changes | 1, __ATOMIC_SEQ_CST);
}

void cache_end_names(struct bpfuse_cache *cache)
{
	__atomic_store_n(&cache->control->names_changes, cache->control->names_changes + 1, __ATOMIC_SEQ_CST);
}

static void delete_name(struct bpfuse_cache *cache, const struct bpfuse_name_key *key)
{
	int result;

	cache_begin_names(cache);
	result = bpf_map_delete_elem(cache->options.names_fd, key);
	cache_end_names(cache);
	cache_deleted(cache, result);
}

static bool is_whole_mark(const struct bpfuse_name_key *key)
{
	return !key->hash[0] && !key->hash[1];
}

void cache_take_over_name(void *context, const void *key, const void *value)
{
	struct bpfuse_cache *cache = context;
	struct bpfuse_name_value found;
	struct bpfuse_name_key name;
	struct member member;

	memcpy(&name, key, sizeof(name));
	memcpy(&found, value, sizeof(found));
	if (found.version > cache->version)
		cache->version = found.version;
	if (is_whole_mark(&name)) { /* this worker does not know how far the one before it has come */
		delete_name(cache, &name);
		return;
	}
	member = (struct member){ .hash = { name.hash[0], name.hash[1] }, .ino = found.ino };
	if (groups_restore(cache->groups, found.group, name.parent))
		groups_add(cache->groups, found.group, &member);
}

void bpfuse_cache_drop_whole(struct bpfuse_cache *cache, __u64 directory)
{
	struct bpfuse_name_key key = { .parent = directory };

	if (cache_is_marked(cache->wholes, directory))
		delete_name(cache, &key);
}

void cache_drop_name(struct bpfuse_cache *cache, const struct bpfuse_name_key *key)
{
	cache->losses[bpfuse_open_slot(key->parent)]++;
	bpfuse_cache_drop_whole(cache, key->parent);
	delete_name(cache, key);
}

void cache_fill_name(struct bpfuse_cache *cache, __u32 index, __u64 parent, const __u8 *name, __u32 length, __u64 ino)
{
	struct bpfuse_name_key *key = &cache->name_keys[index];

	key->parent = parent;
	bpfuse_hash_name(name, length, cache->control->hash_key, key->hash);
	cache_join_group(cache, key->hash, ino); /* which may begin another group */
	cache->name_values[index] = (struct bpfuse_name_value){
		.ino = ino,
		.epoch = cache->control->epoch,
		.group = cache->group,
		.version = ++cache->version,
	};
}

void cache_put_names(struct bpfuse_cache *cache, __u32 count)
{
	cache_put_all(cache, cache->options.names_fd, cache->name_keys, sizeof(cache->name_keys[0]), cache->name_values,
		      sizeof(cache->name_values[0]), count);
}

void bpfuse_cache_put_name(struct bpfuse_cache *cache, __u64 parent, const __u8 *name, __u32 length, __u64 ino)
{
	cache_begin_batch(cache);
	cache_open_group(cache, parent);
	cache_fill_name(cache, 0, parent, name, length, ino);
	cache_put_names(cache, 1);
}

void bpfuse_cache_drop_name(struct bpfuse_cache *cache, __u64 parent, const __u8 *name, __u32 length)
{
	struct bpfuse_name_key key = { .parent = parent };

	bpfuse_hash_name(name, length, cache->control->hash_key, key.hash);
	cache_drop_name(cache, &key);
}

__u64 bpfuse_cache_losses(const struct bpfuse_cache *cache, __u64 directory)
{
	return (__u64)cache->control->epoch << 32 | cache->losses[bpfuse_open_slot(directory)];
}

/* Puts the mark of a directory, unless to make room for it costs one of its names. */
static int put_mark(struct bpfuse_cache *cache, const struct bpfuse_name_key *key, __u64 losses)
{
	struct bpfuse_name_value value = {
		.epoch = cache->control->epoch,
		.group = cache->group,
		.version = ++cache->version,
	};
	int result = -E2BIG;

	for (__u32 tries = 0; tries < 2 && result == -E2BIG; tries++) {
		if (tries && !cache_evict(cache, FULL_NAMES))
			break;
		if (bpfuse_cache_losses(cache, key->parent) != losses)
			break;
		cache_begin_names(cache);
		result = bpf_map_update_elem(cache->options.names_fd, key, &value, BPF_ANY);
		cache_end_names(cache);
	}
	return result;
}

int bpfuse_cache_put_whole(struct bpfuse_cache *cache, __u64 directory, __u64 losses)
{
	struct bpfuse_name_key key = { .parent = directory };

	if (bpfuse_cache_losses(cache, directory) != losses)
		return 0;
	cache_begin_batch(cache);
	cache_open_group(cache, directory);
	cache_join_group(cache, key.hash, 0);
	if (!cache->group)
		return 0;
	cache_mark(cache->wholes, directory);
	if (put_mark(cache, &key, losses)) {
		bpfuse_cache_drop_whole(cache, directory);
		return 0;
	}
	cache->figures.wholes++;
	return 1;
}
