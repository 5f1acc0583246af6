/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * READDIR and READDIRPLUS, from a directory's listing in `pages` (abi.h: struct bpfuse_listing), which is the whole
 * directory as of one moment. What is to be told is found by two binary searches: the first entry behind the offset
 * asked for, and the last that fits the reply. READDIR is answered by one copy of what lies between. READDIRPLUS takes
 * the attributes of each entry from `inodes`; an entry whose inode is not there, or is being written, is told of
 * without attributes (nodeid 0), which is no error: the kernel looks it up if it needs to.
 *
 * A listing that was begun is only gone on with: who renames each entry he is told of would find it again at the end
 * of a newer listing, for ever. The handle says which listing it was opened for. That nothing follows may be said to
 * any.
 *
 * The extent may be overwritten while it is read: each length and index is checked before it is used, and the inode is
 * looked at again at the end, as in data.bpf.h.
 */
#ifndef BPFUSE_LISTINGS_BPF_H
#define BPFUSE_LISTINGS_BPF_H

#include "attrs.bpf.h"
#include "handles.bpf.h"

enum {
	DIRENT_BYTES = sizeof(struct fuse_dirent),
	DIRENT_MAX = DIRENT_BYTES + BPFUSE_NAME_MAX + 1, /* with its name, on a boundary of 8 bytes */
	SEARCH_STEPS = 32,                               /* halvings of 2^32 */
};

_Static_assert(DIRENT_MAX % 8 == 0, "entries lie on boundaries of 8 bytes");

struct listing {
	__u32 first_page, bytes, count;
	__u32 failed; /* something lay outside the extent */
};

/* The 4 bytes at `at`, which is on a boundary of 4 bytes. */
static __u32 listing_word(struct listing *listing, __u32 at)
{
	__u32 number = listing->first_page + at / BPFUSE_PAGE;
	const struct bpfuse_page *page = bpf_map_lookup_elem(&pages, &number);

	if (!page || at >= listing->bytes) {
		listing->failed = 1;
		return 0;
	}
	return READ_ONCE(*(const __u32 *)(page->bytes + (at & (BPFUSE_PAGE - 4))));
}

/* Where entry `index` begins, or, if it is the number of entries, the last one ends. */
static __u32 listing_start(struct listing *listing, __u32 index)
{
	__u32 start = listing_word(listing, sizeof(__u32) + index * sizeof(__u32));

	if (start > listing->bytes || start % 8)
		listing->failed = 1;
	return start;
}

static __u64 listing_offset_of(struct listing *listing, __u32 index)
{
	__u32 at = listing_start(listing, index) + __builtin_offsetof(struct fuse_dirent, off);
	__u64 low = listing_word(listing, at);

	return low | (__u64)listing_word(listing, at + sizeof(__u32)) << 32;
}

/* The least of [low, high) that is beyond what is searched for, or `high`. */
struct search {
	struct listing *listing;
	__u32 low, high;
	__u64 offset; /* searched for: entries up to this offset; if 0, */
	__u32 limit;  /* entries that end up to this byte */
};

static long search_step(__u32 step, struct search *search)
{
	__u32 middle = search->low + (search->high - search->low) / 2;
	bool beyond;

	(void)step;
	if (search->low >= search->high || search->listing->failed)
		return 1;
	if (search->limit)
		beyond = listing_start(search->listing, middle + 1) > search->limit;
	else
		beyond = listing_offset_of(search->listing, middle) > search->offset;
	if (beyond)
		search->high = middle;
	else
		search->low = middle + 1;
	return 0;
}

/* The first entry behind an offset; the number of entries if there is none. */
static __u32 listing_after(struct listing *listing, __u64 offset)
{
	struct search search = { .listing = listing, .high = listing->count, .offset = offset };

	bpf_loop(SEARCH_STEPS, search_step, &search, 0);
	return search.low;
}

/* The first entry from `first` on that ends behind a byte of the extent. */
static __u32 listing_ends_by(struct listing *listing, __u32 first, __u32 limit)
{
	struct search search = { .listing = listing, .low = first, .high = listing->count, .limit = limit };

	bpf_loop(SEARCH_STEPS, search_step, &search, 0);
	return search.low;
}

/* Copies `count` bytes from `at` on; `target` has room for them. */
static enum bpfuse_outcome listing_copy(const struct listing *listing, void *target, __u32 at, __u32 count)
{
	__u32 number = listing->first_page + at / BPFUSE_PAGE;
	const struct bpfuse_page *page = bpf_map_lookup_elem(&pages, &number);

	if (!page || count > listing->bytes || at > listing->bytes - count)
		return BPFUSE_MISS_DATA;
	if (count > BPFUSE_PAYLOAD)
		return BPFUSE_MISS_RANGE;
	if (bpf_probe_read_kernel(target, count, page->bytes + at % BPFUSE_PAGE))
		return BPFUSE_MISS_HELPER;
	return BPFUSE_ANSWERED;
}

/* Finds the listing of a directory; what it returns may be torn. */
static enum bpfuse_outcome listing_find(struct request *request, struct bpfuse_inode_value *inode,
					struct listing *listing)
{
	enum bpfuse_outcome outcome = inode_peek(request, request->nodeid, inode);
	__u32 last;

	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if ((inode->mode & MODE_TYPE) != MODE_DIRECTORY)
		return BPFUSE_MISS_FLAGS;
	last = inode->first_page + (inode->data_bytes - 1) / BPFUSE_PAGE;
	if (!(inode->flags & BPFUSE_INODE_HAS_DATA) || !inode->data_bytes || last < inode->first_page ||
	    !bpf_map_lookup_elem(&pages, &last))
		return BPFUSE_MISS_DATA;
	listing->first_page = inode->first_page;
	listing->bytes = inode->data_bytes;
	listing->failed = 0;
	listing->count = listing_word(listing, 0);
	if (listing->failed || listing->count >= listing->bytes / sizeof(__u32))
		return BPFUSE_MISS_DATA;
	return BPFUSE_ANSWERED;
}

/* Whether a handle goes on with this listing. A mount that opens no directories has handles of 0. */
static bool goes_on(const struct fuse_read_in *in, const struct bpfuse_inode_value *inode)
{
	__u32 other = (in->fh >> BPFUSE_FH_SERIAL_SHIFT ^ inode->file_version) & FH_VERSION;

	return !in->offset || !in->fh || (in->fh & FH_KERNEL && !other);
}

static enum bpfuse_outcome fill_plain(struct request *request, struct listing *listing, __u32 first, __u32 size)
{
	__u32 start = listing_start(listing, first);
	__u32 end = listing_start(listing, listing_ends_by(listing, first, start + size));

	if (listing->failed || end < start)
		return BPFUSE_MISS_DATA;
	if (end == start)
		return BPFUSE_MISS_RANGE;
	request->reply_size = end - start;
	return listing_copy(listing, request->entry->payload, start, end - start);
}

/* READDIRPLUS, entry by entry. */
struct plus {
	struct request *request;
	struct listing *listing;
	__u32 first, size;
	__u32 outcome;
};

/* Fills from the value itself: for a copy of it the stack, which the functions above this one share, is too small. */
static void fill_plus_entry(struct request *request, struct fuse_entry_out *out, __u64 ino)
{
	const struct bpfuse_inode_value *inode = bpf_map_lookup_elem(&inodes, &ino);
	__u64 version;

	__builtin_memset(out, 0, sizeof(*out));
	if (!inode)
		return;
	version = READ_ONCE(inode->version);
	read_barrier();
	if (READ_ONCE(inode->epoch) != request->epoch || !READ_ONCE(inode->mode))
		return;
	fill_attr(&out->attr, ino, inode);
	barrier();
	if (!inode_still(ino, version)) {
		__builtin_memset(&out->attr, 0, sizeof(out->attr));
		return;
	}
	request->group = READ_ONCE(inode->group);
	out->nodeid = ino;
	out->entry_valid = out->attr_valid = ttl_seconds(request);
	out->entry_valid_nsec = out->attr_valid_nsec = ttl_nanoseconds(request);
}

static long plus_step(__u32 step, struct plus *plus)
{
	struct request *request = plus->request;
	__u32 index = plus->first + step, at = request->reply_size;
	__u32 start = listing_start(plus->listing, index);
	__u32 bytes = listing_start(plus->listing, index + 1) - start;
	const struct fuse_dirent *dirent;
	__u8 *out;

	if (plus->listing->failed || bytes < DIRENT_BYTES || bytes > DIRENT_MAX) {
		plus->outcome = BPFUSE_MISS_DATA;
		return 1;
	}
	if (at > BPFUSE_PAYLOAD - sizeof(struct fuse_entry_out) - DIRENT_MAX ||
	    at + sizeof(struct fuse_entry_out) + bytes > plus->size)
		return 1;
	out = request->entry->payload + at;
	plus->outcome = listing_copy(plus->listing, out + sizeof(struct fuse_entry_out), start, bytes);
	if (plus->outcome != BPFUSE_ANSWERED)
		return 1;
	dirent = (const void *)(out + sizeof(struct fuse_entry_out));
	/* Of "." and ".." the kernel takes no attributes. */
	fill_plus_entry(request, (void *)out, index < 2 ? 0 : dirent->ino);
	request->reply_size = at + sizeof(struct fuse_entry_out) + bytes;
	return 0;
}

static enum bpfuse_outcome fill_plus(struct request *request, struct listing *listing, __u32 first, __u32 size)
{
	struct plus plus = { .request = request, .listing = listing, .first = first, .size = size };

	plus.outcome = BPFUSE_ANSWERED;
	if (bpf_loop(listing->count - first, plus_step, &plus, 0) < 0)
		return BPFUSE_MISS_HELPER;
	if (plus.outcome == BPFUSE_ANSWERED && !request->reply_size)
		return BPFUSE_MISS_RANGE;
	return plus.outcome;
}

static enum bpfuse_outcome answer_listing(struct request *request, bool plus)
{
	const struct fuse_read_in *in = (const void *)request->entry->uring.op_in;
	struct bpfuse_inode_value inode;
	enum bpfuse_outcome outcome;
	struct listing listing;
	__u32 first;

	outcome = check_request(request, sizeof(*in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (in->size > BPFUSE_PAYLOAD)
		return BPFUSE_MISS_RANGE;
	outcome = listing_find(request, &inode, &listing);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	first = listing_after(&listing, in->offset);
	if (listing.failed)
		return BPFUSE_MISS_DATA;
	if (first < listing.count) {
		if (!goes_on(in, &inode))
			return BPFUSE_MISS_HANDLE;
		outcome = plus ? fill_plus(request, &listing, first, in->size) :
				 fill_plain(request, &listing, first, in->size);
	}
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!inode_still(request->nodeid, inode.version) || READ_ONCE(request->control->epoch) != request->epoch)
		return BPFUSE_MISS_RACE;
	return BPFUSE_ANSWERED;
}

#endif
