/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* STATFS, from the control page. */
#ifndef BPFUSE_STATFS_BPF_H
#define BPFUSE_STATFS_BPF_H

#include "request.bpf.h"

static __noinline enum bpfuse_outcome answer_statfs(struct request *request)
{
	struct fuse_statfs_out *out = (void *)request->entry->payload;
	const struct bpfuse_statfs *now = &request->control->statfs;
	struct bpfuse_statfs copy;
	enum bpfuse_outcome outcome;

	outcome = check_request(request, 0, 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	copy.seq = READ_ONCE(now->seq);
	read_barrier();
	copy.bsize = now->bsize;
	copy.frsize = now->frsize;
	copy.namelen = now->namelen;
	copy.blocks = now->blocks;
	copy.bfree = now->bfree;
	copy.bavail = now->bavail;
	copy.files = now->files;
	copy.ffree = now->ffree;
	copy.valid_until = now->valid_until;
	read_barrier();
	if (copy.seq & 1 || READ_ONCE(now->seq) != copy.seq)
		return BPFUSE_MISS_RACE;
	if (request->now >= copy.valid_until)
		return BPFUSE_MISS_DATA;
	__builtin_memset(out, 0, sizeof(*out));
	out->st.blocks = copy.blocks;
	out->st.bfree = copy.bfree;
	out->st.bavail = copy.bavail;
	out->st.files = copy.files;
	out->st.ffree = copy.ffree;
	out->st.bsize = copy.bsize;
	out->st.namelen = copy.namelen;
	out->st.frsize = copy.frsize;
	request->reply_size = sizeof(*out);
	return BPFUSE_ANSWERED;
}

#endif
