// SPDX-License-Identifier: Apache-2.0
/*
 * The worker's side of the kernel cache.
 *
 * Content and listings lie in `pages`, a ring: a cursor walks it, and each extent goes where the cursor is. `owners` has at an
 * extent's first page the inode it was given to. When the cursor comes by again, the inode, if it still has that
 * extent, is put anew without content, and only then are its pages written. Dropping or replacing an inode leaves its
 * pages to the cursor. An extent never wraps; the pages left over at the end keep what they had.
 *
 * A value's version is never used twice in the life of the maps: it begins above CLOCK_BOOTTIME in nanoseconds at
 * start and above every version found, and rises by one.
 *
 * When a map is full, the coldest groups of entries are given up (cache_evict.c). When the kernel refuses a value all the
 * same, its key is deleted, since an older value may be there; when a deletion fails too, the epoch is raised, which drops
 * everything.
 */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include "cache_internal.h"
#include "map_walk.h"

enum {
	NANOSECONDS = 1000000000,
	GROUP_LEAST = 16, /* members of a group at most, in the smallest cache and in large ones; */
	GROUP_MOST = 4096,
	GROUP_SHARE = 16, /* between them the map's capacity divided by this */
};

/* Taking from the maps */

void cache_deleted(struct bpfuse_cache *cache, int result)
{
	if (!result || result == -ENOENT)
		return;
	cache->figures.forced_epochs++;
	bpfuse_cache_bump_epoch(cache);
}

void cache_drop(struct bpfuse_cache *cache, int fd, const void *key)
{
	cache_deleted(cache, bpf_map_delete_elem(fd, key));
}

/* Drops a key whose value the kernel did not take. */
static void drop_refused(struct bpfuse_cache *cache, int fd, const void *key)
{
	struct bpfuse_name_key name;

	if (fd != cache->options.names_fd) {
		cache_drop(cache, fd, key);
		return;
	}
	memcpy(&name, key, sizeof(name));
	cache_drop_name(cache, &name);
}

/* Opening and closing */

static void *map_array(int fd, size_t size)
{
	void *address = mmap(NULL, (size + BPFUSE_PAGE - 1) & ~(size_t)(BPFUSE_PAGE - 1), PROT_READ | PROT_WRITE,
			     MAP_SHARED, fd, 0);

	return address == MAP_FAILED ? NULL : address;
}

static void unmap_array(void *address, size_t size)
{
	if (address)
		munmap(address, (size + BPFUSE_PAGE - 1) & ~(size_t)(BPFUSE_PAGE - 1));
}

static __u32 group_slots(const struct bpfuse_cache *cache)
{
	return cache->options.capacity / BPFUSE_GROUP_SHARE + 2;
}

static size_t uses_size(const struct bpfuse_cache *cache)
{
	return group_slots(cache) * sizeof(*cache->uses);
}

static __u32 group_most(__u32 capacity)
{
	__u32 most = capacity / GROUP_SHARE;

	return most < GROUP_LEAST ? GROUP_LEAST : most > GROUP_MOST ? GROUP_MOST : most;
}

static __u64 boot_time(void)
{
	struct timespec now;

	clock_gettime(CLOCK_BOOTTIME, &now);
	return (__u64)now.tv_sec * NANOSECONDS + now.tv_nsec;
}

static bool has_pages(const struct bpfuse_cache *cache, const struct bpfuse_inode_value *value)
{
	return value->epoch == cache->control->epoch && value->flags & BPFUSE_INODE_HAS_DATA && value->data_bytes &&
	       value->first_page < cache->options.page_count;
}

static void take_over_inode(void *context, const void *key, const void *value)
{
	struct bpfuse_cache *cache = context;
	struct bpfuse_inode_value inode;
	struct member member = { 0 };

	memcpy(&inode, value, sizeof(inode));
	memcpy(&member.ino, key, sizeof(member.ino));
	if (inode.version > cache->version)
		cache->version = inode.version;
	groups_restore(cache->groups, inode.group, 0);
	groups_add(cache->groups, inode.group, &member); /* twice, if its name is there: it may be without one */
	if (!has_pages(cache, &inode))
		return;
	cache->owners[inode.first_page] = member.ino;
	cache_mark(cache->stored, member.ino);
	if (S_ISDIR(inode.mode))
		cache_mark(cache->listed, member.ino);
}

static void take_over_xattrs(void *context, const void *key, const void *value)
{
	struct bpfuse_cache *cache = context;
	struct bpfuse_xattrs_value found;
	__u64 ino;

	memcpy(&found, value, sizeof(found));
	memcpy(&ino, key, sizeof(ino));
	if (found.version > cache->version)
		cache->version = found.version;
	cache_mark(cache->tagged, ino);
}

static int prepare(struct bpfuse_cache *cache)
{
	const struct bpfuse_cache_options *options = &cache->options;
	int result;

	cache->control = map_array(options->control_fd, sizeof(*cache->control));
	cache->pages = map_array(options->pages_fd, cache_pages_size(cache));
	cache->opens = map_array(options->opens_fd, BPFUSE_OPEN_SLOTS * sizeof(*cache->opens));
	cache->uses = map_array(options->uses_fd, uses_size(cache));
	if (!cache->control || !cache->pages || !cache->opens || !cache->uses)
		return -errno;
	cache->groups = groups_new(group_slots(cache), group_most(options->capacity), cache->uses);
	cache->owners = calloc(options->page_count, sizeof(*cache->owners));
	cache->stored = calloc(BPFUSE_OPEN_SLOTS / 8, 1);
	cache->listed = calloc(BPFUSE_OPEN_SLOTS / 8, 1);
	cache->tagged = calloc(BPFUSE_OPEN_SLOTS / 8, 1);
	cache->wholes = calloc(BPFUSE_OPEN_SLOTS / 8, 1);
	cache->losses = calloc(BPFUSE_OPEN_SLOTS, sizeof(*cache->losses));
	if (!cache->groups || !cache->owners || !cache->stored || !cache->listed || !cache->tagged || !cache->wholes ||
	    !cache->losses)
		return -ENOMEM;
	if (cache->control->page_cursor >= options->page_count)
		cache->control->page_cursor = 0;
	cache->version = boot_time();
	result = bpfuse_map_walk(options->names_fd, cache_take_over_name, cache);
	if (!result)
		result = bpfuse_map_walk(options->inodes_fd, take_over_inode, cache);
	groups_restored(cache->groups);
	return result ? result : bpfuse_map_walk(options->xattrs_fd, take_over_xattrs, cache);
}

int bpfuse_cache_open(struct bpfuse_cache **out, const struct bpfuse_cache_options *options)
{
	struct bpfuse_cache *cache = calloc(1, sizeof(*cache));
	int result;

	if (!cache)
		return -ENOMEM;
	cache->options = *options;
	result = prepare(cache);
	if (result) {
		bpfuse_cache_close(cache);
		return result;
	}
	*out = cache;
	return 0;
}

void bpfuse_cache_close(struct bpfuse_cache *cache)
{
	unmap_array(cache->control, sizeof(*cache->control));
	unmap_array(cache->pages, cache_pages_size(cache));
	unmap_array(cache->opens, BPFUSE_OPEN_SLOTS * sizeof(*cache->opens));
	unmap_array(cache->uses, uses_size(cache));
	groups_free(cache->groups);
	free(cache->evicted.keys);
	free(cache->owners);
	free(cache->stored);
	free(cache->listed);
	free(cache->tagged);
	free(cache->wholes);
	free(cache->losses);
	free(cache);
}

void bpfuse_cache_figures(const struct bpfuse_cache *cache, struct bpfuse_cache_figures *out)
{
	*out = cache->figures;
}

struct bpfuse_record *bpfuse_cache_records(struct bpfuse_cache *cache)
{
	return cache->records;
}

__u8 *bpfuse_cache_pages(struct bpfuse_cache *cache)
{
	return cache->pages;
}

const struct bpfuse_control *bpfuse_cache_control(const struct bpfuse_cache *cache)
{
	return cache->control;
}

static int put_batch(struct bpfuse_cache *cache, int fd, const char *keys, const char *values, __u32 *count)
{
	int result;

	if (fd != cache->options.names_fd)
		return bpf_map_update_batch(fd, keys, values, count, NULL);
	cache_begin_names(cache);
	result = bpf_map_update_batch(fd, keys, values, count, NULL);
	cache_end_names(cache);
	return result;
}

void cache_put_all(struct bpfuse_cache *cache, int fd, const void *keys, size_t key_size, const void *values,
		   size_t value_size, __u32 count)
{
	__u32 at = 0;

	while (at < count) {
		const char *key = (const char *)keys + at * key_size, *value = (const char *)values + at * value_size;
		__u32 done = count - at;
		int result = put_batch(cache, fd, key, value, &done);

		if (!result)
			return;
		if (done >= count - at) /* refused as a whole */
			done = 0;
		if (result == -E2BIG && cache_evict(cache, fd == cache->options.names_fd ? FULL_NAMES : FULL_INODES)) {
			at += done;
			continue;
		}
		cache->figures.put_failures++;
		drop_refused(cache, fd, key + done * key_size);
		at += done + 1;
	}
}

void cache_put_inodes(struct bpfuse_cache *cache, struct inode_batch *batch)
{
	cache_put_all(cache, cache->options.inodes_fd, batch->keys, sizeof(batch->keys[0]), batch->values,
		      sizeof(batch->values[0]), batch->count);
	batch->count = 0;
}

static struct bpfuse_inode_value *append(struct bpfuse_cache *cache, struct inode_batch *batch, __u64 ino)
{
	if (batch->count == BPFUSE_BATCH)
		cache_put_inodes(cache, batch);
	batch->keys[batch->count] = ino;
	return &batch->values[batch->count++];
}

void cache_put_inode(struct bpfuse_cache *cache, __u64 ino, struct bpfuse_inode_value *value)
{
	value->version = ++cache->version;
	*append(cache, &cache->inodes, ino) = *value;
	cache_put_inodes(cache, &cache->inodes);
}

/* Pages */

/* If the inode still has the extent that begins at `page`, has it put without content. */
static void overtake(struct bpfuse_cache *cache, __u64 ino, __u32 page)
{
	struct bpfuse_inode_value value;

	if (bpf_map_lookup_elem(cache->options.inodes_fd, &ino, &value))
		return;
	if (!has_pages(cache, &value) || value.first_page != page)
		return;
	value.flags &= ~(__u32)BPFUSE_INODE_HAS_DATA;
	value.first_page = value.data_bytes = 0;
	value.version = ++cache->version;
	*append(cache, &cache->overtaken, ino) = value;
	cache->figures.overtaken++;
}

bool cache_take_pages(struct bpfuse_cache *cache, __u64 ino, __u32 count, __u32 *first)
{
	struct bpfuse_control *control = cache->control;
	__u32 total = cache->options.page_count, cursor = control->page_cursor;
	__u32 skipped = count > total - cursor ? total - cursor : 0;

	if (count > total || skipped + count > total - cache->batch_pages)
		return false;
	cache->batch_pages += skipped + count;
	if (skipped)
		cursor = 0;
	for (__u32 page = cursor; page < cursor + count; page++) {
		if (cache->owners[page])
			overtake(cache, cache->owners[page], page);
		cache->owners[page] = 0;
	}
	cache->owners[cursor] = ino;
	cache_mark(cache->stored, ino);
	*first = cursor;
	if (control->pages_used < cursor + count)
		control->pages_used = cursor + count;
	control->page_cursor = cursor + count == total ? 0 : cursor + count;
	return true;
}

/* Whether an inode is of a kind and size that is served from pages. */
static bool is_served_from_pages(__u32 mode, __u64 size)
{
	if (S_ISLNK(mode))
		return size && size < BPFUSE_PAGE;
	return S_ISREG(mode) && size <= BPFUSE_MAX_DATA;
}

/* Whether the content given can be served from pages, and is whole. */
static bool is_servable(const struct bpfuse_record *record)
{
	return record->data_bytes == record->size && is_served_from_pages(record->mode, record->size);
}

void bpfuse_cache_place(struct bpfuse_cache *cache, __u32 count)
{
	cache->batch_pages = 0;
	cache->batch_epoch = cache->control->epoch;
	for (__u32 i = 0; i < count && i < BPFUSE_BATCH; i++) {
		struct bpfuse_record *record = &cache->records[i];

		record->first_page = BPFUSE_NO_DATA;
		if (!is_servable(record))
			record->data_bytes = BPFUSE_NO_DATA;
		else if (record->data_bytes &&
			 !cache_take_pages(cache, record->ino, cache_pages_of(record->data_bytes), &record->first_page))
			record->data_bytes = BPFUSE_NO_DATA;
	}
	cache_put_inodes(cache, &cache->overtaken);
}

/* Values */

static void split_time(__s64 ns, __s64 *seconds, __u32 *nanoseconds)
{
	__s64 rest = ns % NANOSECONDS;

	*seconds = ns / NANOSECONDS - (rest < 0);
	*nanoseconds = rest < 0 ? rest + NANOSECONDS : rest;
}

static void fill_opening(struct bpfuse_cache *cache, struct bpfuse_inode_value *value, __u64 ino)
{
	const struct backing *backing = cache_find_backing(cache, ino);

	if (backing && backing->id)
		value->device = backing->id;
	else if (backing || value->size >= cache->options.worker_opens_size)
		value->flags |= BPFUSE_INODE_WORKER_OPENS;
}

/*
 * Attributes that come without content leave the extent that the inode has, if it has not changed since; a directory's
 * is its listing. The extent is the inode's until the cursor comes by, and is looked for under the new value then.
 */
static void keep_content(struct bpfuse_cache *cache, struct bpfuse_inode_value *value, __u64 ino)
{
	struct bpfuse_inode_value old;

	if (!cache_is_marked(cache->stored, ino) ||
	    !(S_ISDIR(value->mode) || is_served_from_pages(value->mode, value->size)) ||
	    bpf_map_lookup_elem(cache->options.inodes_fd, &ino, &old))
		return;
	if (!has_pages(cache, &old) || old.file_version != value->file_version || old.size != value->size)
		return;
	value->flags |= BPFUSE_INODE_HAS_DATA;
	value->first_page = old.first_page;
	value->data_bytes = old.data_bytes;
}

static void fill_inode(struct bpfuse_cache *cache, struct bpfuse_inode_value *value, const struct bpfuse_record *record)
{
	*value = (struct bpfuse_inode_value){
		.size = record->size,
		.stored = record->stored,
		.mode = record->mode,
		.nlink = record->nlink,
		.uid = record->uid,
		.gid = record->gid,
		.device = S_ISREG(record->mode) ? 0 : record->rdev,
		.flags = record->flags & cache->options.xattrs_flag ? 0 : BPFUSE_INODE_NO_XATTRS,
		.epoch = cache->control->epoch,
		.group = cache->group,
		.file_version = (__u32)record->version,
		.version = ++cache->version,
	};
	split_time(record->atime_ns, &value->atime, &value->atimensec);
	split_time(record->mtime_ns, &value->mtime, &value->mtimensec);
	split_time(record->ctime_ns, &value->ctime, &value->ctimensec);
	if (S_ISREG(record->mode))
		fill_opening(cache, value, record->ino);
	if (record->data_bytes == BPFUSE_NO_DATA)
		keep_content(cache, value, record->ino);
	if (record->data_bytes == BPFUSE_NO_DATA || cache->batch_epoch != value->epoch)
		return;
	value->flags |= BPFUSE_INODE_HAS_DATA;
	value->data_bytes = record->data_bytes;
	value->first_page = record->data_bytes ? record->first_page : 0;
}

/* An inode that comes without a name stays in the group that it is in. */
static void open_group_of(struct bpfuse_cache *cache, __u64 ino)
{
	struct bpfuse_inode_value old;

	if (!bpf_map_lookup_elem(cache->options.inodes_fd, &ino, &old) && groups_get(cache->groups, old.group)) {
		cache->group = old.group;
		return;
	}
	cache_open_group(cache, 0);
	cache_join_group(cache, NULL, ino);
}

void bpfuse_cache_put(struct bpfuse_cache *cache, __u32 count, __u64 parent, const __u8 *names)
{
	cache_begin_batch(cache);
	if (names)
		cache_open_group(cache, parent);
	for (__u32 i = 0; i < count && i < BPFUSE_BATCH; i++) {
		const struct bpfuse_record *record = &cache->records[i];

		if (names) {
			cache_fill_name(cache, i, parent, names, record->name_bytes, record->ino);
			names += record->name_bytes;
		} else {
			open_group_of(cache, record->ino);
		}
		fill_inode(cache, append(cache, &cache->inodes, record->ino), record);
	}
	cache_put_inodes(cache, &cache->inodes);
	if (names)
		cache_put_names(cache, count);
}

void cache_drop_xattrs(struct bpfuse_cache *cache, __u64 ino)
{
	if (cache_is_marked(cache->tagged, ino))
		cache_drop(cache, cache->options.xattrs_fd, &ino);
}

void bpfuse_cache_drop_inode(struct bpfuse_cache *cache, __u64 ino)
{
	cache_drop(cache, cache->options.inodes_fd, &ino);
	cache_drop_xattrs(cache, ino);
}

void bpfuse_cache_put_xattrs(struct bpfuse_cache *cache, __u64 ino, struct bpfuse_xattrs_value *value)
{
	value->epoch = cache->control->epoch;
	value->version = ++cache->version;
	cache_put_all(cache, cache->options.xattrs_fd, &ino, sizeof(ino), value, sizeof(*value), 1);
	cache_mark(cache->tagged, ino);
}

static const __u64 INO_MASK = (1ULL << BPFUSE_FH_SERIAL_SHIFT) - 1;

static bool has_inode(struct bpfuse_cache *cache, __u64 ino, bool content)
{
	struct bpfuse_inode_value value;

	if (bpf_map_lookup_elem(cache->options.inodes_fd, &ino, &value) || value.epoch != cache->control->epoch)
		return false;
	return !content || !value.size || !is_served_from_pages(value.mode, value.size) ||
	       value.flags & BPFUSE_INODE_HAS_DATA;
}

int bpfuse_cache_has_all(struct bpfuse_cache *cache, const __u64 *inos, size_t count, int content)
{
	for (size_t i = 0; i < count; i++)
		if (!has_inode(cache, inos[i] & INO_MASK, content))
			return 0;
	return 1;
}

size_t bpfuse_cache_missing(struct bpfuse_cache *cache, const __u64 *inos, size_t count, __u64 *out)
{
	size_t missing = 0;

	for (size_t i = 0; i < count; i++)
		if (!has_inode(cache, inos[i] & INO_MASK, false))
			out[missing++] = inos[i];
	return missing;
}
