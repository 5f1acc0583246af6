// SPDX-License-Identifier: Apache-2.0
/*
 * The bridge between the kernel and the worker: requests out, over two SOCK_SEQPACKET sockets, one message each;
 * replies in, copied into their ring entry and handed to the queue's owner by IORING_OP_MSG_RING, or written to
 * /dev/fuse. The two sockets are one worker: both take requests once it has answered INIT on the first, the end of
 * either is its end, and whatever waits for a socket waits in one list, in the order of arrival.
 *
 * Any thread sends, under the lock and without blocking; what the socket does not take is held and sent by the bridge
 * thread. That thread alone receives, and alone takes up and gives up workers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "channel_internal.h"

enum {
	INIT_TOKEN = 2, /* below every pending's token, which have a generation of 1 or more */
	WORKER_PROTOCOL_MINOR = 38,
	REPLIES_A_TURN = 64,
	ERROR_LIMIT = 511, /* the kernel takes -511 .. 0 */
};

static void bridge_wake(struct bpfuse_channel *channel)
{
	uint64_t one = 1;

	/* A full counter is readable already. */
	if (write(channel->wake, &one, sizeof(one)) < 0)
		return;
}

/* Sends a message that may be a posted write, or gathers it. Returns 0 or -EAGAIN. */
static int message_send(struct bpfuse_channel *channel, enum lane lane, struct request *request,
			const struct fuse_write_in *posted)
{
	struct msghdr message = { .msg_iov = request->parts, .msg_iovlen = (size_t)request->count };
	const void *data = posted ? request_small_data(request, posted) : NULL;

	if (data)
		return posting_gather(channel, &request->header, posted, data);
	if (posting_flush(channel))
		return -EAGAIN;
	request->parts[0] = (struct iovec){ &request->header, sizeof(request->header) };
	/* A worker that died is noticed where its socket is read; until then its requests wait. */
	if (sendmsg(channel->worker.sockets[lane], &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		return -EAGAIN;
	return 0;
}

/*
 * Sends a pending to the worker; with the lock held. Returns 0, or -EAGAIN if it has to wait. What needs no word of the
 * worker gets its answer, unless that is NULL, and is no pending any more.
 */
static int pending_send(struct bpfuse_channel *channel, struct pending *pending, struct answer *answer)
{
	struct fuse_write_in *posted;
	struct request request = { .count = 0 };

	if (!channel->worker.ready)
		return -EAGAIN;
	if (pending->origin.kind == PENDING_ENTRY)
		request_of_entry(&request, &channel->entries[pending->origin.index]);
	else
		request_of_copy(&request, pending);
	request_complete(&request);
	if (answer && posting_closes(channel, pending, request.parts[1])) {
		channel->figures.flushed++;
		*answer = answer_of(pending, 0);
		pending_finish(channel, pending);
		return 0;
	}
	if (answer && attributes_answer(channel, pending, &request.header, request.parts[1], answer))
		return -EAGAIN;
	if (answer && answer->header.len) {
		pending_finish(channel, pending);
		return 0;
	}
	posted = posting_prepare(channel, pending, request.parts[1], answer);
	if (pending->origin.kind != PENDING_ONE_WAY)
		request.header.unique = pending_token(pending);
	if (pending->tried)
		request.header.opcode = FUSE_SETLK;
	if (message_send(channel, pending->lane, &request, posted))
		return -EAGAIN;
	if (pending->opcode < BPFUSE_OPCODES) /* not what only the two of them know */
		channel->figures.forwarded[pending->opcode]++;
	pending->state = PENDING_SENT;
	if (posted) {
		posting_spend(channel, posted);
		*answer = answer_of(pending, sizeof(answer->written));
		answer->written.size = posted->size;
	}
	if (posted || pending->origin.kind == PENDING_ONE_WAY)
		pending_finish(channel, pending);
	return 0;
}

/* Sends a pending or has it wait, or answers it at once: see pending_send(). */
static void pending_forward(struct bpfuse_channel *channel, struct pending *pending, struct answer *answer)
{
	if (!channel->held_head && !pending_send(channel, pending, answer)) {
		if (is_gathered(&channel->gathering) && !channel->gathering.watched) {
			channel->gathering.watched = true;
			bridge_wake(channel);
		}
		return;
	}
	pending_hold(channel, pending);
	if (channel->worker.ready)
		bridge_wake(channel);
}

static void flush_held(struct bpfuse_channel *channel)
{
	pthread_mutex_lock(&channel->lock);
	while (channel->held_head) {
		struct pending *pending = channel->held_head;

		/* Off the list first: once sent, a pending may be on the list of free copies. */
		pending_unhold(channel, pending);
		if (!pending_send(channel, pending, NULL))
			continue;
		pending->next = channel->held_head;
		if (!channel->held_head)
			channel->held_tail = &pending->next;
		channel->held_head = pending;
		channel->held_count++;
		break;
	}
	pthread_mutex_unlock(&channel->lock);
}

/* Gives a finished entry to the thread that owns its queue. Bridge thread only. */
static void entry_hand_over(struct bpfuse_channel *channel, uint32_t entry)
{
	int queue = queue_of_entry(channel, entry);
	struct io_uring_sqe *sqe = io_uring_get_sqe(&channel->bridge_ring);

	if (!sqe) {
		io_uring_submit(&channel->bridge_ring);
		sqe = io_uring_get_sqe(&channel->bridge_ring);
	}
	if (!sqe || queue < 0) {
		pthread_mutex_lock(&channel->lock);
		channel->figures.ring_errors++;
		pthread_mutex_unlock(&channel->lock);
		return;
	}
	io_uring_prep_msg_ring(sqe, channel->queues[queue].ring.ring_fd, 0, (uint64_t)BPFUSE_MAGIC_WAKE << 32 | entry,
			       0);
	sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
}

static void bridge_submit(struct bpfuse_channel *channel)
{
	struct io_uring_cqe *cqe;
	unsigned head, failed = 0;

	if (!channel->ring_ready)
		return;
	io_uring_submit(&channel->bridge_ring);
	io_uring_for_each_cqe(&channel->bridge_ring, head, cqe)
		failed++;
	if (!failed)
		return;
	io_uring_cq_advance(&channel->bridge_ring, failed);
	pthread_mutex_lock(&channel->lock);
	channel->figures.ring_errors += failed;
	pthread_mutex_unlock(&channel->lock);
}

/* Gives a reply to the kernel. `reply` has room for its header, whose unique becomes the kernel's. */
static void reply_deliver(struct bpfuse_channel *channel, struct origin origin, void *reply, size_t length)
{
	struct fuse_out_header *header = reply;
	struct bpfuse_entry *entry;

	header->unique = origin.unique;
	if (origin.kind == PENDING_COPY) {
		device_write(channel, reply, length);
		return;
	}
	entry = &channel->entries[origin.index];
	memcpy(entry->payload, header + 1, length - sizeof(*header));
	memcpy(entry->uring.in_out, header, sizeof(*header));
	entry->uring.payload_size = (uint32_t)(length - sizeof(*header));
	atomic_store_explicit(&channel->pendings[origin.index]->replied, true, memory_order_release);
	entry_hand_over(channel, origin.index);
}

static void reply_error(struct bpfuse_channel *channel, struct origin origin, int error)
{
	struct fuse_out_header reply = { .len = sizeof(reply), .error = error };

	reply_deliver(channel, origin, &reply, sizeof(reply));
}

static void close_sockets(int sockets[LANES])
{
	for (int lane = 0; lane < LANES; lane++) {
		if (sockets[lane] >= 0)
			close(sockets[lane]);
		sockets[lane] = -1;
	}
}

static void worker_lost(struct bpfuse_channel *channel)
{
	struct pending *refused = NULL, *next;

	pthread_mutex_lock(&channel->lock);
	close_sockets(channel->worker.sockets);
	channel->worker.ready = false;
	posting_lost(channel);
	for (uint32_t i = 0; i < channel->pending_count; i++) {
		struct pending *pending = channel->pendings[i];

		if (pending->state != PENDING_SENT)
			continue;
		pending->generation++;
		if (request_is_repeatable(pending->opcode)) {
			channel->figures.replayed++;
			pending_hold(channel, pending);
			continue;
		}
		channel->figures.refused++;
		pending->next = refused;
		refused = pending;
	}
	for (; refused; refused = next) {
		struct origin origin = refused->origin;

		next = refused->next;
		pending_finish(channel, refused);
		pthread_mutex_unlock(&channel->lock);
		reply_error(channel, origin, -EIO);
		pthread_mutex_lock(&channel->lock);
	}
	pthread_mutex_unlock(&channel->lock);
}

static int worker_send_init(int socket)
{
	struct {
		struct fuse_in_header header;
		struct fuse_init_in init;
	} message = {
		.header = { .len = sizeof(message), .opcode = FUSE_INIT, .unique = INIT_TOKEN },
		.init = {
			.major = FUSE_KERNEL_VERSION,
			.minor = WORKER_PROTOCOL_MINOR,
			.max_readahead = BPFUSE_MAX_WRITE,
			.flags = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_DO_READDIRPLUS |
				 FUSE_READDIRPLUS_AUTO | FUSE_PARALLEL_DIROPS,
		},
	};

	return send(socket, &message, sizeof(message), MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* Takes up the worker that bpfuse_channel_attach_worker left for the bridge, giving up the one before. */
static void worker_take_up(struct bpfuse_channel *channel)
{
	int sockets[LANES];

	pthread_mutex_lock(&channel->lock);
	memcpy(sockets, channel->next_sockets, sizeof(sockets));
	for (int lane = 0; lane < LANES; lane++)
		channel->next_sockets[lane] = -1;
	pthread_mutex_unlock(&channel->lock);
	if (sockets[LANE_FUSE] < 0)
		return;
	worker_lost(channel);
	pthread_mutex_lock(&channel->lock);
	memcpy(channel->worker.sockets, sockets, sizeof(sockets));
	pthread_mutex_unlock(&channel->lock);
	if (worker_send_init(sockets[LANE_FUSE]))
		worker_lost(channel);
}

static void worker_initialised(struct bpfuse_channel *channel, const struct fuse_out_header *header)
{
	pthread_mutex_lock(&channel->lock);
	if (header->error)
		channel->figures.malformed_replies++;
	else
		channel->worker.ready = true;
	pthread_mutex_unlock(&channel->lock);
	flush_held(channel);
	channel_signal(channel);
}

/*
 * The worker takes back what it has granted. The answer goes behind all that was posted, and so does not come before the
 * worker has that. With the lock held.
 */
static void grants_withdrawn(struct bpfuse_channel *channel, const struct fuse_out_header *header)
{
	struct fuse_in_header answer = { .len = sizeof(answer), .opcode = BPFUSE_WITHDRAWN_OPCODE };
	struct pending *pending;

	if (header->len != sizeof(*header) + sizeof(answer.nodeid)) {
		channel->figures.malformed_replies++;
		return;
	}
	memcpy(&answer.nodeid, header + 1, sizeof(answer.nodeid));
	posting_end_inode(channel, answer.nodeid);
	pending = pending_copy(channel, PENDING_ONE_WAY, &answer, sizeof(answer));
	if (!pending) {
		channel->figures.dropped++;
		return;
	}
	pending->opcode = answer.opcode;
	pending->lane = LANE_EXTRA;
	pending_forward(channel, pending, NULL);
}

/* Takes what the worker says to the channel and not to the kernel; false: it is not that. With the lock held. */
static bool told_of_grants(struct bpfuse_channel *channel, const struct fuse_out_header *header)
{
	struct bpfuse_renewed renewed;

	if (header->unique == BPFUSE_WITHDRAW_UNIQUE) {
		grants_withdrawn(channel, header);
		return true;
	}
	if (header->unique != BPFUSE_RENEW_UNIQUE)
		return false;
	if (header->len == sizeof(*header) + sizeof(renewed)) {
		memcpy(&renewed, header + 1, sizeof(renewed));
		posting_renew(channel, &renewed);
	} else {
		channel->figures.malformed_replies++;
	}
	return true;
}

static void reply_receive(struct bpfuse_channel *channel, enum lane lane, size_t length)
{
	struct fuse_out_header *header = (void *)channel->reply_buffer;
	struct pending *pending = NULL;
	struct origin origin = { 0 };
	bool whole = length >= sizeof(*header) && header->len == length && length <= sizeof(*header) + BPFUSE_PAYLOAD;

	if (whole && lane == LANE_FUSE && header->unique == INIT_TOKEN) {
		worker_initialised(channel, header);
		return;
	}
	pthread_mutex_lock(&channel->lock);
	if (whole && lane == LANE_EXTRA && told_of_grants(channel, header)) {
		pthread_mutex_unlock(&channel->lock);
		return;
	}
	if (length >= sizeof(*header))
		pending = pending_by_token(channel, header->unique);
	if (pending) {
		origin = pending->origin;
		/* A wait that was only tried did not fail because it was not to wait. */
		if (pending->tried && header->error == -EAGAIN)
			header->error = -ENOLCK;
		if (whole)
			posting_take_grant(channel, pending, header);
		pending_finish(channel, pending);
	}
	channel->figures.malformed_replies += !whole;
	channel->figures.stale_replies += whole && !pending;
	pthread_mutex_unlock(&channel->lock);
	if (!pending)
		return;
	if (!whole || header->error > 0 || header->error < -ERROR_LIMIT)
		reply_error(channel, origin, -EIO);
	else
		reply_deliver(channel, origin, header, length);
}

static void drain_replies(struct bpfuse_channel *channel, enum lane lane)
{
	for (int i = 0; i < REPLIES_A_TURN; i++) {
		ssize_t length = recv(channel->worker.sockets[lane], channel->reply_buffer, MESSAGE_MAX,
				      MSG_DONTWAIT | MSG_TRUNC);

		if (length < 0 && (errno == EAGAIN || errno == EINTR))
			break;
		if (length <= 0) {
			worker_lost(channel);
			break;
		}
		reply_receive(channel, lane, (size_t)length);
	}
	bridge_submit(channel);
}

/*
 * A wait for a lock keeps its ring entry until it is over. Half of a queue's may do so; more waits are only tried, or
 * else there would be no entry left for the request that gives the lock up. With the lock held.
 */
static void wait_begin(struct bpfuse_channel *channel, struct pending *pending)
{
	struct queue *queue = &channel->queues[queue_of_entry(channel, pending->origin.index)];

	pending->tried = queue->waiting >= queue->count / 2;
	channel->figures.crowded += pending->tried;
	if (pending->tried)
		return;
	pending->waits = queue;
	queue->waiting++;
}

/*
 * Tells whether a request was interrupted before it came here: the two come by different ways. That counts for waits
 * only, which nothing else may ever end. With the lock held.
 */
static bool interrupted_early(const struct bpfuse_channel *channel, const struct fuse_in_header *header)
{
	for (uint32_t i = 0; header->opcode == FUSE_SETLKW && i < EARLY_INTERRUPTS; i++)
		if (channel->early[i] == header->unique)
			return true;
	return false;
}

/*
 * Called by a queue's owner for a request that BPF left untouched. Returns 0, with an answer if it is to be given at
 * once; or with what the owner is to refuse it: -EIO for one whose sizes are impossible, -EINTR.
 */
int bridge_forward_entry(struct bpfuse_channel *channel, uint32_t index, struct answer *answer)
{
	struct bpfuse_entry *entry = &channel->entries[index];
	const struct fuse_in_header *header = (void *)entry->uring.in_out;
	struct pending *pending = channel->pendings[index];
	struct request request;
	int result = request_of_entry(&request, entry);

	pthread_mutex_lock(&channel->lock);
	pending->origin.unique = header->unique;
	pending->opcode = header->opcode;
	pending->nodeid = header->nodeid;
	pending->lane = request_lane(header->opcode);
	if (result)
		channel->figures.malformed_requests++;
	else if (interrupted_early(channel, header))
		result = -EINTR;
	else if (header->opcode == FUSE_SETLKW)
		wait_begin(channel, pending);
	if (!result)
		pending_forward(channel, pending, answer);
	pthread_mutex_unlock(&channel->lock);
	return result;
}

static void forward_copy(struct bpfuse_channel *channel, enum pending_kind kind, enum lane lane, const void *message,
			 size_t length)
{
	const struct fuse_in_header *header = message;
	struct pending *pending = NULL;
	uint64_t unique = header->unique;
	struct answer answer = { 0 };

	pthread_mutex_lock(&channel->lock);
	pending = pending_copy(channel, kind, message, length);
	if (pending) {
		pending->origin.unique = unique;
		pending->opcode = header->opcode;
		pending->nodeid = header->nodeid;
		pending->lane = lane;
		pending_forward(channel, pending, kind == PENDING_ONE_WAY ? NULL : &answer);
	} else if (kind == PENDING_ONE_WAY) {
		channel->figures.dropped++;
	}
	pthread_mutex_unlock(&channel->lock);
	if (answer.header.len)
		device_write(channel, &answer, answer.header.len);
	if (!pending && kind == PENDING_COPY)
		reply_error(channel, (struct origin){ .kind = PENDING_COPY, .unique = unique }, -ENOMEM);
}

/* Called by the device reader. */
void bridge_forward_copy(struct bpfuse_channel *channel, enum pending_kind kind, const void *message, size_t length)
{
	const struct fuse_in_header *header = message;

	forward_copy(channel, kind, request_lane(header->opcode), message, length);
}

/* Takes a held pending that was interrupted off the list and tells whose it was; false if there is none. */
static bool take_interrupted(struct bpfuse_channel *channel, struct origin *origin)
{
	struct pending *pending;

	pthread_mutex_lock(&channel->lock);
	for (pending = channel->held_head; pending && !pending->interrupted; pending = pending->next)
		;
	if (pending) {
		*origin = pending->origin;
		pending_unhold(channel, pending);
		pending_finish(channel, pending);
		channel->figures.interrupted++;
	}
	pthread_mutex_unlock(&channel->lock);
	return pending != NULL;
}

static void answer_interrupted(struct bpfuse_channel *channel)
{
	struct origin origin;

	while (take_interrupted(channel, &origin))
		reply_error(channel, origin, -EINTR);
}

static void bridge_turn(struct bpfuse_channel *channel)
{
	struct pollfd ready[LANES + 1];
	uint64_t count;
	int timeout_ms;

	for (int lane = 0; lane < LANES; lane++)
		ready[lane] = (struct pollfd){ .fd = channel->worker.sockets[lane], .events = POLLIN };
	ready[LANES] = (struct pollfd){ .fd = channel->wake, .events = POLLIN };
	pthread_mutex_lock(&channel->lock);
	if (channel->held_head && channel->worker.ready)
		ready[is_gathered(&channel->gathering) ? LANE_EXTRA : channel->held_head->lane].events |= POLLOUT;
	channel->gathering.watched = is_gathered(&channel->gathering);
	timeout_ms = channel->gathering.watched ? GATHER_MS : -1;
	pthread_mutex_unlock(&channel->lock);
	if (poll(ready, LANES + 1, timeout_ms) < 0)
		return;
	if (timeout_ms > 0) {
		pthread_mutex_lock(&channel->lock);
		/* What cannot be sent is looked at again. */
		if (posting_is_due(channel))
			posting_flush(channel);
		pthread_mutex_unlock(&channel->lock);
	}
	if (ready[LANES].revents && read(channel->wake, &count, sizeof(count)) > 0) {
		worker_take_up(channel);
		answer_interrupted(channel);
	}
	for (int lane = 0; lane < LANES; lane++) {
		bool current = ready[lane].fd == channel->worker.sockets[lane];

		if (ready[lane].revents & POLLOUT)
			flush_held(channel);
		if (current && ready[lane].revents & (POLLIN | POLLHUP | POLLERR))
			drain_replies(channel, (enum lane)lane);
	}
	bridge_submit(channel);
}

void *bridge_run(void *argument)
{
	struct bpfuse_channel *channel = argument;

	while (!atomic_load(&channel->closing))
		bridge_turn(channel);
	worker_lost(channel);
	return NULL;
}

/*
 * An interrupted request that still waits for a worker is answered EINTR by the bridge thread. One that a worker has
 * is the worker's to finish: the message goes where the request went, its unique there the token that the worker knows.
 */
void bridge_interrupt(struct bpfuse_channel *channel, const void *message, size_t length)
{
	struct {
		struct fuse_in_header header;
		struct fuse_interrupt_in interrupt;
	} carried;
	struct pending *pending;
	enum lane lane = LANE_FUSE;
	bool sent;

	if (length != sizeof(carried))
		return;
	memcpy(&carried, message, sizeof(carried));
	pthread_mutex_lock(&channel->lock);
	pending = pending_by_unique(channel, carried.interrupt.unique);
	sent = pending && pending->state == PENDING_SENT;
	if (sent) {
		carried.interrupt.unique = pending_token(pending);
		lane = pending->lane;
		/* If this worker dies the next one is not to wait. Others are carried out by it. */
		pending->interrupted = pending->opcode == FUSE_SETLKW;
	} else if (pending) {
		pending->interrupted = true;
	} else {
		channel->early[channel->early_count++ % EARLY_INTERRUPTS] = carried.interrupt.unique;
	}
	pthread_mutex_unlock(&channel->lock);
	if (sent) {
		carried.header.unique = carried.interrupt.unique | 1;
		forward_copy(channel, PENDING_ONE_WAY, lane, &carried, sizeof(carried));
	} else if (pending) {
		bridge_wake(channel);
	}
}

int bpfuse_channel_attach_notifier(struct bpfuse_channel *channel, int notify_socket)
{
	return notify_start(channel, notify_socket);
}

int bpfuse_channel_attach_worker(struct bpfuse_channel *channel, int fuse_socket, int extra_socket, int notify_socket)
{
	int error = notify_start(channel, notify_socket);

	if (error)
		return error;
	pthread_mutex_lock(&channel->lock);
	close_sockets(channel->next_sockets);
	channel->next_sockets[LANE_FUSE] = fuse_socket;
	channel->next_sockets[LANE_EXTRA] = extra_socket;
	pthread_mutex_unlock(&channel->lock);
	bridge_wake(channel);
	return 0;
}
