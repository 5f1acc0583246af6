// SPDX-License-Identifier: Apache-2.0
/*
 * Writes that are answered as soon as they are on their way to the worker: it has granted that it takes so many bytes of
 * a file without a word, in the last word of its reply to CREATE, OPEN or a write before (enum bpfuse_grant). So a program
 * that writes on does not wait for another process each time. What is sent on the socket is taken in order, so whatever is
 * asked of the file after the write was answered, is asked after the worker has taken it. How it fails is told as for all
 * that waits in the worker's memory: by the next write that waits, by fsync and by close.
 *
 * The worker cannot refuse such a write, nor have it wait. So a grant ends when a handle of the file is released, when
 * something is appended to it, when its locks change (writing under one that is lost is to be refused), when its worker
 * is lost, and when it is used up, which it is not as long as the worker says in time what it has taken; then a write waits,
 * and may bring the next. What ends a grant withholds others until it
 * is answered: the worker may have sent one before it knew. The worker itself takes grants back by a message that comes
 * after those it sent.
 * Small ones that follow each other are gathered here and sent as one, before anything else is sent, and after GATHER_MS:
 * waking the worker is what costs.
 *
 * They carry the time at which they were answered, in place of the owner of locks.
 *
 * A FLUSH is answered here, and not sent, if the worker has granted that, for files up to a size: it has nothing to do
 * for it, and can fail in nothing. That goes with all that is granted. For attributes see attributes.c.
 * All with the lock held.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "channel_internal.h"

#define APPENDS          (1ULL << BPFUSE_FH_APPENDS_BIT)
/* Nothing that a handle says of itself, as opposed to its inode, its worker and what it may do. */
#define HANDLE_ONLY      (0xffull << BPFUSE_FH_SERIAL_SHIFT)
#define FH_INODE         ((1ULL << BPFUSE_FH_SERIAL_SHIFT) - 1)
/* Of fuse_open_out.open_flags, since Linux 6.9; the backing id then stands in the last word. */
#define OPEN_PASSTHROUGH (1 << 7)

enum { FAR_BITS = 55 }; /* files are not so long by far that an offset below could be refused */

static struct posting *posting_of(struct bpfuse_channel *channel, uint64_t handle)
{
	for (uint32_t i = 0; i < POSTINGS; i++)
		if (channel->postings[i].key == (handle & ~HANDLE_ONLY))
			return &channel->postings[i];
	return NULL;
}

/* No more writes of a handle's file are posted. */
static void posting_end(struct bpfuse_channel *channel, uint64_t handle)
{
	struct posting *posting = posting_of(channel, handle);

	if (posting)
		*posting = (struct posting){ 0 };
}

/* Nor are those of any handle of an inode; 0: of any inode. */
void posting_end_inode(struct bpfuse_channel *channel, uint64_t ino)
{
	for (uint32_t i = 0; i < POSTINGS; i++)
		if (!ino || (channel->postings[i].key & FH_INODE) == (ino & FH_INODE))
			channel->postings[i] = (struct posting){ 0 };
}

/* Whether a write need not wait for the worker. */
static bool posting_covers(struct bpfuse_channel *channel, const struct fuse_write_in *in)
{
	const struct posting *posting = posting_of(channel, in->fh);

	/* The kernel writes back pages when the worker asks for it, and answers that on another socket. */
	if (in->write_flags & FUSE_WRITE_CACHE)
		return false;
	return posting && in->size && posting->credit >= in->size && !(in->offset >> FAR_BITS);
}

/* A write was sent that nobody waits for. */
void posting_spend(struct bpfuse_channel *channel, const struct fuse_write_in *in)
{
	struct posting *posting = posting_of(channel, in->fh);

	if (posting) {
		posting->credit -= in->size;
		attributes_written(posting, in);
	}
	channel->figures.posted++;
}

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Something is about to be gathered. */
void posting_begin(struct gathering *gathering)
{
	if (!is_gathered(gathering))
		gathering->since_ms = now_ms();
}

static int flush_writes(struct bpfuse_channel *channel)
{
	struct gathering *gathering = &channel->gathering;
	struct iovec parts[] = {
		{ &gathering->header, sizeof(gathering->header) },
		{ &gathering->in, sizeof(gathering->in) },
		{ gathering->bytes, gathering->in.size },
	};
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 3 };

	if (!gathering->in.size)
		return 0;
	gathering->header.len = (uint32_t)(sizeof(gathering->header) + sizeof(gathering->in) + gathering->in.size);
	if (sendmsg(channel->worker.sockets[LANE_EXTRA], &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		return -EAGAIN;
	gathering->in.size = 0;
	return 0;
}

/* Sends what is gathered. Returns 0, or -EAGAIN if it has to wait, as must all else then. */
int posting_flush(struct bpfuse_channel *channel)
{
	return flush_writes(channel) ? -EAGAIN : attributes_flush(channel);
}

/* Whether something has been gathered for long enough. */
bool posting_is_due(const struct bpfuse_channel *channel)
{
	return is_gathered(&channel->gathering) && now_ms() - channel->gathering.since_ms >= GATHER_MS;
}

/* Takes a posted write of at most half of what there is room for. Returns 0, or -EAGAIN with nothing done. */
int posting_gather(struct bpfuse_channel *channel, const struct fuse_in_header *header, const struct fuse_write_in *in,
		   const void *data)
{
	struct gathering *gathering = &channel->gathering;
	bool follows = in->fh == gathering->in.fh && in->offset == gathering->in.offset + gathering->in.size;

	if (gathering->change.padding || gathering->in.size > BPFUSE_MAX_WRITE - in->size)
		follows = false;
	if (!follows && posting_flush(channel))
		return -EAGAIN;
	if (!gathering->in.size) {
		posting_begin(gathering);
		gathering->header = *header;
		gathering->in = *in;
		gathering->in.size = gathering->in.padding = 0;
	}
	gathering->in.lock_owner = in->lock_owner;
	memcpy(gathering->bytes + gathering->in.size, data, in->size);
	gathering->in.size += in->size;
	gathering->in.padding++;
	/* If it cannot be sent yet, it is with the next, or when the bridge looks. */
	if (gathering->in.size > BPFUSE_MAX_WRITE - in->size)
		posting_flush(channel);
	return 0;
}

void posting_lost(struct bpfuse_channel *channel)
{
	posting_end_inode(channel, 0);
	channel->gathering.in.size = channel->gathering.change.padding = 0;
}

/* A request is about to be sent that ends what is granted of its inode, and withholds what is granted meanwhile. */
static void posting_withhold(struct bpfuse_channel *channel, struct pending *pending)
{
	channel->withholding += !pending->withholds;
	pending->withholds = true;
}

static bool is_withheld(const struct bpfuse_channel *channel, uint64_t ino)
{
	for (uint32_t i = 0; channel->withholding && i < channel->pending_count; i++)
		if (channel->pendings[i]->withholds && (channel->pendings[i]->nodeid & FH_INODE) == (ino & FH_INODE))
			return true;
	return false;
}

/*
 * Prepares a request, of which `body` follows the header, for all this. Returns the write if nobody is to wait for it.
 * The bytes may be sent again later, so they are to say each time whether that is so.
 */
struct fuse_write_in *posting_prepare(struct bpfuse_channel *channel, struct pending *pending, struct iovec body,
				      bool may_post)
{
	struct fuse_write_in *in = body.iov_base;
	struct posting *posting;

	if (pending->opcode == FUSE_SETLK || pending->opcode == FUSE_SETLKW) {
		posting_end_inode(channel, pending->nodeid);
		posting_withhold(channel, pending);
	} else if (pending->opcode == FUSE_RELEASE && body.iov_len >= sizeof(in->fh)) {
		posting_end(channel, in->fh);
		posting_withhold(channel, pending);
	}
	if (pending->opcode != FUSE_WRITE || body.iov_len < sizeof(*in)) {
		attributes_end(channel, pending);
		return NULL;
	}
	pending->handle = in->fh;
	in->padding = 0;
	if (in->fh & APPENDS) {
		posting_end(channel, in->fh);
		posting_withhold(channel, pending);
		return NULL;
	}
	posting = posting_of(channel, in->fh);
	if (posting && posting->end < in->offset + in->size)
		posting->end = in->offset + in->size;
	if (!may_post || !posting_covers(channel, in)) {
		attributes_end(channel, pending);
		return NULL;
	}
	in->padding = 1;
	in->lock_owner = attributes_now_ns(posting);
	return in;
}

/* Whether a request is a FLUSH that is not to be sent. */
bool posting_closes(struct bpfuse_channel *channel, const struct pending *pending, struct iovec body)
{
	const struct fuse_flush_in *in = body.iov_base;
	const struct posting *posting = NULL;

	if (pending->opcode == FUSE_FLUSH && body.iov_len >= sizeof(*in))
		posting = posting_of(channel, in->fh);
	return posting && posting->closes && posting->end <= posting->closes;
}

static struct posting *posting_grant(struct bpfuse_channel *channel, uint64_t ino, uint64_t handle, uint32_t grant)
{
	uint32_t credit = (grant & BPFUSE_GRANT_MOST) * BPFUSE_GRANT_UNIT;
	uint64_t closes = (uint64_t)(grant >> BPFUSE_GRANT_CLOSE_SHIFT & BPFUSE_GRANT_MOST) * BPFUSE_GRANT_UNIT;
	struct posting *posting = posting_of(channel, handle);

	if (!credit || is_withheld(channel, ino)) {
		posting_end(channel, handle);
		return NULL;
	}
	if (!posting) {
		posting = posting_of(channel, 0); /* one that is free */
		if (!posting)
			posting = &channel->postings[channel->next_posting++ % POSTINGS];
		*posting = (struct posting){ .key = handle & ~HANDLE_ONLY };
	}
	posting->credit = credit;
	posting->closes = closes;
	return posting;
}

/* The worker has taken so much of what was posted: it takes as much again, unless the grant has ended. */
void posting_renew(struct bpfuse_channel *channel, const struct bpfuse_renewed *renewed)
{
	struct posting *posting = posting_of(channel, renewed->handle);
	uint64_t credit = (uint64_t)renewed->units * BPFUSE_GRANT_UNIT;

	if (!posting || !posting->key)
		return;
	credit += posting->credit;
	if (credit > BPFUSE_GRANT_MOST * BPFUSE_GRANT_UNIT)
		credit = BPFUSE_GRANT_MOST * BPFUSE_GRANT_UNIT;
	posting->credit = (uint32_t)credit;
}

/* A request was answered: its reply may grant something, which is not for the kernel to see. */
void posting_take_grant(struct bpfuse_channel *channel, const struct pending *pending, struct fuse_out_header *reply)
{
	size_t length = reply->len - sizeof(*reply);
	struct fuse_entry_out *entry = (void *)(reply + 1);
	struct fuse_write_out *written = (void *)(reply + 1);
	struct fuse_open_out *opened = (void *)(reply + 1);
	struct posting *posting;
	uint64_t ino = pending->nodeid;
	uint32_t grant;

	if (reply->error)
		return;
	if (pending->opcode == FUSE_WRITE && length == sizeof(*written)) {
		/* That of a write to the end is withheld by itself. */
		posting_grant(channel, ino, pending->handle, written->padding);
		written->padding = 0;
		return;
	}
	if (pending->opcode == FUSE_CREATE && length == sizeof(*entry) + sizeof(*opened)) {
		opened = (void *)(entry + 1);
		ino = entry->nodeid;
	} else if (pending->opcode != FUSE_OPEN || length != sizeof(*opened)) {
		return;
	}
	if (opened->open_flags & OPEN_PASSTHROUGH)
		return;
	grant = (uint32_t)opened->padding;
	opened->padding = 0;
	posting = posting_grant(channel, ino, opened->fh, grant);
	if (posting && pending->opcode == FUSE_CREATE && grant >> BPFUSE_GRANT_CHANGES_BIT)
		attributes_begin(channel, posting, &entry->attr);
}
