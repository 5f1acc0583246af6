/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * READ and READLINK, from `pages`. An extent's pages lie one after another in memory, so one copy takes them all. The
 * worker takes an extent from its inode before it overwrites the pages, so the inode is looked at again after the copy;
 * and the epoch too, since a new epoch frees every extent at once.
 */
#ifndef BPFUSE_DATA_BPF_H
#define BPFUSE_DATA_BPF_H

#include "request.bpf.h"

/* Copies `count` bytes of an inode's content, from `offset` on, to the payload. All that comes from `inode` may be torn. */
static enum bpfuse_outcome copy_content(struct request *request, const struct bpfuse_inode_value *inode, __u32 offset,
					__u32 count)
{
	__u32 first = inode->first_page, last = first + (inode->data_bytes - 1) / BPFUSE_PAGE;
	const struct bpfuse_page *page;

	if (!count)
		return BPFUSE_ANSWERED;
	page = bpf_map_lookup_elem(&pages, &last);
	if (!page || last < first)
		return BPFUSE_MISS_DATA;
	page = bpf_map_lookup_elem(&pages, &first);
	if (!page)
		return BPFUSE_MISS_DATA;
	if (count > BPFUSE_MAX_DATA)
		return BPFUSE_MISS_DATA;
	if (bpf_probe_read_kernel(request->entry->payload, count, page->bytes + offset))
		return BPFUSE_MISS_HELPER;
	return BPFUSE_ANSWERED;
}

/* Answers with the content of an inode of type `type`, from `offset` on and at most `size` bytes. */
static enum bpfuse_outcome answer_content(struct request *request, __u32 type, __u64 offset, __u32 size)
{
	struct bpfuse_inode_value inode;
	enum bpfuse_outcome outcome;
	__u32 count;

	outcome = inode_peek(request, request->nodeid, &inode);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if ((inode.mode & MODE_TYPE) != type)
		return BPFUSE_MISS_FLAGS;
	if (!(inode.flags & BPFUSE_INODE_HAS_DATA) || inode.data_bytes > BPFUSE_MAX_DATA)
		return BPFUSE_MISS_DATA;
	if (offset > inode.data_bytes)
		offset = inode.data_bytes;
	count = inode.data_bytes - offset;
	if (count > size)
		count = size;
	outcome = copy_content(request, &inode, offset, count);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!inode_still(request->nodeid, inode.version) || READ_ONCE(request->control->epoch) != request->epoch)
		return BPFUSE_MISS_RACE;
	request->reply_size = count;
	return BPFUSE_ANSWERED;
}

static enum bpfuse_outcome answer_read(struct request *request)
{
	const struct fuse_read_in *in = (const void *)request->entry->uring.op_in;
	enum bpfuse_outcome outcome;

	outcome = check_request(request, sizeof(*in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (in->offset >> 63 || in->size > BPFUSE_PAYLOAD)
		return BPFUSE_MISS_RANGE;
	return answer_content(request, MODE_REGULAR, in->offset, in->size);
}

static enum bpfuse_outcome answer_readlink(struct request *request)
{
	enum bpfuse_outcome outcome;

	outcome = check_request(request, 0, 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	return answer_content(request, MODE_SYMLINK, 0, BPFUSE_PAGE - 1);
}

#endif
