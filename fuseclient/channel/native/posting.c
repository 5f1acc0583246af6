// SPDX-License-Identifier: Apache-2.0
/*
 * Writes that are answered as soon as they are on their way to the worker: it has granted that it takes so many bytes of
 * a file without a word, in the padding of its reply to a write before (fuse_write_out). So a program that writes on does
 * not wait for another process each time. What is sent on the socket is taken in order, so whatever is asked of the file
 * after the write was answered, is asked after the worker has taken it. How it fails is told as for all that waits in
 * the worker's memory: by the next write that waits, by fsync and by close.
 *
 * The worker cannot refuse such a write, nor have it wait. So a grant ends when a handle of the file is released, when
 * something is appended to it, when its locks change (writing under one that is lost is to be refused), when its worker
 * is lost, and when it is used up; then a write waits, and may bring the next.
 * Small ones that follow each other are gathered here and sent as one, before anything else is sent, and after GATHER_MS:
 * waking the worker is what costs.
 * All with the lock held.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "channel_internal.h"

/* Nothing that a handle says of itself, as opposed to its inode, its worker and what it may do. */
#define HANDLE_ONLY (0xffull << BPFUSE_FH_SERIAL_SHIFT)

enum { FAR_BITS = 55 }; /* files are not so long by far that an offset below could be refused */

static struct posting *posting_of(struct bpfuse_channel *channel, uint64_t handle)
{
	for (uint32_t i = 0; i < POSTINGS; i++)
		if (channel->postings[i].key == (handle & ~HANDLE_ONLY))
			return &channel->postings[i];
	return NULL;
}

/* Whether a write need not wait for the worker. */
bool posting_covers(struct bpfuse_channel *channel, const struct fuse_write_in *in)
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

	if (posting)
		posting->credit -= in->size;
	channel->figures.posted++;
}

static uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Sends what is gathered. Returns 0, or -EAGAIN if it has to wait, as must all else then. */
int posting_flush(struct bpfuse_channel *channel)
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

/* Whether something has been gathered for long enough. */
bool posting_is_due(const struct bpfuse_channel *channel)
{
	return channel->gathering.in.size && now_ms() - channel->gathering.since_ms >= GATHER_MS;
}

/* Takes a posted write of at most half of what there is room for. Returns 0, or -EAGAIN with nothing done. */
int posting_gather(struct bpfuse_channel *channel, const struct fuse_in_header *header, const struct fuse_write_in *in,
		   const void *data)
{
	struct gathering *gathering = &channel->gathering;
	bool follows = in->fh == gathering->in.fh && in->offset == gathering->in.offset + gathering->in.size;

	if ((!follows || gathering->in.size > BPFUSE_MAX_WRITE - in->size) && posting_flush(channel))
		return -EAGAIN;
	if (!gathering->in.size) {
		gathering->header = *header;
		gathering->in = *in;
		gathering->in.size = gathering->in.padding = 0;
		gathering->since_ms = now_ms();
	}
	memcpy(gathering->bytes + gathering->in.size, data, in->size);
	gathering->in.size += in->size;
	gathering->in.padding++;
	/* If it cannot be sent yet, it is with the next, or when the bridge looks. */
	if (gathering->in.size > BPFUSE_MAX_WRITE - in->size)
		posting_flush(channel);
	return 0;
}

/* No more writes of a handle's file are posted. */
void posting_end(struct bpfuse_channel *channel, uint64_t handle)
{
	struct posting *posting = posting_of(channel, handle);

	if (posting)
		*posting = (struct posting){ 0 };
}

void posting_end_all(struct bpfuse_channel *channel)
{
	memset(channel->postings, 0, sizeof(channel->postings));
	channel->gathering.in.size = 0;
}

/*
 * The worker takes `credit` bytes. Not while something is being appended: it may have been sent after the write whose
 * reply this is, and be where the next posted one would have to wait for it.
 */
void posting_grant(struct bpfuse_channel *channel, uint64_t handle, uint32_t credit)
{
	struct posting *posting = posting_of(channel, handle);

	if (!credit || channel->appends)
		return;
	if (!posting)
		posting = &channel->postings[channel->next_posting++ % POSTINGS];
	*posting = (struct posting){ .key = handle & ~HANDLE_ONLY, .credit = credit };
}
