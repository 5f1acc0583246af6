// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Answers FUSE requests in the kernel.
 *
 * 1. The channel gives FUSE-over-io_uring buffers that lie in `entries`. When the kernel has put a request there it
 *    posts a completion, and the tracepoint runs in the context of the thread that owns the ring, before that thread
 *    can see the completion.
 * 2. The tracepoint fires for every io_uring on the machine: user_data and the owner's process are compared first.
 * 3. answer() takes the request apart and asks the topic headers; what they find in the maps becomes a finished
 *    reply, in place, and `answered` is set. The thread only commits it, and clears `answered` before it does: the
 *    kernel may skip a run of a tracing program.
 *    The kernel allows 512 bytes of stack along any chain of calls, so what needs much of it is not inlined here.
 * 4. A miss leaves the request as it came (READ and others that carry no payload may find theirs overwritten), and the
 *    thread forwards it to the worker. Every outcome is counted by opcode.
 */
#include <asm/errno.h>
#include <linux/bpf.h>
#include <linux/fuse.h>
#include <linux/io_uring.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include "abi.h"
#include "compat.bpf.h"
#include "maps.bpf.h"
#include "request.bpf.h"
#include "attrs.bpf.h"
#include "busy.bpf.h"
#include "data.bpf.h"
#include "handles.bpf.h"
#include "listings.bpf.h"
#include "names.bpf.h"
#include "statfs.bpf.h"
#include "xattrs.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

static const struct bpfuse_control *get_control(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

static void count(__u32 opcode, __u32 outcome)
{
	__u32 index = (opcode < BPFUSE_OPCODES ? opcode : 0) * BPFUSE_OUTCOMES + outcome;
	__u64 *counter = bpf_map_lookup_elem(&counters, &index);

	if (counter)
		*counter += 1;
}

static void begin(struct request *request, const struct bpfuse_control *control, struct bpfuse_entry *entry)
{
	const struct fuse_in_header *in = (const void *)entry->uring.in_out;
	__u64 deadline = READ_ONCE(control->deadline), longest = READ_ONCE(control->kernel_ttl_max);

	request->now = bpf_ktime_get_boot_ns();
	request->left = deadline > request->now ? deadline - request->now : 0;
	request->ttl = request->left < longest ? request->left : longest;
	request->entry = entry;
	request->control = control;
	request->nodeid = in->nodeid;
	request->epoch = READ_ONCE(control->epoch);
	request->length = in->len;
	request->payload_size = entry->uring.payload_size;
	request->reply_size = 0;
	request->error = 0;
	request->group = 0;
}

/* There are no ioctls, and the worker would say so too. Python's open() makes one for each file: is it a terminal? */
static enum bpfuse_outcome answer_ioctl(struct request *request)
{
	const struct fuse_ioctl_in *in = (const void *)request->entry->uring.op_in;
	enum bpfuse_outcome outcome;

	outcome = check_request(request, sizeof(*in), in->in_size, in->in_size);
	if (outcome == BPFUSE_ANSWERED)
		request->error = -ENOSYS;
	return outcome;
}

static enum bpfuse_outcome dispatch(struct request *request, __u32 opcode)
{
	switch (opcode) {
	case FUSE_LOOKUP:
		return answer_lookup(request);
	case FUSE_GETATTR:
		return answer_getattr(request);
	case FUSE_OPEN:
		return answer_open(request);
	case FUSE_READ:
		return answer_read(request);
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		return answer_release(request);
	case FUSE_GETXATTR:
		return answer_getxattr(request);
	case FUSE_OPENDIR:
		return answer_opendir(request);
	case FUSE_READDIR:
		return answer_listing(request, false);
	case FUSE_READDIRPLUS:
		return answer_listing(request, true);
	case FUSE_READLINK:
		return answer_readlink(request);
	case FUSE_SETXATTR:
		return answer_setxattr(request);
	case FUSE_LISTXATTR:
		return answer_listxattr(request);
	case FUSE_FLUSH:
		return answer_flush(request);
	case FUSE_STATFS:
		return answer_statfs(request);
	case FUSE_IOCTL:
		return answer_ioctl(request);
	default:
		return BPFUSE_MISS_OPCODE;
	}
}

/* Requests are numbered in steps of two. */
static void remember(__u64 unique)
{
	__u32 slot = unique / 2 & (BPFUSE_RECENT_SLOTS - 1);
	__u64 *recently = bpf_map_lookup_elem(&recent, &slot);

	if (recently)
		WRITE_ONCE(*recently, unique);
}

static void finish(struct request *request)
{
	struct bpfuse_uring_header *uring = &request->entry->uring;
	struct fuse_out_header *out = (void *)uring->in_out;

	out->len = sizeof(*out) + request->reply_size;
	out->error = request->error; /* `unique` stands where the request had it */
	uring->payload_size = request->reply_size;
	note_use(request);
	remember(out->unique);
	WRITE_ONCE(request->entry->answered, 1);
}

static bool is_answer(enum bpfuse_outcome outcome)
{
	return outcome == BPFUSE_ANSWERED || outcome == BPFUSE_ANSWERED_ABSENT ||
	       outcome == BPFUSE_ANSWERED_PASSTHROUGH;
}

static enum bpfuse_outcome answer(const struct bpfuse_control *control, struct bpfuse_entry *entry)
{
	const struct fuse_in_header *in = (const void *)entry->uring.in_out;
	__u32 opcode = in->opcode, process = in->pid;
	enum bpfuse_outcome outcome;
	struct request request;

	entry->answered = 0;
	begin(&request, control, entry);
	outcome = dispatch(&request, opcode);
	entry->outcome = outcome;
	count(opcode, outcome);
	watch(&request, process, is_answer(outcome));
	if (is_answer(outcome))
		finish(&request);
	return outcome;
}

static int complete(__u64 user_data, __s32 result)
{
	const struct bpfuse_control *control;
	struct bpfuse_entry *entry;
	__u32 index = user_data;

	if (user_data >> 32 != BPFUSE_MAGIC_FUSE || result < 0)
		return 0;
	control = get_control();
	if (!control || bpf_get_current_pid_tgid() >> 32 != control->owner_tgid)
		return 0;
	entry = bpf_map_lookup_elem(&entries, &index);
	if (entry)
		answer(control, entry);
	return 0;
}

SEC("tp_btf/io_uring_complete")
int on_complete_cqe(const __u64 *arguments)
{
	const struct io_uring_cqe *cqe = (const void *)arguments[2];

	return complete(cqe->user_data, cqe->res);
}

SEC("tp_btf/io_uring_complete")
int on_complete_fields(const __u64 *arguments)
{
	return complete(arguments[2], arguments[3]);
}

/* Runs answer() on an entry, for the tests; returns the outcome, or -ENOENT if there is no such entry. */
SEC("syscall")
int test_answer(struct bpfuse_test_args *args)
{
	const struct bpfuse_control *control = get_control();
	__u32 index = args->entry;
	struct bpfuse_entry *entry = bpf_map_lookup_elem(&entries, &index);

	return control && entry ? (int)answer(control, entry) : -ENOENT;
}

/* Makes the calling process the one whose completions are answered, by its number in the first pid namespace. */
SEC("syscall")
int adopt_owner(const void *unused)
{
	struct bpfuse_control *control = (struct bpfuse_control *)get_control();

	(void)unused;
	if (!control)
		return -ENOENT;
	control->owner_tgid = bpf_get_current_pid_tgid() >> 32;
	return 0;
}

SEC("syscall")
int count_maps(struct bpfuse_map_counts *counts)
{
	counts->names = bpf_map_sum_elem_count((const struct bpf_map *)&names);
	counts->inodes = bpf_map_sum_elem_count((const struct bpf_map *)&inodes);
	return 0;
}
