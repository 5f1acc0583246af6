// SPDX-License-Identifier: Apache-2.0
/*
 * Listings of directories, which lie in `pages` as contents of files do: ready-made entries behind where each begins.
 */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <linux/fuse.h>
#include <string.h>
#include <sys/stat.h>
#include "cache_internal.h"

static bool find_directory(struct bpfuse_cache *cache, __u64 ino, struct bpfuse_inode_value *value)
{
	return !bpf_map_lookup_elem(cache->options.inodes_fd, &ino, value) && S_ISDIR(value->mode) &&
	       value->epoch == cache->control->epoch;
}

/* The bytes of an entry with its name, or 0 if they are not all there. */
static __u32 dirent_bytes(const __u8 *entries, size_t left)
{
	struct fuse_dirent dirent;
	__u32 bytes;

	if (left < FUSE_NAME_OFFSET)
		return 0;
	memcpy(&dirent, entries, FUSE_NAME_OFFSET);
	if (dirent.namelen > BPFUSE_NAME_MAX)
		return 0;
	bytes = FUSE_DIRENT_SIZE(&dirent);
	return bytes <= left ? bytes : 0;
}

/* How many entries there are; 0 if one is not whole. */
static __u32 count_entries(const __u8 *entries, size_t bytes)
{
	__u32 count = 0;

	for (size_t at = 0, size; at < bytes; at += size) {
		size = dirent_bytes(entries + at, bytes - at);
		if (!size)
			return 0;
		count++;
	}
	return count;
}

/* The bytes of a listing in front of its first entry. */
static size_t listing_head(__u32 count)
{
	return (sizeof(__u32) * (2 + (size_t)count) + 7) & ~(size_t)7;
}

static void write_listing(__u8 *out, const __u8 *entries, size_t bytes, __u32 count)
{
	struct bpfuse_listing *listing = (void *)out;
	__u32 head = (__u32)listing_head(count);
	size_t at = 0;

	listing->count = count;
	for (__u32 i = 0; i < count; i++) {
		listing->starts[i] = head + (__u32)at;
		at += dirent_bytes(entries + at, bytes - at);
	}
	listing->starts[count] = head + (__u32)at;
	memcpy(out + head, entries, bytes);
}

int bpfuse_cache_put_listing(struct bpfuse_cache *cache, __u64 ino, const __u8 *entries, size_t bytes)
{
	struct bpfuse_inode_value value;
	size_t most = cache_pages_size(cache) / BPFUSE_LISTING_SHARE, total;
	__u32 first, count;

	if (bytes > most || !find_directory(cache, ino, &value))
		return 0;
	count = count_entries(entries, bytes);
	total = listing_head(count) + bytes;
	if (!count || total > most)
		return 0;
	cache->batch_pages = 0;
	if (!cache_take_pages(cache, ino, cache_pages_of((__u32)total), &first))
		return 0;
	cache_put_inodes(cache, &cache->overtaken);
	if (value.epoch != cache->control->epoch) /* a drop failed */
		return 0;
	write_listing(cache->pages + (size_t)first * BPFUSE_PAGE, entries, bytes, count);
	value.flags |= BPFUSE_INODE_HAS_DATA;
	value.first_page = first;
	value.data_bytes = (__u32)total;
	cache_put_inode(cache, ino, &value);
	cache_mark(cache->listed, ino);
	cache->figures.listings++;
	return 1;
}

void bpfuse_cache_drop_listing(struct bpfuse_cache *cache, __u64 ino)
{
	struct bpfuse_inode_value value;

	if (!cache_is_marked(cache->listed, ino) || !find_directory(cache, ino, &value))
		return;
	value.flags &= ~(__u32)BPFUSE_INODE_HAS_DATA;
	value.first_page = value.data_bytes = 0;
	cache_put_inode(cache, ino, &value);
}
