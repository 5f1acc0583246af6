/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * LOOKUP. The name lies in the payload, with its NUL, which payload_size counts.
 *
 * A name that is not in `names` is absent if its directory is whole (abi.h). A lookup may miss an element that is replaced
 * on another CPU meanwhile: the new one is put in front of where the lookup is, and the old one taken from behind. So this is
 * said only if nothing changed in `names` from before the name was looked for until after the mark was found.
 */
#ifndef BPFUSE_NAMES_BPF_H
#define BPFUSE_NAMES_BPF_H

#include "attrs.bpf.h"
#include "hash.h"

static enum bpfuse_outcome name_peek(struct request *request, const struct bpfuse_name_key *key,
				     struct bpfuse_name_value *out)
{
	const struct bpfuse_name_value *value = bpf_map_lookup_elem(&names, key);

	if (!value)
		return BPFUSE_MISS_NAME;
	out->version = READ_ONCE(value->version);
	read_barrier();
	out->ino = READ_ONCE(value->ino);
	out->epoch = READ_ONCE(value->epoch);
	request->group = READ_ONCE(value->group);
	return out->epoch == request->epoch ? BPFUSE_ANSWERED : BPFUSE_MISS_EPOCH;
}

static bool name_still(const struct bpfuse_name_key *key, __u64 version)
{
	const struct bpfuse_name_value *value;

	read_barrier();
	value = bpf_map_lookup_elem(&names, key);
	return value && READ_ONCE(value->version) == version;
}

static void fill_entry(struct request *request, __u64 ino)
{
	struct fuse_entry_out *out = (void *)request->entry->payload;

	out->nodeid = ino;
	out->generation = 0;
	out->entry_valid = out->attr_valid = ttl_seconds(request);
	out->entry_valid_nsec = out->attr_valid_nsec = ttl_nanoseconds(request);
	request->reply_size = sizeof(*out);
}

static enum bpfuse_outcome answer_absent(struct request *request, const struct bpfuse_name_key *key, __u64 version)
{
	struct fuse_entry_out *out = (void *)request->entry->payload;

	if (!name_still(key, version))
		return BPFUSE_MISS_RACE;
	fill_entry(request, 0);
	__builtin_memset(&out->attr, 0, sizeof(out->attr));
	return BPFUSE_ANSWERED_ABSENT;
}

static enum bpfuse_outcome answer_found(struct request *request, const struct bpfuse_name_key *key,
					const struct bpfuse_name_value *name)
{
	struct fuse_entry_out *out = (void *)request->entry->payload;
	struct bpfuse_inode_value inode;
	enum bpfuse_outcome outcome = inode_peek(request, name->ino, &inode);

	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!inode_still(name->ino, inode.version) || !name_still(key, name->version))
		return BPFUSE_MISS_RACE;
	fill_entry(request, name->ino);
	fill_attr(&out->attr, name->ino, &inode);
	return BPFUSE_ANSWERED;
}

/* "." and "..", which an exported file system is asked for, and which no directory has in `names`. */
static bool is_dots(const __u8 *name, __u32 length)
{
	return name[0] == '.' && (length == 1 || (length == 2 && name[1] == '.'));
}

/* Of a name that was not found after `changes` was read. */
static enum bpfuse_outcome answer_unknown(struct request *request, __u64 changes)
{
	const struct bpfuse_name_key whole = { .parent = request->nodeid };
	struct fuse_entry_out *out = (void *)request->entry->payload;
	struct bpfuse_name_value mark;
	enum bpfuse_outcome outcome = name_peek(request, &whole, &mark);

	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (is_dots(request->entry->payload, request->payload_size - 1))
		return BPFUSE_MISS_NAME;
	read_barrier();
	if (changes % 2 || READ_ONCE(request->control->names_changes) != changes)
		return BPFUSE_MISS_RACE;
	fill_entry(request, 0);
	__builtin_memset(&out->attr, 0, sizeof(out->attr));
	return BPFUSE_ANSWERED_ABSENT;
}

static __noinline enum bpfuse_outcome answer_lookup(struct request *request)
{
	struct bpfuse_name_key key = { .parent = request->nodeid };
	__u32 length = request->payload_size - 1;
	struct bpfuse_name_value name;
	enum bpfuse_outcome outcome;
	__u64 changes;

	outcome = check_request(request, 0, 2, BPFUSE_NAME_MAX + 1);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (length > BPFUSE_NAME_MAX || request->entry->payload[length])
		return BPFUSE_MISS_MALFORMED;
	bpfuse_siphash((const __u64 *)request->entry->payload, length, request->control->hash_key, key.hash);
	changes = READ_ONCE(request->control->names_changes);
	read_barrier();
	outcome = name_peek(request, &key, &name);
	if (outcome == BPFUSE_MISS_NAME)
		return answer_unknown(request, changes);
	if (outcome != BPFUSE_ANSWERED)
		return outcome;
	if (!name.ino)
		return answer_absent(request, &key, name.version);
	return answer_found(request, &key, &name);
}

#endif
