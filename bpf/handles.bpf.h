/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * OPEN for reading, OPENDIR, and RELEASE, RELEASEDIR and FLUSH of the handles they gave out: BPFUSE_FH_KERNEL_BIT, a
 * serial number (with a directory's version, and so that of its listing) and the inode. Each such handle is counted in `opens` until its release, so that the worker knows which
 * inodes are in use.
 *
 * Closing a file ends locks. Where programs of this mount have some (`opens` says so, by a hash of the inode), FLUSH and
 * RELEASE go to the worker, and handles are given out of which the kernel sends FLUSH at all.
 *
 * The kernel refuses an open in passthrough of an inode that is open cached, and the other way round. The worker sees
 * to it that an inode's value says the same as long as it is open.
 */
#ifndef BPFUSE_HANDLES_BPF_H
#define BPFUSE_HANDLES_BPF_H

#include <asm/errno.h>
#include <asm/fcntl.h>
#include "hash.h"
#include "request.bpf.h"

#define FH_KERNEL     (1ULL << BPFUSE_FH_KERNEL_BIT)
#define FH_INODE      ((1ULL << BPFUSE_FH_SERIAL_SHIFT) - 1)
#define SERIAL_MAX    ((1ULL << (BPFUSE_FH_KERNEL_BIT - BPFUSE_FH_SERIAL_SHIFT)) - 1)
#define FH_VERSION    ((1U << BPFUSE_FH_VERSION_BITS) - 1)
/* The kernel's __FMODE_EXEC: the file is opened to be executed. */
#define OPEN_FOR_EXEC 040
/* What may stand in the flags of an open that is answered here; all else is for the worker to see. */
#define OPEN_HARMLESS \
	(O_LARGEFILE | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOATIME | O_NOCTTY | O_SYNC | OPEN_FOR_EXEC)

/* Of fuse_open_out.open_flags, since Linux 6.9; the backing id then stands in the last word. */
#define OPEN_PASSTHROUGH (1 << 7)

static enum bpfuse_outcome answer_any_open(struct request *request, __u32 type, __u32 allowed, __u32 reply_flags)
{
	const struct fuse_open_in *in = (const void *)request->entry->uring.op_in;
	struct fuse_open_out *out = (void *)request->entry->payload;
	__u32 slot = bpfuse_open_slot(request->nodeid);
	struct bpfuse_inode_value inode;
	enum bpfuse_outcome outcome;
	struct bpfuse_open_slot *open;
	__u32 backing;
	__u64 serial;

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
	open = bpf_map_lookup_elem(&opens, &slot);
	if (!open)
		return BPFUSE_MISS_HELPER;
	__sync_fetch_and_add(&open->handles, 1);
	/* Who removes the inode drops it first and looks at the count after that: one of the two sees the other. */
	if (!inode_still(request->nodeid, inode.version)) {
		__sync_fetch_and_add(&open->handles, -1);
		return BPFUSE_MISS_RACE;
	}
	serial = __sync_fetch_and_add(&open->serial, 1);
	if (type == MODE_DIRECTORY)
		serial = serial << BPFUSE_FH_VERSION_BITS | (inode.file_version & FH_VERSION);
	out->fh = FH_KERNEL | (serial & SERIAL_MAX) << BPFUSE_FH_SERIAL_SHIFT | request->nodeid;
	backing = type == MODE_REGULAR ? inode.device : 0;
	out->open_flags = backing ? OPEN_PASSTHROUGH | FOPEN_NOFLUSH : reply_flags;
	if (READ_ONCE(open->locks))
		out->open_flags &= ~FOPEN_NOFLUSH;
	out->padding = backing;
	request->reply_size = sizeof(*out);
	return backing ? BPFUSE_ANSWERED_PASSTHROUGH : BPFUSE_ANSWERED;
}

/* Whether the kernel is to do without opening and closing from now on; `outcome` then is what that comes to. */
static bool opens_nothing(struct request *request, __u32 op, enum bpfuse_outcome *outcome)
{
	if (request->control->profile != BPFUSE_PROFILE_DATASET)
		return false;
	*outcome = check_request(request, op, 0, 0);
	request->error = -ENOSYS;
	return true;
}

static enum bpfuse_outcome answer_open(struct request *request)
{
	enum bpfuse_outcome outcome;

	if (opens_nothing(request, sizeof(struct fuse_open_in), &outcome))
		return outcome;
	return answer_any_open(request, MODE_REGULAR, OPEN_HARMLESS, FOPEN_KEEP_CACHE | FOPEN_NOFLUSH);
}

static enum bpfuse_outcome answer_opendir(struct request *request)
{
	enum bpfuse_outcome outcome;

	if (opens_nothing(request, sizeof(struct fuse_open_in), &outcome))
		return outcome;
	return answer_any_open(request, MODE_DIRECTORY, OPEN_HARMLESS | O_DIRECTORY,
			       FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE);
}

static enum bpfuse_outcome answer_release(struct request *request)
{
	const struct fuse_release_in *in = (const void *)request->entry->uring.op_in;
	__u32 slot = bpfuse_open_slot(in->fh & FH_INODE);
	struct bpfuse_open_slot *open;
	enum bpfuse_outcome outcome;

	outcome = check_request(request, sizeof(*in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!(in->fh & FH_KERNEL))
		return BPFUSE_MISS_HANDLE;
	if (in->release_flags & FUSE_RELEASE_FLOCK_UNLOCK)
		return BPFUSE_MISS_FLAGS;
	open = bpf_map_lookup_elem(&opens, &slot);
	if (!open)
		return BPFUSE_MISS_HELPER;
	if (READ_ONCE(open->locks))
		return BPFUSE_MISS_FLAGS;
	if (__sync_fetch_and_add(&open->handles, -1) == 0) /* a handle that was never counted: the count stays right */
		__sync_fetch_and_add(&open->handles, 1);
	return BPFUSE_ANSWERED;
}

static enum bpfuse_outcome answer_flush(struct request *request)
{
	const struct fuse_flush_in *in = (const void *)request->entry->uring.op_in;
	__u32 slot = bpfuse_open_slot(in->fh & FH_INODE);
	const struct bpfuse_open_slot *open;
	enum bpfuse_outcome outcome;

	if (opens_nothing(request, sizeof(*in), &outcome))
		return outcome;
	outcome = check_request(request, sizeof(*in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!(in->fh & FH_KERNEL))
		return BPFUSE_MISS_HANDLE;
	open = bpf_map_lookup_elem(&opens, &slot);
	if (!open)
		return BPFUSE_MISS_HELPER;
	return READ_ONCE(open->locks) ? BPFUSE_MISS_FLAGS : BPFUSE_ANSWERED;
}

#endif
