/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * GETXATTR and LISTXATTR of inodes that are known to have no xattrs, or whose xattrs are all in `xattrs`. Of access
 * control lists there are none, anywhere, and none can be set, as cp -p tries with each file.
 */
#ifndef BPFUSE_XATTRS_BPF_H
#define BPFUSE_XATTRS_BPF_H

#include <asm/errno.h>
#include "hash.h"
#include "request.bpf.h"

/* Whether an inode is known to have no xattrs. */
static enum bpfuse_outcome has_no_xattrs(struct request *request, bool *none)
{
	struct bpfuse_inode_value inode;
	enum bpfuse_outcome outcome = inode_peek_any(request, request->nodeid, &inode);

	*none = false;
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!inode_still(request->nodeid, inode.version))
		return BPFUSE_MISS_RACE;
	*none = inode.flags & BPFUSE_INODE_NO_XATTRS;
	return BPFUSE_ANSWERED;
}

/* The xattrs of the inode asked for; what is read from there may be torn. */
struct found_xattrs {
	const struct bpfuse_xattrs_value *value;
	__u64 version;
};

static enum bpfuse_outcome xattrs_find(const struct request *request, struct found_xattrs *found)
{
	found->value = bpf_map_lookup_elem(&xattrs, &request->nodeid);
	if (!found->value)
		return BPFUSE_MISS_XATTRS;
	found->version = READ_ONCE(found->value->version);
	read_barrier();
	return READ_ONCE(found->value->epoch) == request->epoch ? BPFUSE_ANSWERED : BPFUSE_MISS_EPOCH;
}

static bool xattrs_still(const struct request *request, const struct found_xattrs *found)
{
	const struct bpfuse_xattrs_value *value;

	read_barrier();
	value = bpf_map_lookup_elem(&xattrs, &request->nodeid);
	return value && READ_ONCE(value->version) == found->version;
}

/*
 * Answers with `size` bytes of the found ones' bytes, or with their number. A miss must leave the name in the payload
 * as it is, so they are copied behind it first.
 */
static enum bpfuse_outcome reply_bytes(struct request *request, const struct found_xattrs *found, __u32 offset,
				       __u32 size)
{
	const struct fuse_getxattr_in *in = (const void *)request->entry->uring.op_in;
	struct fuse_getxattr_out *out = (void *)request->entry->payload;
	__u8 *copy = request->entry->payload + BPFUSE_PAGE;

	if (size > BPFUSE_XATTR_BYTES || offset > BPFUSE_XATTR_BYTES || offset + size > BPFUSE_XATTR_BYTES)
		return BPFUSE_MISS_RACE;
	if (bpf_probe_read_kernel(copy, size, found->value->bytes + offset))
		return BPFUSE_MISS_HELPER;
	if (!xattrs_still(request, found))
		return BPFUSE_MISS_RACE;
	if (!in->size) {
		out->size = size;
		out->padding = 0;
		request->reply_size = sizeof(*out);
	} else if (size > in->size) {
		request->error = -ERANGE;
	} else {
		if (bpf_probe_read_kernel(request->entry->payload, size, copy))
			return BPFUSE_MISS_HELPER;
		request->reply_size = size;
	}
	return BPFUSE_ANSWERED;
}

/* A name that ends before differs by its NUL. By hand: a freestanding compiler makes a call of memcmp. */
static __always_inline bool same4(const __u8 *name, char a, char b, char c, char d)
{
	return name[0] == a && name[1] == b && name[2] == c && name[3] == d;
}

/* Whether the name is of a kind that an inode can have; others the worker refuses. */
static bool is_xattr_name(const __u8 *name)
{
	if (same4(name, 'u', 's', 'e', 'r'))
		return name[4] == '.' && name[5];
	if (same4(name, 't', 'r', 'u', 's'))
		return same4(name + 4, 't', 'e', 'd', '.') && name[8];
	return same4(name, 's', 'e', 'c', 'u') && same4(name + 4, 'r', 'i', 't', 'y') && name[8] == '.' && name[9];
}

static bool is_acl_name(const __u8 *name)
{
	return same4(name, 's', 'y', 's', 't') && same4(name + 4, 'e', 'm', '.', 'p') &&
	       same4(name + 8, 'o', 's', 'i', 'x') && same4(name + 12, '_', 'a', 'c', 'l') && name[16] == '_';
}

/*
 * SELinux's label. Where SELinux runs it asks a FUSE file system for none, and lets none be set. Elsewhere the label of a file
 * that has none is said to be unsupported, not absent: ls and cp then ask for none on the whole mount.
 */
static bool is_label_name(const __u8 *name)
{
	return same4(name, 's', 'e', 'c', 'u') && same4(name + 4, 'r', 'i', 't', 'y') &&
	       same4(name + 8, '.', 's', 'e', 'l') && same4(name + 12, 'i', 'n', 'u', 'x') && !name[16];
}

static enum bpfuse_outcome answer_no_such_xattr(struct request *request)
{
	request->error = is_label_name(request->entry->payload) ? -EOPNOTSUPP : -ENODATA;
	return BPFUSE_ANSWERED_ABSENT;
}

static enum bpfuse_outcome answer_known_xattr(struct request *request)
{
	const __u64 *name = (const __u64 *)request->entry->payload;
	struct found_xattrs found;
	enum bpfuse_outcome outcome = xattrs_find(request, &found);
	__u64 hash[2];

	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	bpfuse_siphash(name, request->payload_size - 1, request->control->hash_key, hash);
	for (__u32 i = 0; i < BPFUSE_XATTRS; i++) {
		const struct bpfuse_xattr *each = &found.value->entries[i];

		if (i < READ_ONCE(found.value->count) && each->hash[0] == hash[0] && each->hash[1] == hash[1])
			return reply_bytes(request, &found, READ_ONCE(each->offset), READ_ONCE(each->size));
	}
	return xattrs_still(request, &found) ? answer_no_such_xattr(request) : BPFUSE_MISS_RACE;
}

static __noinline enum bpfuse_outcome answer_getxattr(struct request *request)
{
	const __u8 *name = request->entry->payload;
	__u32 length = request->payload_size - 1;
	enum bpfuse_outcome outcome;
	bool none;

	outcome = check_request(request, sizeof(struct fuse_getxattr_in), 2, BPFUSE_NAME_MAX + 1);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (length > BPFUSE_NAME_MAX || name[length])
		return BPFUSE_MISS_MALFORMED;
	if (is_acl_name(name))
		return answer_no_such_xattr(request);
	if (!is_xattr_name(name))
		return BPFUSE_MISS_FLAGS;
	outcome = has_no_xattrs(request, &none);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	return none ? answer_no_such_xattr(request) : answer_known_xattr(request);
}

static __noinline enum bpfuse_outcome answer_setxattr(struct request *request)
{
	enum bpfuse_outcome outcome = check_request(request, FUSE_COMPAT_SETXATTR_IN_SIZE, 2, BPFUSE_PAYLOAD);

	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!is_acl_name(request->entry->payload))
		return BPFUSE_MISS_FLAGS;
	request->error = -EOPNOTSUPP;
	return BPFUSE_ANSWERED;
}

static __noinline enum bpfuse_outcome answer_listxattr(struct request *request)
{
	const struct fuse_getxattr_in *in = (const void *)request->entry->uring.op_in;
	struct fuse_getxattr_out *out = (void *)request->entry->payload;
	enum bpfuse_outcome outcome;
	struct found_xattrs found;
	__u32 size;
	bool none;

	outcome = check_request(request, sizeof(*in), 0, 0);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	outcome = has_no_xattrs(request, &none);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!none) {
		outcome = xattrs_find(request, &found);
		if (outcome != BPFUSE_ANSWERED)
			return outcome;
		size = READ_ONCE(found.value->list_bytes);
		if (size == BPFUSE_XATTRS_UNLISTED)
			return BPFUSE_MISS_XATTRS;
		return reply_bytes(request, &found, 0, size);
	}
	if (in->size) /* an empty list */
		return BPFUSE_ANSWERED;
	out->size = 0; /* its size was asked for */
	out->padding = 0;
	request->reply_size = sizeof(*out);
	return BPFUSE_ANSWERED;
}

#endif
