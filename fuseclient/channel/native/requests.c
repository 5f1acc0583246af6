// SPDX-License-Identifier: Apache-2.0
/*
 * What the bridge knows of requests: where the parts of a classic message lie, what it says to the worker that the kernel
 * does not, on which of the two sockets it goes, and whether a second worker may get it, too.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>

#include "channel_internal.h"

#define APPENDS (1ULL << BPFUSE_FH_APPENDS_BIT)

enum {
	COPY_FILE_RANGE_64 = 53, /* of protocol 7.45; Debian 12's <linux/fuse.h> has 7.38 */
};

/* Describes the classic message of a request that lies in a ring entry. Returns 0, or -EIO for impossible sizes. */
int request_of_entry(struct request *request, struct bpfuse_entry *entry)
{
	const struct fuse_in_header *header = (void *)entry->uring.in_out;
	size_t payload = entry->uring.payload_size, operation;

	if (payload > sizeof(entry->payload) || header->len < sizeof(*header) + payload)
		return -EIO;
	operation = header->len - sizeof(*header) - payload;
	if (operation > sizeof(entry->uring.op_in))
		return -EIO;
	request->header = *header;
	request->parts[1] = (struct iovec){ entry->uring.op_in, operation };
	request->parts[2] = (struct iovec){ entry->payload, payload };
	request->count = 3;
	return 0;
}

void request_of_copy(struct request *request, const struct pending *pending)
{
	memcpy(&request->header, pending->bytes, sizeof(request->header));
	request->parts[1] = (struct iovec){ (uint8_t *)pending->bytes + sizeof(request->header),
					    pending->length - sizeof(request->header) };
	request->count = 2;
}

/*
 * Says in the handle of a WRITE whether it goes to the end of the file, which libfuse would not tell the worker. It is
 * the request's own flag, as it can be set and cleared while the file is open. What comes from a mapping goes where it is.
 */
static void mark_append(const struct request *request)
{
	struct fuse_write_in *in = request->parts[1].iov_base;

	if (request->header.opcode != FUSE_WRITE || request->parts[1].iov_len < sizeof(*in))
		return;
	in->fh &= ~APPENDS;
	if (in->flags & O_APPEND && !(in->write_flags & FUSE_WRITE_CACHE))
		in->fh |= APPENDS;
}

enum lane request_lane(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_LOOKUP: /* these, and those up to CREATE, are frequent, and pyfuse3 takes long over each */
	case FUSE_GETATTR:
	case FUSE_SETATTR:
	case FUSE_MKDIR:
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_RENAME:
	case FUSE_RENAME2:
	case FUSE_READ:
	case FUSE_WRITE:
	case FUSE_FSYNC:
	case FUSE_CREATE:
	case FUSE_FLUSH:   /* pyfuse3 does not tell of the owners of locks */
	case FUSE_RELEASE: /* the same */
	case FUSE_GETLK:
	case FUSE_SETLK:
	case FUSE_SETLKW:
	case FUSE_OPEN:     /* pyfuse3 cannot answer it with a backing for passthrough */
	case FUSE_SETXATTR: /* pyfuse3 makes two requests of it when it must or must not be there */
	case FUSE_FALLOCATE:
	case FUSE_LSEEK:
	case FUSE_COPY_FILE_RANGE:
	case COPY_FILE_RANGE_64:
	case FUSE_TMPFILE:
		return LANE_EXTRA;
	default:
		return LANE_FUSE;
	}
}

/* Whether a request begins with a handle that the worker may know the inode by. */
static bool has_handle(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_READ:
	case FUSE_FSYNC:
	case FUSE_READDIR:
	case FUSE_FSYNCDIR:
	case FUSE_GETLK:
	case FUSE_SETLK:
	case FUSE_SETLKW:
	case FUSE_IOCTL:
	case FUSE_POLL:
	case FUSE_READDIRPLUS:
	case FUSE_LSEEK:
		return true;
	default:
		return false;
	}
}

/* A mount that opens nothing has handles of 0: the worker is told one that BPF might have given out. */
static void fill_handle(struct request *request)
{
	uint64_t handle;

	if (!has_handle(request->header.opcode) || request->parts[1].iov_len < sizeof(handle))
		return;
	memcpy(&handle, request->parts[1].iov_base, sizeof(handle));
	if (handle)
		return;
	handle = 1ull << BPFUSE_FH_KERNEL_BIT | request->header.nodeid;
	memcpy(request->parts[1].iov_base, &handle, sizeof(handle));
}

/* Puts into the request what the worker is to know, and the kernel says otherwise or not at all. */
void request_complete(struct request *request)
{
	fill_handle(request);
	mark_append(request);
}

/* Returns the bytes of a small write, wherever they lie; NULL: it is not small, or not what it says. */
const void *request_small_data(const struct request *request, const struct fuse_write_in *in)
{
	size_t behind = request->parts[1].iov_len - sizeof(*in);
	bool apart = request->count > 2 && request->parts[2].iov_len;

	if (in->size > BPFUSE_MAX_WRITE / 4 || in->size != (apart ? request->parts[2].iov_len : behind))
		return NULL;
	return apart ? request->parts[2].iov_base : (const void *)(in + 1);
}

/*
 * Requests that may reach a second worker although the first may have carried them out: handles say nothing that a
 * worker has to remember, writing the same bytes or attributes again changes nothing, and of two files without a name
 * one goes with the session.
 */
bool request_is_repeatable(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_SYMLINK:
	case FUSE_MKNOD:
	case FUSE_MKDIR:
	case FUSE_UNLINK:
	case FUSE_RMDIR:
	case FUSE_RENAME:
	case FUSE_RENAME2:
	case FUSE_LINK:
	case FUSE_CREATE:
	case FUSE_SETXATTR:
	case FUSE_REMOVEXATTR:
		return false;
	default:
		return true;
	}
}
