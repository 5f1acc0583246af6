/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The channel: owns /dev/fuse, the mount and the rings; commits what BPF answered; carries everything else, in
 * classic FUSE messages, to and from the worker. It knows no policy and no file.
 */
#ifndef BPFUSE_CHANNEL_H
#define BPFUSE_CHANNEL_H

#include <stddef.h>
#include <linux/types.h>

struct bpfuse_channel;

/*
 * What a worker may ask on its notification socket beside FUSE's own notifications, as the `error` of a
 * fuse_out_header. The result of the first is a backing id, or a negative errno as of the others.
 */
enum bpfuse_notify {
	BPFUSE_NOTIFY_BACKING_OPEN = 0x62704f70,  /* a descriptor comes with the message */
	BPFUSE_NOTIFY_BACKING_CLOSE = 0x6270436c, /* the id, a __u32, follows */
	BPFUSE_NOTIFY_DROP_INODES = 0x62704472, /* inode numbers, each a __u64, follow; those unknown are passed over */
};

struct bpfuse_channel_options {
	const char *mountpoint; /* absolute */
	const char *source;     /* the first column of /proc/mounts */
	int read_only;
	int allow_other;
	int shared_locks; /* 1: requests for locks come to the worker; 0: the kernel keeps locks by itself */
	int trusted;      /* 0: setuid bits and device nodes do nothing */
	int uring;        /* 1: FUSE-over-io_uring; 0: every request is read from /dev/fuse */
	int entries_fd;   /* the `entries` map; with uring only */
	__u32 depth;      /* ring entries of each queue whose CPU is online */
};

/* What the channel has done so far. Counts, never reset. */
struct bpfuse_channel_figures {
	__u64 forwarded[64]; /* by opcode: requests sent to a worker */
	__u64 committed;     /* replies committed on a ring */
	__u64 held;          /* requests waiting for a worker at this moment */
	__u64 posted;        /* writes that were answered when they were sent, */
	__u64 flushed;       /* and FLUSHes that were answered here; */
	__u64 changed;       /* changes of attributes that were answered when they were gathered, */
	__u64 told;          /* and requests of attributes that were answered here */
	__u64 replayed;      /* sent again to the next worker */
	__u64 refused;       /* answered EIO because the worker died with them and they cannot be repeated */
	__u64 interrupted;   /* answered EINTR while they were held */
	__u64 crowded;       /* waits for locks that were tried only, for want of ring entries to wait in */
	__u64 notifications; /* written to /dev/fuse for the worker */
	__u64 malformed_requests;
	__u64 malformed_replies;
	__u64 stale_replies;           /* for requests that are no longer open */
	__u64 device_errors;           /* writes to /dev/fuse that failed, notifications of absent inodes aside */
	__u64 ring_errors;             /* completions and submissions that failed, the end of the mount aside */
	__u64 dropped;                 /* one-way messages (FORGET) that no worker was there to take */
	__u32 queues, entries, pinned; /* queue threads, ring entries, threads bound to their CPU */
	__u32 worker_ready;            /* 1: a worker has answered INIT */
};

/* The number of ring entries that a channel of this depth needs: the size of the `entries` map. */
__u32 bpfuse_channel_entries(__u32 depth);

/*
 * Mounts and completes INIT with the kernel. Returns 0 or a negative errno, `error` then holding one line for the
 * user; -EOPNOTSUPP means that the kernel did not grant FUSE-over-io_uring. On failure nothing is left mounted.
 */
int bpfuse_channel_open(struct bpfuse_channel **out, const struct bpfuse_channel_options *options, char *error,
			size_t error_size);
/* Starts the threads; requests flow from here on. Returns when every queue is registered. */
int bpfuse_channel_start(struct bpfuse_channel *channel);
/*
 * Gives the channel a worker: the sockets, of type SOCK_SEQPACKET and with buffers for messages of BPFUSE_PAYLOAD and
 * a header, are its to close. Requests go to the worker once it has answered INIT, over `fuse_socket`, or over
 * `extra_socket` if pyfuse3 has no method for them (FALLOCATE, LSEEK, COPY_FILE_RANGE, TMPFILE, locks) or not enough
 * of one (OPEN with passthrough, FLUSH and RELEASE with the owner of locks). The end of either is the worker's end. Requests that an earlier worker left unanswered are
 * sent again if they can be repeated, and answered EIO if not.
 */
int bpfuse_channel_attach_worker(struct bpfuse_channel *channel, int fuse_socket, int extra_socket, int notify_socket);
/*
 * Serves one more socket of the worker for notifications, on a thread of its own: those that may wait for a lock go
 * there, and hold up no others. The socket is the channel's to close.
 */
int bpfuse_channel_attach_notifier(struct bpfuse_channel *channel, int notify_socket);
/* An eventfd that becomes readable when the mount has ended or a worker has become ready: see figures and ended. */
int bpfuse_channel_event_fd(const struct bpfuse_channel *channel);
int bpfuse_channel_ended(const struct bpfuse_channel *channel);
void bpfuse_channel_figures(struct bpfuse_channel *channel, struct bpfuse_channel_figures *out);
/* Joins the threads and frees everything. The mount must have ended (unmounted or aborted) before. */
void bpfuse_channel_close(struct bpfuse_channel *channel);

#endif
