/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The worker's side of the kernel cache: fills and empties the maps that the BPF programs answer from. The worker is
 * their only writer, and one thread of it calls this.
 *
 * A batch is put in three steps: the caller fills in records, bpfuse_cache_place() gives each content its pages, the
 * caller copies the bytes there, bpfuse_cache_put() makes all of it visible. Nothing here fails for want of room: a
 * full map forgets something else.
 */
#ifndef BPFUSE_CACHE_FILL_H
#define BPFUSE_CACHE_FILL_H

#include <stddef.h>
#include <linux/types.h>

struct bpfuse_cache;
struct bpfuse_control;
struct bpfuse_statfs;
struct bpfuse_xattrs_value;

enum bpfuse_cache_limit {
	BPFUSE_BATCH = 256,
	BPFUSE_LISTING_SHARE = 2, /* a listing takes up at most the pages divided by this */
	BPFUSE_BACKINGS = 1024,   /* inodes of which bpfuse_cache_set_backing() can say something */
};

enum bpfuse_cache_mark {
	BPFUSE_NO_DATA = 0xffffffff, /* data_bytes: the content is not known; first_page: it got no pages */
};

struct bpfuse_cache_options {
	int control_fd, names_fd, inodes_fd, uses_fd, xattrs_fd, pages_fd, opens_fd;
	__u32 page_count;
	__u32 capacity;          /* of `inodes` */
	__u32 xattrs_flag;       /* the bit in a record's flags that says that the inode has xattrs */
	__u64 worker_opens_size; /* the worker opens files of so many bytes and more, if they have no backing */
};

/* An inode, in the order of wire.Attributes, and what a batch says of it beside. */
struct bpfuse_record {
	__u64 ino;
	__u32 mode, nlink, uid, gid, rdev;
	__u32 reserved;
	__u64 size;
	__s64 atime_ns, mtime_ns, ctime_ns;
	__u32 flags;
	__u32 padding;
	__u64 version;
	__u64 stored;
	__u32 name_bytes;
	__u32 data_bytes;
	__u32 first_page; /* set by bpfuse_cache_place(); BPFUSE_NO_DATA: there is nothing to copy */
};

/* Counts since the cache was opened. */
struct bpfuse_cache_figures {
	__u64 listings;        /* of directories, that were put */
	__u64 overtaken;       /* inodes whose content or listing lost its pages to newer content */
	__u64 put_failures;    /* values that the kernel did not take, and that are therefore not cached */
	__u64 forced_epochs;   /* times that everything was dropped because a drop failed */
	__u64 wholes;          /* directories of which it was said that all their names are here */
	__u64 evicted_groups;  /* directories, or parts of large ones, that were given up for others, */
	__u64 evicted_entries; /* and the names and inodes that went with them */
};

/* Returns 0 or a negative errno. Goes on where an earlier worker of the same maps stopped. */
int bpfuse_cache_open(struct bpfuse_cache **out, const struct bpfuse_cache_options *options);
void bpfuse_cache_close(struct bpfuse_cache *cache);
void bpfuse_cache_figures(const struct bpfuse_cache *cache, struct bpfuse_cache_figures *out);

/* BPFUSE_BATCH records, and the page_count pages. */
struct bpfuse_record *bpfuse_cache_records(struct bpfuse_cache *cache);
__u8 *bpfuse_cache_pages(struct bpfuse_cache *cache);
const struct bpfuse_control *bpfuse_cache_control(const struct bpfuse_cache *cache);

void bpfuse_cache_place(struct bpfuse_cache *cache, __u32 count);
/* `names`: the records' names one after another; NULL: the inodes alone. */
void bpfuse_cache_put(struct bpfuse_cache *cache, __u32 count, __u64 parent, const __u8 *names);
/* `ino` 0: the name is known to be absent. */
void bpfuse_cache_put_name(struct bpfuse_cache *cache, __u64 parent, const __u8 *name, __u32 length, __u64 ino);
/* Forgets a name, and before it that its directory is whole. */
void bpfuse_cache_drop_name(struct bpfuse_cache *cache, __u64 parent, const __u8 *name, __u32 length);
/*
 * Says that all names of a directory were put since bpfuse_cache_losses() returned `losses`: names that are not found in it
 * are answered as absent from now on, until one of its names is dropped or given up. Returns 1, or 0 if that cannot be
 * relied upon, because one was since, or if there is no room to say it.
 */
int bpfuse_cache_put_whole(struct bpfuse_cache *cache, __u64 directory, __u64 losses);
void bpfuse_cache_drop_whole(struct bpfuse_cache *cache, __u64 directory);
/* Changes with each name of a directory that is taken from the map, or is not put into it for want of room. */
__u64 bpfuse_cache_losses(const struct bpfuse_cache *cache, __u64 directory);
void bpfuse_cache_drop_inode(struct bpfuse_cache *cache, __u64 ino);
/*
 * Whether all these inodes are there, by the low 48 bits of each; with `content`, that of small files and symlinks is to
 * be there, too. Says nothing of how much they are used.
 */
int bpfuse_cache_has_all(struct bpfuse_cache *cache, const __u64 *inos, size_t count, int content);
/* Fills `out`, which has room for all, with those of these inodes that are not there; returns how many. */
size_t bpfuse_cache_missing(struct bpfuse_cache *cache, const __u64 *inos, size_t count, __u64 *out);

/* Marks a directory in what bpfuse_cache_take_evicted() tells. */
enum bpfuse_evicted { BPFUSE_EVICTED_DIRECTORY_BIT = 63 };

/*
 * Tells what was given up since the last time to make room: inodes, some of which were not there any more, and
 * directories of which no entry is left here; returns how many, and in `*lost` whether there was no memory to remember some. At most `room` are told at once.
 */
size_t bpfuse_cache_take_evicted(struct bpfuse_cache *cache, __u64 *out, size_t room, int *lost);
/* Whether an entry of a directory was asked for since the newest of them were put; -1: there are none. */
int bpfuse_cache_is_used(const struct bpfuse_cache *cache, __u64 directory);
/* Members of all groups, and groups. */
size_t bpfuse_cache_members(const struct bpfuse_cache *cache);

/*
 * The listing of a directory whose inode was put: entries of struct fuse_dirent, in the order of `off`. Returns
 * 1, or 0 if it is not kept: the inode is not there, or the entries are too many, or not whole.
 */
int bpfuse_cache_put_listing(struct bpfuse_cache *cache, __u64 ino, const __u8 *entries, size_t bytes);
/* Forgets a directory's listing, and nothing else of it. */
void bpfuse_cache_drop_listing(struct bpfuse_cache *cache, __u64 ino);

/* All xattrs of an inode, until it is dropped; epoch and version are set here. */
void bpfuse_cache_put_xattrs(struct bpfuse_cache *cache, __u64 ino, struct bpfuse_xattrs_value *value);

/* One of enum bpfuse_profile. */
void bpfuse_cache_set_profile(struct bpfuse_cache *cache, __u32 profile);
void bpfuse_cache_set_deadline(struct bpfuse_cache *cache, __u64 deadline_ns);
void bpfuse_cache_set_ttl(struct bpfuse_cache *cache, __u64 kernel_ttl_ns);
void bpfuse_cache_set_statfs(struct bpfuse_cache *cache, const struct bpfuse_statfs *figures);
/* Makes every value put so far a miss. */
void bpfuse_cache_bump_epoch(struct bpfuse_cache *cache);

/* Handles given out for inodes of this one's slot and not released; 0 means that it is not in use. */
__u64 bpfuse_cache_opens(const struct bpfuse_cache *cache, __u64 ino);
void bpfuse_cache_released(struct bpfuse_cache *cache, __u64 ino);
/* Counts a handle that the worker gave out with them. */
void bpfuse_cache_opened(struct bpfuse_cache *cache, __u64 ino);

/* Programs of this mount have locks of an inode, or have none any more: calls are counted, by slot. */
void bpfuse_cache_locked(struct bpfuse_cache *cache, __u64 ino);
void bpfuse_cache_unlocked(struct bpfuse_cache *cache, __u64 ino);

/*
 * What values of this inode that are put from now on say of opening it: with this backing id, or with 0 that the worker
 * does it. Returns 0 or -ENOSPC. Forgetting it leaves that to the file's size.
 */
int bpfuse_cache_set_backing(struct bpfuse_cache *cache, __u64 ino, __u32 backing_id);
void bpfuse_cache_forget_backing(struct bpfuse_cache *cache, __u64 ino);

/* SipHash-2-4-128 of at most BPFUSE_NAME_MAX bytes. */
void bpfuse_hash_name(const __u8 *name, __u32 length, const __u64 *key, __u64 *out);

#endif
