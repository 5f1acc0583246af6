/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * One request while it is being answered, and what every kind of answer needs: the shape of the request, values read
 * by the seqlock rule of abi.h, the time-to-live of a reply.
 *
 * An answer reads with *_peek, works, and then asks *_still whether what it read was whole: what lies between the two
 * may be torn and may only be used with care. The reply goes into the payload after that, or, where a request has no
 * payload of its own, before. The header is written last, by answer(), so that a miss leaves the request as it came.
 */
#ifndef BPFUSE_REQUEST_BPF_H
#define BPFUSE_REQUEST_BPF_H

#include <linux/fuse.h>
#include "compat.bpf.h"
#include "maps.bpf.h"

#define MODE_TYPE      0170000
#define MODE_DIRECTORY 0040000
#define MODE_REGULAR   0100000
#define MODE_SYMLINK   0120000

struct request {
	struct bpfuse_entry *entry;
	const struct bpfuse_control *control;
	__u64 nodeid;
	__u64 now, left; /* ns; CLOCK_BOOTTIME, and what is left of the lease */
	__u64 ttl;       /* ns; how long a reply may be believed */
	__u32 epoch;
	__u32 length, payload_size; /* as they came */
	__u32 reply_size;           /* of the payload */
	__s32 error;
	__u32 group; /* of what was asked for */
};

/*
 * What every answer asks first: whether the session's lease still runs, and whether the request consists of an op
 * header of `op` bytes and a payload of `least` to `most` bytes.
 */
static enum bpfuse_outcome check_request(const struct request *request, __u32 op, __u32 least, __u32 most)
{
	if (!request->left)
		return BPFUSE_MISS_DEADLINE;
	if (request->payload_size < least || request->payload_size > most ||
	    request->length != sizeof(struct fuse_in_header) + op + request->payload_size)
		return BPFUSE_MISS_MALFORMED;
	return BPFUSE_ANSWERED;
}

static bool inode_still(__u64 ino, __u64 version)
{
	const struct bpfuse_inode_value *value;

	read_barrier();
	value = bpf_map_lookup_elem(&inodes, &ino);
	return value && READ_ONCE(value->version) == version;
}

/* The value as it is: of an inode that is open for writing it has a mode of 0, and says only whether there are xattrs. */
static enum bpfuse_outcome inode_peek_any(struct request *request, __u64 ino, struct bpfuse_inode_value *out)
{
	const struct bpfuse_inode_value *value = bpf_map_lookup_elem(&inodes, &ino);
	__u64 version;

	if (!value)
		return BPFUSE_MISS_INODE;
	version = READ_ONCE(value->version);
	read_barrier();
	__builtin_memcpy(out, value, sizeof(*out));
	barrier();
	out->version = version;
	request->group = out->group;
	return out->epoch == request->epoch ? BPFUSE_ANSWERED : BPFUSE_MISS_EPOCH;
}

static enum bpfuse_outcome inode_peek(struct request *request, __u64 ino, struct bpfuse_inode_value *out)
{
	enum bpfuse_outcome outcome = inode_peek_any(request, ino, out);

	return outcome == BPFUSE_ANSWERED && !out->mode ? BPFUSE_MISS_FLAGS : outcome;
}

/* Notes that the group is in use: of what is cold the worker gives up first. */
static void note_use(const struct request *request)
{
	__u64 now = request->now >> BPFUSE_USE_SHIFT;
	__u32 group = request->group;
	__u64 *use = bpf_map_lookup_elem(&uses, &group);

	if (group && use && READ_ONCE(*use) != now)
		WRITE_ONCE(*use, now);
}

static __u64 ttl_seconds(const struct request *request)
{
	return request->ttl / 1000000000;
}

static __u32 ttl_nanoseconds(const struct request *request)
{
	return request->ttl % 1000000000;
}

#endif
