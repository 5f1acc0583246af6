/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * OPEN for reading, OPENDIR, and RELEASE, RELEASEDIR and FLUSH of the handles they gave out: BPFUSE_FH_KERNEL_BIT and
 * the inode, and of a directory which listing it was opened for. Each such handle is counted in `opens` until its release, so that the worker knows which inodes are in use.
 *
 * The kernel refuses an open in passthrough of an inode that is open cached, and the other way round. The worker sees
 * to it that an inode's value says the same as long as it is open.
 */
#ifndef BPFUSE_HANDLES_BPF_H
#define BPFUSE_HANDLES_BPF_H

#include <asm/fcntl.h>
#include "hash.h"
#include "request.bpf.h"

#define FH_KERNEL     (1ULL << BPFUSE_FH_KERNEL_BIT)
#define FH_INODE      ((1ULL << 48) - 1)
#define FH_LISTING    (((1ULL << BPFUSE_FH_LISTING_BITS) - 1) << BPFUSE_FH_LISTING_BIT)
/* The kernel's __FMODE_EXEC: the file is opened to be executed. */
#define OPEN_FOR_EXEC 040
/* What may stand in the flags of an open that is answered here; all else is for the worker to see. */
#define OPEN_HARMLESS \
	(O_LARGEFILE | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOATIME | O_NOCTTY | O_SYNC | OPEN_FOR_EXEC)

/* Of fuse_open_out.open_flags, since Linux 6.9; the backing id then stands in the last word. */
#define OPEN_PASSTHROUGH (1 << 7)

/* What a directory's handle says of its listing. */
static __u64 fh_of_listing(const struct bpfuse_inode_value *inode)
{
	return (__u64)inode->listing << BPFUSE_FH_LISTING_BIT & FH_LISTING;
}

static enum bpfuse_outcome answer_any_open(struct request *request, __u32 type, __u32 allowed, __u32 reply_flags)
{
	const struct fuse_open_in *in = (const void *)request->entry->uring.op_in;
	struct fuse_open_out *out = (void *)request->entry->payload;
	__u32 slot = bpfuse_open_slot(request->nodeid);
	struct bpfuse_inode_value inode;
	enum bpfuse_outcome outcome;
	__u64 *count;

	outcome = check_request(request, sizeof(*in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (in->flags & ~allowed || in->open_flags)
		return BPFUSE_MISS_FLAGS;
	outcome = inode_peek(request, request->nodeid, &inode);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if ((inode.mode & MODE_TYPE) != type || inode.flags & BPFUSE_INODE_WORKER_OPENS)
		return BPFUSE_MISS_FLAGS;
	count = bpf_map_lookup_elem(&opens, &slot);
	if (!count)
		return BPFUSE_MISS_HELPER;
	__sync_fetch_and_add(count, 1);
	/* Who removes the inode drops it first and looks at the count after that: one of the two sees the other. */
	if (!inode_still(request->nodeid, inode.version)) {
		__sync_fetch_and_add(count, -1);
		return BPFUSE_MISS_RACE;
	}
	out->fh = FH_KERNEL | request->nodeid;
	if (type == MODE_DIRECTORY)
		out->fh |= fh_of_listing(&inode);
	out->open_flags = inode.backing_id ? OPEN_PASSTHROUGH | FOPEN_NOFLUSH : reply_flags;
	out->padding = inode.backing_id;
	request->reply_size = sizeof(*out);
	return inode.backing_id ? BPFUSE_ANSWERED_PASSTHROUGH : BPFUSE_ANSWERED;
}

static enum bpfuse_outcome answer_open(struct request *request)
{
	return answer_any_open(request, MODE_REGULAR, OPEN_HARMLESS, FOPEN_KEEP_CACHE | FOPEN_NOFLUSH);
}

static enum bpfuse_outcome answer_opendir(struct request *request)
{
	return answer_any_open(request, MODE_DIRECTORY, OPEN_HARMLESS | O_DIRECTORY,
			       FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE);
}

static enum bpfuse_outcome answer_release(struct request *request)
{
	const struct fuse_release_in *in = (const void *)request->entry->uring.op_in;
	__u32 slot = bpfuse_open_slot(in->fh & FH_INODE);
	enum bpfuse_outcome outcome;
	__u64 *count;

	outcome = check_request(request, sizeof(*in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!(in->fh & FH_KERNEL))
		return BPFUSE_MISS_HANDLE;
	if (in->release_flags & FUSE_RELEASE_FLOCK_UNLOCK)
		return BPFUSE_MISS_FLAGS;
	count = bpf_map_lookup_elem(&opens, &slot);
	if (!count)
		return BPFUSE_MISS_HELPER;
	if (__sync_fetch_and_add(count, -1) == 0) /* a handle that was never counted: the count stays right */
		__sync_fetch_and_add(count, 1);
	return BPFUSE_ANSWERED;
}

static enum bpfuse_outcome answer_flush(struct request *request)
{
	const struct fuse_flush_in *in = (const void *)request->entry->uring.op_in;
	enum bpfuse_outcome outcome;

	outcome = check_request(request, sizeof(*in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	return in->fh & FH_KERNEL ? BPFUSE_ANSWERED : BPFUSE_MISS_HANDLE;
}

#endif
