/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* GETXATTR and LISTXATTR of inodes that are known to have no xattrs. */
#ifndef BPFUSE_XATTRS_BPF_H
#define BPFUSE_XATTRS_BPF_H

#include <asm/errno.h>
#include "request.bpf.h"

static enum bpfuse_outcome has_no_xattrs(const struct request *request)
{
	struct bpfuse_inode_value inode;
	enum bpfuse_outcome outcome = inode_peek_any(request, request->nodeid, &inode);

	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!(inode.flags & BPFUSE_INODE_NO_XATTRS))
		return BPFUSE_MISS_XATTRS;
	return inode_still(request->nodeid, inode.version) ? BPFUSE_ANSWERED : BPFUSE_MISS_RACE;
}

/* A name that ends before differs by its NUL. By hand: a freestanding compiler makes a call of memcmp. */
static __always_inline bool same4(const __u8 *name, char a, char b, char c, char d)
{
	return name[0] == a && name[1] == b && name[2] == c && name[3] == d;
}

/* Whether the name is of a kind that an inode can have, or an access control list. Others the worker refuses. */
static bool is_xattr_name(const struct request *request)
{
	const __u8 *name = request->entry->payload;

	if (same4(name, 'u', 's', 'e', 'r'))
		return name[4] == '.' && name[5];
	if (same4(name, 't', 'r', 'u', 's'))
		return same4(name + 4, 't', 'e', 'd', '.') && name[8];
	if (same4(name, 's', 'e', 'c', 'u'))
		return same4(name + 4, 'r', 'i', 't', 'y') && name[8] == '.' && name[9];
	return same4(name, 's', 'y', 's', 't') && same4(name + 4, 'e', 'm', '.', 'p') &&
	       same4(name + 8, 'o', 's', 'i', 'x') && same4(name + 12, '_', 'a', 'c', 'l') && name[16] == '_';
}

static __noinline enum bpfuse_outcome answer_getxattr(struct request *request)
{
	enum bpfuse_outcome outcome;

	outcome = check_request(request, sizeof(struct fuse_getxattr_in), 2, BPFUSE_NAME_MAX + 1);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!is_xattr_name(request))
		return BPFUSE_MISS_FLAGS;
	outcome = has_no_xattrs(request);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	request->error = -ENODATA;
	return BPFUSE_ANSWERED_ABSENT;
}

static __noinline enum bpfuse_outcome answer_listxattr(struct request *request)
{
	const struct fuse_getxattr_in *in = (const void *)request->entry->uring.op_in;
	struct fuse_getxattr_out *out = (void *)request->entry->payload;
	enum bpfuse_outcome outcome;

	outcome = check_request(request, sizeof(*in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	outcome = has_no_xattrs(request);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (in->size) /* an empty list */
		return BPFUSE_ANSWERED;
	out->size = 0; /* its size was asked for */
	out->padding = 0;
	request->reply_size = sizeof(*out);
	return BPFUSE_ANSWERED;
}

#endif
