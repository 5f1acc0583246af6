/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What device.c, queue.c, bridge.c and notify.c share.
 *
 * Threads: one a queue (queue.c), the device reader (device.c), the bridge (bridge.c: replies of the worker) and the
 * notifier (notify.c). A request that BPF did not answer is a `pending` from the moment it is seen until its reply is
 * given back:
 *
 *	IDLE -> HELD -> SENT -> (IDLE)		HELD: waits for a worker that is ready, in the order of arrival
 *
 * All pendings, the held list and the worker's sockets are guarded by `lock`; no system call under it blocks.
 */
#ifndef BPFUSE_CHANNEL_INTERNAL_H
#define BPFUSE_CHANNEL_INTERNAL_H

#include <liburing.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "../../../bpf/abi.h"
#include "channel.h"

enum {
	MESSAGE_MAX = BPFUSE_PAYLOAD + 4096, /* the largest classic FUSE message either way */
	MAX_QUEUES = 4096,
	MAX_COPIES = 1 << 16, /* requests and one-way messages held in copies at one time */
	EARLY_INTERRUPTS = 64,
	GATHER_MS = 5, /* posted writes are gathered for so long at most */
	POSTINGS = 32, /* files of which writes are posted at one time */
};

enum pending_state { PENDING_IDLE, PENDING_HELD, PENDING_SENT };

/* Where a request's bytes lie, and so how its reply is given back. */
enum pending_kind {
	PENDING_ENTRY,   /* in a ring entry; the queue's owner commits the reply */
	PENDING_COPY,    /* in `bytes`; the reply is written to /dev/fuse */
	PENDING_ONE_WAY, /* in `bytes`; there is no reply */
};

/* Which of the worker's sockets: pyfuse3 reads one, the other takes the requests that pyfuse3 has no method for. */
enum lane { LANE_FUSE, LANE_EXTRA, LANES };

struct origin {
	enum pending_kind kind;
	uint32_t index;  /* in channel.pendings, and of the ring entry if it is one */
	uint64_t unique; /* the kernel's; the worker sees the token in its place */
};

struct pending {
	struct origin origin;
	enum pending_state state;
	enum lane lane;
	uint32_t generation; /* rises with each use, so that a late reply is recognised */
	uint32_t opcode;
	bool interrupted;    /* when it is held: to be answered EINTR */
	struct queue *waits; /* of a wait for a lock: the queue in which it keeps an entry */
	uint64_t nodeid;
	uint64_t handle;     /* of a WRITE, as the worker knows it */
	bool withholds;      /* it was sent, and nothing is granted of its inode before it is answered: see posting.c */
	bool tried;          /* a wait for a lock that the worker only tries: there is no entry to wait in */
	atomic_bool replied; /* the bridge has put the reply in the ring entry */
	struct pending *next; /* in the held or the free list */
	void *bytes;
	size_t length;
};

struct queue {
	struct bpfuse_channel *channel;
	pthread_t thread;
	bool started;
	uint32_t id, first, count; /* the kernel's queue id, and the entries first .. first + count - 1 */
	bool online;
	struct io_uring ring;
	bool ring_open;
	struct iovec (*vectors)[2];
	uint32_t live;    /* entries the kernel may still complete */
	uint32_t waiting; /* entries that wait for a lock; under the channel's lock */
};

/* What the worker takes of a file without a word. A key of 0: of none. */
struct posting {
	uint64_t key;
	uint32_t credit; /* bytes that are written */
	bool changes;    /* changes of attributes; these are known then: */
	struct fuse_attr attributes;
	uint64_t closes; /* the size up to which the file is closed so; 0: it is not */
	uint64_t end;    /* behind the last byte that was written since the first grant */
};

/*
 * Small posted writes that follow each other, to be sent as one (a size of 0: there are none), and after them the changes
 * of one inode's attributes (a `padding` of 0: none).
 */
struct gathering {
	struct fuse_in_header header;
	struct fuse_write_in in; /* `padding` counts the writes */
	uint8_t *bytes;          /* room for BPFUSE_MAX_WRITE */
	struct fuse_in_header change_header;
	struct fuse_setattr_in change; /* `padding` counts the changes */
	uint64_t since_ms;             /* of the first, on CLOCK_MONOTONIC */
	bool watched;                  /* the bridge looks after it by itself in time */
};

static inline bool is_gathered(const struct gathering *gathering)
{
	return gathering->in.size || gathering->change.padding;
}

/* A classic message: its header, and what follows that from the second part on. */
struct request {
	struct fuse_in_header header;
	struct iovec parts[3];
	int count;
};

/* A whole reply, to a request that is answered without a word of the worker. A length of 0: there is none. */
struct answer {
	struct fuse_out_header header;
	union {
		struct fuse_write_out written;
		struct fuse_attr_out attributes;
	};
};

static inline struct answer answer_of(const struct pending *pending, size_t body)
{
	return (struct answer){
		.header = { .len = (uint32_t)(sizeof(struct fuse_out_header) + body),
			    .unique = pending->origin.unique },
	};
}

struct worker_link {
	int sockets[LANES]; /* -1: none; there are both or neither */
	bool ready;         /* has answered INIT */
};

struct bpfuse_channel {
	int device;
	int event; /* to the owner of the channel */
	int wake;  /* to the bridge: look at the held list and the worker */
	bool uring, mounted, shared_locks;
	atomic_bool ended, closing;

	struct bpfuse_entry *entries;
	uint32_t entry_count;
	struct queue *queues;
	uint32_t queue_count;
	atomic_uint pinned;

	pthread_mutex_t lock;
	uint32_t queues_reported; /* queue threads that are registered or have failed */
	int start_error;          /* of the first that failed */
	pthread_cond_t queue_reported;
	struct worker_link worker;
	int next_sockets[LANES];   /* of a worker that the bridge is to take up; -1: none */
	struct pending **pendings; /* [0, entry_count) are the ring entries', the rest copies */
	uint32_t pending_count;
	struct pending *free_copies;
	struct pending *held_head, **held_tail;
	uint32_t held_count;
	struct posting postings[POSTINGS];
	struct gathering gathering;
	uint32_t next_posting, withholding;    /* pendings that withhold grants */
	struct bpfuse_channel_figures figures; /* under lock, but for `committed` */
	atomic_ullong committed;

	struct io_uring bridge_ring;
	uint8_t *reply_buffer, *device_buffer;
	pthread_t bridge, reader;
	bool bridge_started, reader_started, ring_ready;
	uint64_t early[EARLY_INTERRUPTS]; /* requests that were interrupted before they were seen here; under lock */
	uint32_t early_count;
	uint32_t notifiers; /* threads; under lock */
	pthread_cond_t notifier_ended;
};

/* device.c */
ssize_t device_write(struct bpfuse_channel *channel, const void *message, size_t length);
void *device_reader(void *channel);
void channel_signal(struct bpfuse_channel *channel);

/* queue.c */
int queue_layout(uint32_t depth, struct queue **out, uint32_t *queues, uint32_t *entries);
void *queue_serve(void *queue);
int queue_of_entry(const struct bpfuse_channel *channel, uint32_t entry);

/* pending.c: all with the lock held */
int pending_prepare(struct bpfuse_channel *channel, uint32_t entry_count);
void pending_free_all(struct bpfuse_channel *channel);
struct pending *pending_copy(struct bpfuse_channel *channel, enum pending_kind kind, const void *message,
			     size_t length);
struct pending *pending_by_token(struct bpfuse_channel *channel, uint64_t token);
struct pending *pending_by_unique(struct bpfuse_channel *channel, uint64_t unique);
uint64_t pending_token(const struct pending *pending);
void pending_hold(struct bpfuse_channel *channel, struct pending *pending);
void pending_unhold(struct bpfuse_channel *channel, struct pending *pending);
void pending_finish(struct bpfuse_channel *channel, struct pending *pending);

/* attributes.c: all with the lock held */
void attributes_begin(struct bpfuse_channel *channel, struct posting *posting, const struct fuse_attr *attributes);
void attributes_end(struct bpfuse_channel *channel, const struct pending *pending);
uint64_t attributes_now_ns(const struct posting *posting);
void attributes_written(struct posting *posting, const struct fuse_write_in *in);
int attributes_answer(struct bpfuse_channel *channel, const struct pending *pending,
		      const struct fuse_in_header *header, struct iovec body, struct answer *answer);
int attributes_flush(struct bpfuse_channel *channel);

/* posting.c: all with the lock held */
struct fuse_write_in *posting_prepare(struct bpfuse_channel *channel, struct pending *pending, struct iovec body,
				      bool may_post);
bool posting_closes(struct bpfuse_channel *channel, const struct pending *pending, struct iovec body);
void posting_spend(struct bpfuse_channel *channel, const struct fuse_write_in *in);
int posting_gather(struct bpfuse_channel *channel, const struct fuse_in_header *header, const struct fuse_write_in *in,
		   const void *data);
int posting_flush(struct bpfuse_channel *channel);
void posting_begin(struct gathering *gathering);
bool posting_is_due(const struct bpfuse_channel *channel);
void posting_end_inode(struct bpfuse_channel *channel, uint64_t ino);
void posting_lost(struct bpfuse_channel *channel);
void posting_renew(struct bpfuse_channel *channel, const struct bpfuse_renewed *renewed);
void posting_take_grant(struct bpfuse_channel *channel, const struct pending *pending, struct fuse_out_header *reply);

/* requests.c */
int request_of_entry(struct request *request, struct bpfuse_entry *entry);
void request_of_copy(struct request *request, const struct pending *pending);
void request_complete(struct request *request);
enum lane request_lane(uint32_t opcode);
bool request_is_repeatable(uint32_t opcode);
const void *request_small_data(const struct request *request, const struct fuse_write_in *in);

/* bridge.c */
void *bridge_run(void *channel);
int bridge_forward_entry(struct bpfuse_channel *channel, uint32_t entry, struct answer *answer);
void bridge_forward_copy(struct bpfuse_channel *channel, enum pending_kind kind, const void *message, size_t length);
void bridge_interrupt(struct bpfuse_channel *channel, const void *message, size_t length);

/* notify.c */
int notify_start(struct bpfuse_channel *channel, int socket);

#endif
