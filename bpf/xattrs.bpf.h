/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* GETXATTR and LISTXATTR of inodes that are known to have no xattrs. */
#ifndef BPFUSE_XATTRS_BPF_H
#define BPFUSE_XATTRS_BPF_H

#include <asm/errno.h>
#include "request.bpf.h"

static enum bpfuse_outcome has_no_xattrs(const struct request *request)
{
	struct bpfuse_inode_value inode;
	enum bpfuse_outcome outcome = inode_peek(request, request->nodeid, &inode);

	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!(inode.flags & BPFUSE_INODE_NO_XATTRS))
		return BPFUSE_MISS_XATTRS;
	return inode_still(request->nodeid, inode.version) ? BPFUSE_ANSWERED : BPFUSE_MISS_RACE;
}

static enum bpfuse_outcome answer_getxattr(struct request *request)
{
	enum bpfuse_outcome outcome;

	outcome = check_request(request, sizeof(struct fuse_getxattr_in), 2, BPFUSE_NAME_MAX + 1);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	outcome = has_no_xattrs(request);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	request->error = -ENODATA;
	return BPFUSE_ANSWERED_ABSENT;
}

static enum bpfuse_outcome answer_listxattr(struct request *request)
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
