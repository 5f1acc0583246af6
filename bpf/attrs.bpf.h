/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* GETATTR, and attributes as FUSE wants them. */
#ifndef BPFUSE_ATTRS_BPF_H
#define BPFUSE_ATTRS_BPF_H

#include "request.bpf.h"

static void fill_attr(struct fuse_attr *attr, __u64 ino, const struct bpfuse_inode_value *inode)
{
	attr->ino = ino;
	attr->size = inode->size;
	attr->blocks = (inode->stored >> 9) + !!(inode->stored & 511);
	attr->atime = inode->atime;
	attr->mtime = inode->mtime;
	attr->ctime = inode->ctime;
	attr->atimensec = inode->atimensec;
	attr->mtimensec = inode->mtimensec;
	attr->ctimensec = inode->ctimensec;
	attr->mode = inode->mode;
	attr->nlink = inode->nlink;
	attr->uid = inode->uid;
	attr->gid = inode->gid;
	attr->rdev = (inode->mode & MODE_TYPE) == MODE_REGULAR ? 0 : inode->device;
	attr->blksize = BPFUSE_PAGE;
	attr->flags = 0;
}

static __noinline enum bpfuse_outcome answer_getattr(struct request *request)
{
	struct fuse_attr_out *out = (void *)request->entry->payload;
	struct bpfuse_inode_value inode;
	enum bpfuse_outcome outcome;

	outcome = check_request(request, sizeof(struct fuse_getattr_in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	outcome = inode_peek(request, request->nodeid, &inode);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!inode_still(request->nodeid, inode.version))
		return BPFUSE_MISS_RACE;
	out->attr_valid = ttl_seconds(request);
	out->attr_valid_nsec = ttl_nanoseconds(request);
	out->dummy = 0;
	fill_attr(&out->attr, request->nodeid, &inode);
	request->reply_size = sizeof(*out);
	return BPFUSE_ANSWERED;
}

#endif
