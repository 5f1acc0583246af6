// SPDX-License-Identifier: Apache-2.0
/*
 * Attributes of new files: while the worker has told nobody of a file that was made here, whatever becomes of its
 * attributes comes by way of the channel, which began with those in the reply to CREATE. So it says what they are, and
 * answers changes of them, if the worker has granted that (enum bpfuse_grant), by itself; the changes of one file are gathered
 * and sent as one, behind the writes that came before, as posting.c does with those.
 *
 * What is sent says when each write and change was made, so that the worker comes to the same attributes, to the
 * nanosecond: what is answered here and what it answers later differ in nothing.
 *
 * That ends for good with the first request that names the inode and is sent for an answer, whatever it does (but not GETXATTR,
 * which the kernel asks before each write), with a write that leaves a hole, of which only the worker knows how much is
 * stored, and with all else that ends what is granted. The worker takes it back before it tells anybody of the file, so
 * a request that names it otherwise (UNLINK, RENAME, LINK, another client's) needs no care here.
 * All with the lock held.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>

#include "channel_internal.h"

enum {
	SECOND_NS = 1000000000,
	BLOCK = 512, /* bytes, as stat counts them */
	MODE_BITS = 07777,
	FAR_SECOND_BITS = 33 /* times that are farther from 1970 may not be kept as they are */
};

/* What a change may consist of; the time of a change is the channel's to say. */
static const uint32_t CHANGES = FATTR_MODE | FATTR_UID | FATTR_GID | FATTR_ATIME | FATTR_MTIME | FATTR_FH |
				FATTR_ATIME_NOW | FATTR_MTIME_NOW;

static struct posting *known(struct bpfuse_channel *channel, uint64_t ino)
{
	const uint64_t inode_bits = (1ULL << BPFUSE_FH_SERIAL_SHIFT) - 1;

	for (uint32_t i = 0; i < POSTINGS; i++)
		if (channel->postings[i].changes && (channel->postings[i].key & inode_bits) == ino)
			return &channel->postings[i];
	return NULL;
}

/* A file was made, and has these attributes: they are known, unless somebody else has been quick enough to change them. */
void attributes_begin(struct bpfuse_channel *channel, struct posting *posting, const struct fuse_attr *attributes)
{
	for (uint32_t i = 0; i < channel->pending_count; i++)
		if (channel->pendings[i]->state == PENDING_SENT && channel->pendings[i]->nodeid == attributes->ino)
			return;
	posting->changes = !attributes->size;
	posting->attributes = *attributes;
}

/* A request is about to be sent, for an answer unless it is a FORGET. */
void attributes_end(struct bpfuse_channel *channel, const struct pending *pending)
{
	struct posting *posting = known(channel, pending->nodeid);

	if (posting && pending->opcode != FUSE_GETXATTR && pending->origin.kind != PENDING_ONE_WAY)
		posting->changes = false;
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

/* Returns the time of a write or a change that is made now, in ns since 1970: no two of a file's have the same. */
uint64_t attributes_now_ns(const struct posting *posting)
{
	uint64_t now = now_ns(), next;

	if (!posting->changes)
		return now;
	next = posting->attributes.ctime * SECOND_NS + posting->attributes.ctimensec + 1;
	return now > next ? now : next;
}

static void changed_at(struct fuse_attr *attributes, uint64_t at_ns)
{
	attributes->ctime = at_ns / SECOND_NS;
	attributes->ctimensec = (uint32_t)(at_ns % SECOND_NS);
}

/* A write was posted, whose `lock_owner` is its time. */
void attributes_written(struct posting *posting, const struct fuse_write_in *in)
{
	struct fuse_attr *attributes = &posting->attributes;

	if (!posting->changes)
		return;
	if (in->offset > attributes->size) {
		posting->changes = false;
		return;
	}
	if (attributes->size < in->offset + in->size)
		attributes->size = in->offset + in->size;
	attributes->blocks = (attributes->size + BLOCK - 1) / BLOCK;
	changed_at(attributes, in->lock_owner);
	attributes->mtime = attributes->ctime;
	attributes->mtimensec = attributes->ctimensec;
}

static bool is_near(uint64_t seconds)
{
	int64_t far = 1LL << FAR_SECOND_BITS;

	return (int64_t)seconds > -far && (int64_t)seconds < far;
}

/* Takes a change over to where others lie: to the attributes, and to what is sent. `at_ns` is its time. */
static void merge(struct fuse_attr *attributes, struct fuse_setattr_in *change, const struct fuse_setattr_in *in,
		  uint64_t at_ns)
{
	uint64_t now = at_ns / SECOND_NS;
	uint32_t now_nsec = (uint32_t)(at_ns % SECOND_NS);

	if (in->valid & FATTR_MODE) {
		change->mode = in->mode;
		attributes->mode = (attributes->mode & S_IFMT) | (in->mode & MODE_BITS);
	}
	if (in->valid & FATTR_UID)
		attributes->uid = change->uid = in->uid;
	if (in->valid & FATTR_GID)
		attributes->gid = change->gid = in->gid;
	if (in->valid & (FATTR_ATIME | FATTR_ATIME_NOW)) {
		attributes->atime = change->atime = in->valid & FATTR_ATIME_NOW ? now : in->atime;
		attributes->atimensec = change->atimensec = in->valid & FATTR_ATIME_NOW ? now_nsec : in->atimensec;
		change->valid |= FATTR_ATIME;
	}
	if (in->valid & (FATTR_MTIME | FATTR_MTIME_NOW)) {
		attributes->mtime = change->mtime = in->valid & FATTR_MTIME_NOW ? now : in->mtime;
		attributes->mtimensec = change->mtimensec = in->valid & FATTR_MTIME_NOW ? now_nsec : in->mtimensec;
		change->valid |= FATTR_MTIME;
	}
	changed_at(attributes, at_ns);
	change->ctime = now;
	change->ctimensec = now_nsec;
	change->valid |= (in->valid & (FATTR_MODE | FATTR_UID | FATTR_GID)) | FATTR_CTIME;
	change->padding++;
}

/* Takes a change of attributes. Returns 0, or -EAGAIN with nothing done. */
static int gather(struct bpfuse_channel *channel, struct posting *posting, const struct fuse_in_header *header,
		  const struct fuse_setattr_in *in)
{
	struct gathering *gathering = &channel->gathering;

	if (gathering->change.padding && gathering->change_header.nodeid != header->nodeid && posting_flush(channel))
		return -EAGAIN;
	posting_begin(gathering);
	if (!gathering->change.padding) {
		gathering->change_header = *header;
		gathering->change_header.len = sizeof(gathering->change_header) + sizeof(gathering->change);
		gathering->change = (struct fuse_setattr_in){ 0 };
	}
	merge(&posting->attributes, &gathering->change, in, attributes_now_ns(posting));
	return 0;
}

/* Sends the changes that are gathered. Returns 0 or -EAGAIN. */
int attributes_flush(struct bpfuse_channel *channel)
{
	struct gathering *gathering = &channel->gathering;
	struct iovec parts[] = {
		{ &gathering->change_header, sizeof(gathering->change_header) },
		{ &gathering->change, sizeof(gathering->change) },
	};
	struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };

	if (!gathering->change.padding)
		return 0;
	if (sendmsg(channel->worker.sockets[LANE_EXTRA], &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		return -EAGAIN;
	gathering->change.padding = 0;
	return 0;
}

/*
 * Answers a request, of which `body` follows the header, if the attributes that it is about are known here. Returns 0,
 * or -EAGAIN if it has to wait. The kernel keeps nothing of the answer: it may have been told of a change on another way.
 */
int attributes_answer(struct bpfuse_channel *channel, const struct pending *pending,
		      const struct fuse_in_header *header, struct iovec body, struct answer *answer)
{
	const struct fuse_setattr_in *in = body.iov_base;
	struct posting *posting = NULL;

	if (pending->opcode == FUSE_GETATTR || pending->opcode == FUSE_SETATTR)
		posting = known(channel, pending->nodeid);
	if (!posting)
		return 0;
	if (pending->opcode == FUSE_SETATTR) {
		if (body.iov_len < sizeof(*in) || in->valid & ~CHANGES || !is_near(in->atime) || !is_near(in->mtime))
			return 0;
		if (gather(channel, posting, header, in))
			return -EAGAIN;
		channel->figures.forwarded[FUSE_SETATTR]++;
		channel->figures.changed++;
	} else {
		channel->figures.told++;
	}
	*answer = answer_of(pending, sizeof(answer->attributes));
	answer->attributes.attr = posting->attributes;
	return 0;
}
