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
 *
 * A directory is marked as whole when its caller has put all its names and none was lost since he began. It stays so through
 * names that are put. Whatever takes a name away, or fails to put one, takes the mark away first.
 */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <errno.h>
#include <linux/fuse.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "cache_internal.h"
#include "hash.h"
#include "map_walk.h"

enum {
	NANOSECONDS = 1000000000,
	GROUP_LEAST = 16, /* members of a group at most, in the smallest cache and in large ones; */
	GROUP_MOST = 4096,
	GROUP_SHARE = 16, /* between them the map's capacity divided by this */
};

void bpfuse_hash_name(const __u8 *name, __u32 length, const __u64 *key, __u64 *out)
{
	__u64 words[(BPFUSE_NAME_MAX + 1) / 8];

	words[length / 8] = 0;
	memcpy(words, name, length);
	bpfuse_siphash(words, length, key, out);
}

/* Taking from the maps */

static void mark(__u8 *marks, __u64 ino)
{
	__u32 slot = bpfuse_open_slot(ino);

	marks[slot / 8] |= 1 << slot % 8;
}

static bool is_marked(const __u8 *marks, __u64 ino)
{
	__u32 slot = bpfuse_open_slot(ino);

	return marks[slot / 8] >> slot % 8 & 1;
}

static void deleted(struct bpfuse_cache *cache, int result)
{
	if (!result || result == -ENOENT)
		return;
	cache->figures.forced_epochs++;
	bpfuse_cache_bump_epoch(cache);
}

void cache_drop(struct bpfuse_cache *cache, int fd, const void *key)
{
	deleted(cache, bpf_map_delete_elem(fd, key));
}

/* `names` is about to be changed. A worker that died after this left the number odd. */
static void begin_names(struct bpfuse_cache *cache)
{
	__atomic_store_n(&cache->control->names_changes, cache->control->names_changes | 1, __ATOMIC_SEQ_CST);
}

static void end_names(struct bpfuse_cache *cache)
{
	__atomic_store_n(&cache->control->names_changes, cache->control->names_changes + 1, __ATOMIC_SEQ_CST);
}

static void delete_name(struct bpfuse_cache *cache, const struct bpfuse_name_key *key)
{
	int result;

	begin_names(cache);
	result = bpf_map_delete_elem(cache->options.names_fd, key);
	end_names(cache);
	deleted(cache, result);
}

static bool is_whole_mark(const struct bpfuse_name_key *key)
{
	return !key->hash[0] && !key->hash[1];
}

void bpfuse_cache_drop_whole(struct bpfuse_cache *cache, __u64 directory)
{
	struct bpfuse_name_key key = { .parent = directory };

	if (is_marked(cache->wholes, directory))
		delete_name(cache, &key);
}

void cache_drop_name(struct bpfuse_cache *cache, const struct bpfuse_name_key *key)
{
	cache->losses[bpfuse_open_slot(key->parent)]++;
	bpfuse_cache_drop_whole(cache, key->parent);
	delete_name(cache, key);
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

static size_t pages_size(const struct bpfuse_cache *cache)
{
	return (size_t)cache->options.page_count * BPFUSE_PAGE;
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

static __u32 pages_of(__u32 bytes)
{
	return (bytes + BPFUSE_PAGE - 1) / BPFUSE_PAGE;
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

static void take_over_name(void *context, const void *key, const void *value)
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

static void take_over(void *context, const void *key, const void *value)
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
	if (S_ISDIR(inode.mode))
		mark(cache->listed, member.ino);
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
	mark(cache->tagged, ino);
}

static int prepare(struct bpfuse_cache *cache)
{
	const struct bpfuse_cache_options *options = &cache->options;
	int result;

	cache->control = map_array(options->control_fd, sizeof(*cache->control));
	cache->pages = map_array(options->pages_fd, pages_size(cache));
	cache->opens = map_array(options->opens_fd, BPFUSE_OPEN_SLOTS * sizeof(*cache->opens));
	cache->uses = map_array(options->uses_fd, uses_size(cache));
	if (!cache->control || !cache->pages || !cache->opens || !cache->uses)
		return -errno;
	cache->groups = groups_new(group_slots(cache), group_most(options->capacity), cache->uses);
	cache->owners = calloc(options->page_count, sizeof(*cache->owners));
	cache->listed = calloc(BPFUSE_OPEN_SLOTS / 8, 1);
	cache->tagged = calloc(BPFUSE_OPEN_SLOTS / 8, 1);
	cache->wholes = calloc(BPFUSE_OPEN_SLOTS / 8, 1);
	cache->losses = calloc(BPFUSE_OPEN_SLOTS, sizeof(*cache->losses));
	if (!cache->groups || !cache->owners || !cache->listed || !cache->tagged || !cache->wholes || !cache->losses)
		return -ENOMEM;
	if (cache->control->page_cursor >= options->page_count)
		cache->control->page_cursor = 0;
	cache->version = boot_time();
	result = bpfuse_map_walk(options->names_fd, take_over_name, cache);
	if (!result)
		result = bpfuse_map_walk(options->inodes_fd, take_over, cache);
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
	unmap_array(cache->pages, pages_size(cache));
	unmap_array(cache->opens, BPFUSE_OPEN_SLOTS * sizeof(*cache->opens));
	unmap_array(cache->uses, uses_size(cache));
	groups_free(cache->groups);
	free(cache->evicted.keys);
	free(cache->owners);
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
	begin_names(cache);
	result = bpf_map_update_batch(fd, keys, values, count, NULL);
	end_names(cache);
	return result;
}

static void put_all(struct bpfuse_cache *cache, int fd, const void *keys, size_t key_size, const void *values,
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

static void put_inodes(struct bpfuse_cache *cache, struct inode_batch *batch)
{
	put_all(cache, cache->options.inodes_fd, batch->keys, sizeof(batch->keys[0]), batch->values,
		sizeof(batch->values[0]), batch->count);
	batch->count = 0;
}

static struct bpfuse_inode_value *append(struct bpfuse_cache *cache, struct inode_batch *batch, __u64 ino)
{
	if (batch->count == BPFUSE_BATCH)
		put_inodes(cache, batch);
	batch->keys[batch->count] = ino;
	return &batch->values[batch->count++];
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

/* Moves the cursor over `count` pages for `ino`; false if this batch has been once around the ring. */
static bool take_pages(struct bpfuse_cache *cache, __u64 ino, __u32 count, __u32 *first)
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
			 !take_pages(cache, record->ino, pages_of(record->data_bytes), &record->first_page))
			record->data_bytes = BPFUSE_NO_DATA;
	}
	put_inodes(cache, &cache->overtaken);
}

/* Values */

static bool find_directory(struct bpfuse_cache *cache, __u64 ino, struct bpfuse_inode_value *value)
{
	return !bpf_map_lookup_elem(cache->options.inodes_fd, &ino, value) && S_ISDIR(value->mode) &&
	       value->epoch == cache->control->epoch;
}

static void split_time(__s64 ns, __s64 *seconds, __u32 *nanoseconds)
{
	__s64 rest = ns % NANOSECONDS;

	*seconds = ns / NANOSECONDS - (rest < 0);
	*nanoseconds = rest < 0 ? rest + NANOSECONDS : rest;
}

static struct backing *find_backing(struct bpfuse_cache *cache, __u64 ino)
{
	for (__u32 i = 0; i < cache->backing_count; i++)
		if (cache->backings[i].ino == ino)
			return &cache->backings[i];
	return NULL;
}

static void fill_opening(struct bpfuse_cache *cache, struct bpfuse_inode_value *value, __u64 ino)
{
	const struct backing *backing = find_backing(cache, ino);

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

	if (!(S_ISDIR(value->mode) || is_served_from_pages(value->mode, value->size)) ||
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

static void fill_name(struct bpfuse_cache *cache, __u32 index, __u64 parent, const __u8 *name, __u32 length, __u64 ino)
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

static void put_names(struct bpfuse_cache *cache, __u32 count)
{
	put_all(cache, cache->options.names_fd, cache->name_keys, sizeof(cache->name_keys[0]), cache->name_values,
		sizeof(cache->name_values[0]), count);
}

static void begin_batch(struct bpfuse_cache *cache)
{
	cache->batch_serial = groups_serial(cache->groups);
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
	begin_batch(cache);
	if (names)
		cache_open_group(cache, parent);
	for (__u32 i = 0; i < count && i < BPFUSE_BATCH; i++) {
		const struct bpfuse_record *record = &cache->records[i];

		if (names) {
			fill_name(cache, i, parent, names, record->name_bytes, record->ino);
			names += record->name_bytes;
		} else {
			open_group_of(cache, record->ino);
		}
		fill_inode(cache, append(cache, &cache->inodes, record->ino), record);
	}
	put_inodes(cache, &cache->inodes);
	if (names)
		put_names(cache, count);
}

void bpfuse_cache_put_name(struct bpfuse_cache *cache, __u64 parent, const __u8 *name, __u32 length, __u64 ino)
{
	begin_batch(cache);
	cache_open_group(cache, parent);
	fill_name(cache, 0, parent, name, length, ino);
	put_names(cache, 1);
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
		__u32 count = 1;

		if (tries && !cache_evict(cache, FULL_NAMES))
			break;
		if (bpfuse_cache_losses(cache, key->parent) != losses)
			break;
		result = put_batch(cache, cache->options.names_fd, (const char *)key, (const char *)&value, &count);
	}
	return result;
}

int bpfuse_cache_put_whole(struct bpfuse_cache *cache, __u64 directory, __u64 losses)
{
	struct bpfuse_name_key key = { .parent = directory };

	if (bpfuse_cache_losses(cache, directory) != losses)
		return 0;
	begin_batch(cache);
	cache_open_group(cache, directory);
	cache_join_group(cache, key.hash, 0);
	if (!cache->group)
		return 0;
	mark(cache->wholes, directory);
	if (put_mark(cache, &key, losses)) {
		bpfuse_cache_drop_whole(cache, directory);
		return 0;
	}
	cache->figures.wholes++;
	return 1;
}

void cache_drop_xattrs(struct bpfuse_cache *cache, __u64 ino)
{
	if (is_marked(cache->tagged, ino))
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
	put_all(cache, cache->options.xattrs_fd, &ino, sizeof(ino), value, sizeof(*value), 1);
	mark(cache->tagged, ino);
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

/* Listings */

static void put_inode(struct bpfuse_cache *cache, __u64 ino, struct bpfuse_inode_value *value)
{
	value->version = ++cache->version;
	*append(cache, &cache->inodes, ino) = *value;
	put_inodes(cache, &cache->inodes);
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
	size_t most = pages_size(cache) / BPFUSE_LISTING_SHARE, total;
	__u32 first, count;

	if (bytes > most || !find_directory(cache, ino, &value))
		return 0;
	count = count_entries(entries, bytes);
	total = listing_head(count) + bytes;
	if (!count || total > most)
		return 0;
	cache->batch_pages = 0;
	if (!take_pages(cache, ino, pages_of((__u32)total), &first))
		return 0;
	put_inodes(cache, &cache->overtaken);
	if (value.epoch != cache->control->epoch) /* a drop failed */
		return 0;
	write_listing(cache->pages + (size_t)first * BPFUSE_PAGE, entries, bytes, count);
	value.flags |= BPFUSE_INODE_HAS_DATA;
	value.first_page = first;
	value.data_bytes = (__u32)total;
	put_inode(cache, ino, &value);
	mark(cache->listed, ino);
	cache->figures.listings++;
	return 1;
}

void bpfuse_cache_drop_listing(struct bpfuse_cache *cache, __u64 ino)
{
	struct bpfuse_inode_value value;

	if (!is_marked(cache->listed, ino) || !find_directory(cache, ino, &value))
		return;
	value.flags &= ~(__u32)BPFUSE_INODE_HAS_DATA;
	value.first_page = value.data_bytes = 0;
	put_inode(cache, ino, &value);
}

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
	struct backing *backing = find_backing(cache, ino);

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
	struct backing *backing = find_backing(cache, ino);

	if (backing)
		*backing = cache->backings[--cache->backing_count];
}
