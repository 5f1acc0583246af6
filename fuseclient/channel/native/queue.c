// SPDX-License-Identifier: Apache-2.0
/*
 * The rings of FUSE-over-io_uring: one queue for each possible CPU, served by one thread bound to that CPU, because
 * the kernel queues a request on the CPU that made it and waking another CPU is what costs. By the time the thread
 * sees a completion the BPF program has answered the request in its entry, or has left it untouched.
 *
 * Protocol: fuse_uring.c of Linux 6.14 and later. REGISTER hands an entry to the kernel, COMMIT_AND_FETCH gives a
 * reply back and the entry with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "channel_internal.h"

enum { URING_REGISTER = 1, URING_COMMIT_AND_FETCH = 2 };

struct uring_command {
	uint64_t flags, commit_id;
	uint16_t queue;
	uint8_t padding[6];
};

/* Reads a CPU list such as "0-3,8" from sysfs into `set`. Returns the highest CPU, or a negative errno. */
static int cpu_list_read(const char *path, cpu_set_t *set)
{
	FILE *file = fopen(path, "re");
	unsigned first, last;
	int highest = -EINVAL;

	if (!file)
		return -errno;
	CPU_ZERO(set);
	while (fscanf(file, "%u", &first) == 1) {
		int separator = fgetc(file);

		last = first;
		if (separator == '-') {
			if (fscanf(file, "%u", &last) != 1)
				break;
			separator = fgetc(file);
		}
		for (unsigned cpu = first; cpu <= last && cpu < CPU_SETSIZE; cpu++) {
			CPU_SET(cpu, set);
			highest = (int)cpu;
		}
		if (separator != ',')
			break;
	}
	fclose(file);
	return highest;
}

/*
 * Plans one queue a possible CPU; those of CPUs that are not online get one entry, which the kernel demands.
 * `out` may be NULL to count only. Returns 0 or a negative errno.
 */
int queue_layout(uint32_t depth, struct queue **out, uint32_t *queues, uint32_t *entries)
{
	cpu_set_t possible, online;
	int highest = cpu_list_read("/sys/devices/system/cpu/possible", &possible);
	int error = cpu_list_read("/sys/devices/system/cpu/online", &online);
	struct queue *planned;

	if (highest < 0 || error < 0)
		return highest < 0 ? highest : error;
	planned = calloc((size_t)highest + 1, sizeof(*planned));
	if (!planned)
		return -ENOMEM;
	*queues = (uint32_t)highest + 1;
	*entries = 0;
	for (uint32_t i = 0; i < *queues; i++) {
		planned[i].id = i;
		planned[i].online = CPU_ISSET(i, &online);
		planned[i].first = *entries;
		planned[i].count = planned[i].online ? depth : 1;
		*entries += planned[i].count;
	}
	if (out)
		*out = planned;
	else
		free(planned);
	return 0;
}

__u32 bpfuse_channel_entries(__u32 depth)
{
	uint32_t queues, entries;

	return queue_layout(depth, NULL, &queues, &entries) ? 0 : entries;
}

int queue_of_entry(const struct bpfuse_channel *channel, uint32_t entry)
{
	for (uint32_t i = 0; i < channel->queue_count; i++)
		if (entry - channel->queues[i].first < channel->queues[i].count)
			return (int)i;
	return -ENOENT;
}

static void count_ring_error(struct bpfuse_channel *channel)
{
	pthread_mutex_lock(&channel->lock);
	channel->figures.ring_errors++;
	pthread_mutex_unlock(&channel->lock);
}

/* Prepares a command for an entry. The ring has room for one command an entry, and no entry has two. */
static struct io_uring_sqe *queue_command(struct queue *queue, uint32_t operation, uint32_t entry, uint64_t commit_id)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&queue->ring);
	struct uring_command command = { .commit_id = commit_id, .queue = (uint16_t)queue->id };

	if (!sqe) {
		io_uring_submit(&queue->ring);
		sqe = io_uring_get_sqe(&queue->ring);
	}
	if (!sqe)
		return NULL;
	memset(sqe, 0, 2 * sizeof(*sqe));
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = queue->channel->device;
	sqe->off = operation;
	sqe->user_data = (uint64_t)BPFUSE_MAGIC_FUSE << 32 | entry;
	memcpy(sqe->cmd, &command, sizeof(command));
	return sqe;
}

static int queue_register(struct queue *queue)
{
	struct bpfuse_channel *channel = queue->channel;

	for (uint32_t i = 0; i < queue->count; i++) {
		struct bpfuse_entry *entry = &channel->entries[queue->first + i];
		struct io_uring_sqe *sqe = queue_command(queue, URING_REGISTER, queue->first + i, 0);

		if (!sqe)
			return -EBUSY;
		queue->vectors[i][0] = (struct iovec){ &entry->uring, sizeof(entry->uring) };
		queue->vectors[i][1] = (struct iovec){ entry->payload, sizeof(entry->payload) };
		sqe->addr = (uintptr_t)queue->vectors[i];
		sqe->len = 2;
	}
	int submitted = io_uring_submit(&queue->ring);

	if (submitted < 0)
		return submitted;
	queue->live = queue->count;
	return (uint32_t)submitted == queue->count ? 0 : -EIO;
}

static void queue_commit(struct queue *queue, uint32_t index)
{
	struct bpfuse_entry *entry = &queue->channel->entries[index];

	entry->answered = 0;
	if (!queue_command(queue, URING_COMMIT_AND_FETCH, index, entry->uring.commit_id)) {
		count_ring_error(queue->channel);
		queue->live--;
		return;
	}
	atomic_fetch_add_explicit(&queue->channel->committed, 1, memory_order_relaxed);
}

/* Answers a request with an error. */
static void queue_refuse(struct queue *queue, uint32_t index, int error)
{
	struct bpfuse_entry *entry = &queue->channel->entries[index];
	const struct fuse_in_header *in = (void *)entry->uring.in_out;
	struct fuse_out_header out = { .len = sizeof(out), .error = error, .unique = in->unique };

	memcpy(entry->uring.in_out, &out, sizeof(out));
	entry->uring.payload_size = 0;
	queue_commit(queue, index);
}

static void queue_answer(struct queue *queue, uint32_t index, const struct answer *answer)
{
	struct bpfuse_entry *entry = &queue->channel->entries[index];
	size_t body = answer->header.len - sizeof(answer->header);

	memcpy(entry->uring.in_out, &answer->header, sizeof(answer->header));
	memcpy(entry->payload, (const uint8_t *)answer + sizeof(answer->header), body);
	entry->uring.payload_size = (uint32_t)body;
	queue_commit(queue, index);
}

static void queue_complete(struct queue *queue, const struct io_uring_cqe *cqe)
{
	uint32_t index = (uint32_t)cqe->user_data, magic = (uint32_t)(cqe->user_data >> 32);

	if (index - queue->first >= queue->count || (magic != BPFUSE_MAGIC_FUSE && magic != BPFUSE_MAGIC_WAKE)) {
		count_ring_error(queue->channel);
		return;
	}
	if (magic == BPFUSE_MAGIC_FUSE && cqe->res < 0) {
		/* The entry is gone: the mount has ended (ENOTCONN, or ECANCELED with the ring), or this is a fault. */
		if (cqe->res != -ENOTCONN && cqe->res != -ECANCELED)
			count_ring_error(queue->channel);
		queue->live--;
		return;
	}
	if (magic == BPFUSE_MAGIC_WAKE) {
		if (atomic_exchange_explicit(&queue->channel->pendings[index]->replied, false, memory_order_acquire))
			queue_commit(queue, index);
	} else if (queue->channel->entries[index].answered) {
		queue_commit(queue, index);
	} else {
		struct answer answer = { 0 };
		int error = bridge_forward_entry(queue->channel, index, &answer);

		if (error)
			queue_refuse(queue, index, error);
		else if (answer.header.len)
			queue_answer(queue, index, &answer);
	}
}

static int queue_open(struct queue *queue)
{
	struct io_uring_params params = {
		.flags = IORING_SETUP_SQE128 | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
			 IORING_SETUP_CQSIZE,
		.cq_entries = 4 * queue->count,
	};
	cpu_set_t cpus;
	int error;

	if (queue->online) {
		CPU_ZERO(&cpus);
		CPU_SET(queue->id, &cpus);
		if (!pthread_setaffinity_np(pthread_self(), sizeof(cpus), &cpus))
			atomic_fetch_add(&queue->channel->pinned, 1);
	}
	queue->vectors = calloc(queue->count, sizeof(*queue->vectors));
	if (!queue->vectors)
		return -ENOMEM;
	error = io_uring_queue_init_params(queue->count, &queue->ring, &params);
	queue->ring_open = !error;
	return error ? error : queue_register(queue);
}

void *queue_serve(void *argument)
{
	struct queue *queue = argument;
	struct bpfuse_channel *channel = queue->channel;
	int error = queue_open(queue);

	pthread_mutex_lock(&channel->lock);
	channel->queues_reported++;
	if (!channel->start_error)
		channel->start_error = error;
	pthread_cond_signal(&channel->queue_reported);
	pthread_mutex_unlock(&channel->lock);
	while (!error && queue->live) {
		struct io_uring_cqe *cqe;
		unsigned head, seen = 0;

		error = io_uring_submit_and_wait(&queue->ring, 1);
		if (error == -EINTR || error == -EAGAIN || error == -EBUSY || error > 0)
			error = 0;
		io_uring_for_each_cqe(&queue->ring, head, cqe) {
			queue_complete(queue, cqe);
			seen++;
		}
		io_uring_cq_advance(&queue->ring, seen);
	}
	if (error)
		count_ring_error(channel);
	return NULL;
}
