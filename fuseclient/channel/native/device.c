// SPDX-License-Identifier: Apache-2.0
/*
 * /dev/fuse: the mount, the INIT exchange with the kernel, and what is read from the device afterwards: everything
 * without FUSE-over-io_uring; FORGET and INTERRUPT, which never travel on the rings, with it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <unistd.h>

#include "channel_internal.h"

/* Bits of fuse_init_in and fuse_init_out that Debian 12's <linux/fuse.h> (7.38) lacks, as in flags | flags2 << 32. */
#define INIT_DIRECT_IO_ALLOW_MMAP (1ull << 36) /* what is opened to append is direct, and may be mapped all the same */
#define INIT_PASSTHROUGH          (1ull << 37)
#define INIT_OVER_IO_URING        (1ull << 41)

enum {
	PROTOCOL_MINOR = 44, /* FUSE-over-io_uring is 7.42; INC_EPOCH, the newest thing used, 7.44 */
	MAX_BACKGROUND = 64,
	MOUNT_WAIT_MS = 10000,
	FORGETS_GATHER_US = 5000, /* an INTERRUPT may wait as long: they concern waits for locks, and copies */
};

static void describe(char *error, size_t size, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(error, size, format, arguments);
	va_end(arguments);
}

void channel_signal(struct bpfuse_channel *channel)
{
	uint64_t one = 1;

	/* The counter can only fail to take it when it is full, and then it is readable already. */
	if (write(channel->event, &one, sizeof(one)) < 0)
		return;
}

/* Returns the bytes written or a negative errno, which is counted unless the object is merely unknown to the kernel. */
ssize_t device_write(struct bpfuse_channel *channel, const void *message, size_t length)
{
	ssize_t written = write(channel->device, message, length);

	if (written >= 0)
		return written;
	int error = errno;

	if (error != ENOENT && !atomic_load(&channel->ended)) {
		pthread_mutex_lock(&channel->lock);
		channel->figures.device_errors++;
		pthread_mutex_unlock(&channel->lock);
	}
	return -error;
}

static ssize_t device_read(struct bpfuse_channel *channel)
{
	for (;;) {
		ssize_t length = read(channel->device, channel->device_buffer, MESSAGE_MAX);

		if (length >= 0)
			return length;
		if (errno == EINTR || errno == ENOENT) /* ENOENT: the request was aborted while it was read */
			continue;
		return -errno;
	}
}

/*
 * FUSE_POSIX_ACL is not among them. The kernel would keep with an inode that it has no access control list, and `ls -l` not ask
 * again; but not with the root, whose inode is older than INIT: each path that anyone but its owner takes through it would cost
 * a request.
 */
static uint64_t init_capabilities(const struct bpfuse_channel *channel)
{
	uint64_t flags = FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_DO_READDIRPLUS |
			 FUSE_PARALLEL_DIROPS | FUSE_EXPLICIT_INVAL_DATA | FUSE_CACHE_SYMLINKS | FUSE_ASYNC_DIO |
			 FUSE_INIT_EXT | INIT_DIRECT_IO_ALLOW_MMAP | INIT_PASSTHROUGH;

	if (channel->shared_locks)
		flags |= FUSE_POSIX_LOCKS | FUSE_FLOCK_LOCKS;
	return channel->uring ? flags | INIT_OVER_IO_URING : flags;
}

static int init_answer(struct bpfuse_channel *channel, const struct fuse_in_header *header,
		       const struct fuse_init_in *in)
{
	uint64_t offered = in->flags | (in->flags & FUSE_INIT_EXT ? (uint64_t)in->flags2 << 32 : 0);
	uint64_t granted = init_capabilities(channel) & offered;
	struct {
		struct fuse_out_header header;
		struct fuse_init_out init;
	} reply = {
		.header = { .len = sizeof(reply), .unique = header->unique },
		.init = {
			.major = FUSE_KERNEL_VERSION,
			.minor = in->minor < PROTOCOL_MINOR ? in->minor : PROTOCOL_MINOR,
			.max_readahead = in->max_readahead,
			.flags = (uint32_t)granted,
			.flags2 = (uint32_t)(granted >> 32),
			.max_background = MAX_BACKGROUND,
			.congestion_threshold = MAX_BACKGROUND * 3 / 4,
			.max_write = BPFUSE_MAX_WRITE,
			.max_pages = BPFUSE_MAX_WRITE / BPFUSE_PAGE,
			.time_gran = 1,
			.unused = { 1 },	/* max_stack_depth of 7.40: backing files lie on no stacked file system */
		},
	};

	if (channel->uring && !(granted & INIT_OVER_IO_URING))
		return -EOPNOTSUPP;
	return device_write(channel, &reply, sizeof(reply)) < 0 ? -EIO : 0;
}

static int init_exchange(struct bpfuse_channel *channel, char *error, size_t size)
{
	const struct fuse_in_header *header = (void *)channel->device_buffer;
	const struct fuse_init_in *in = (void *)(header + 1);
	struct pollfd ready = { .fd = channel->device, .events = POLLIN };
	ssize_t length;
	int result;

	if (poll(&ready, 1, MOUNT_WAIT_MS) != 1) {
		describe(error, size, "the kernel sent no FUSE INIT within %d s", MOUNT_WAIT_MS / 1000);
		return -ETIMEDOUT;
	}
	length = device_read(channel);
	if (length < (ssize_t)(sizeof(*header) + sizeof(*in)) || header->opcode != FUSE_INIT ||
	    in->major != FUSE_KERNEL_VERSION) {
		describe(error, size, "the kernel's FUSE INIT is not of protocol %d", FUSE_KERNEL_VERSION);
		return -EPROTO;
	}
	result = init_answer(channel, header, in);
	if (result == -EOPNOTSUPP)
		describe(error, size, "the kernel did not offer FUSE-over-io_uring (fuse parameter enable_uring)");
	else if (result)
		describe(error, size, "the kernel refused the answer to FUSE INIT");
	return result;
}

static int channel_mount(struct bpfuse_channel *channel, const struct bpfuse_channel_options *options, char *error,
			 size_t size)
{
	unsigned long flags = (options->read_only ? MS_RDONLY : 0) | (options->trusted ? 0 : MS_NOSUID | MS_NODEV);
	char data[160];

	snprintf(data, sizeof(data), "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions%s", channel->device,
		 options->allow_other ? ",allow_other" : "");
	if (mount(options->source, options->mountpoint, "fuse.bpfuse", flags, data)) {
		int result = -errno;

		describe(error, size, "cannot mount on %s: %s", options->mountpoint, strerror(-result));
		return result;
	}
	channel->mounted = true;
	return 0;
}

static int channel_map_entries(struct bpfuse_channel *channel, const struct bpfuse_channel_options *options,
			       char *error, size_t size)
{
	int result = queue_layout(options->depth, &channel->queues, &channel->queue_count, &channel->entry_count);

	if (result) {
		describe(error, size, "cannot read the list of CPUs: %s", strerror(-result));
		return result;
	}
	channel->entries = mmap(NULL, channel->entry_count * sizeof(struct bpfuse_entry), PROT_READ | PROT_WRITE,
				MAP_SHARED, options->entries_fd, 0);
	if (channel->entries == MAP_FAILED) {
		result = -errno;
		channel->entries = NULL;
		describe(error, size, "cannot map the ring entries: %s", strerror(-result));
		return result;
	}
	for (uint32_t i = 0; i < channel->queue_count; i++)
		channel->queues[i].channel = channel;
	return 0;
}

static int channel_allocate(struct bpfuse_channel *channel)
{
	channel->device = channel->event = channel->wake = -1;
	for (int lane = 0; lane < LANES; lane++)
		channel->worker.sockets[lane] = channel->next_sockets[lane] = -1;
	pthread_mutex_init(&channel->lock, NULL);
	pthread_cond_init(&channel->notifier_ended, NULL);
	pthread_cond_init(&channel->queue_reported, NULL);
	channel->reply_buffer = malloc(MESSAGE_MAX);
	channel->device_buffer = malloc(MESSAGE_MAX);
	channel->gathering.bytes = malloc(BPFUSE_MAX_WRITE);
	if (!channel->reply_buffer || !channel->device_buffer || !channel->gathering.bytes)
		return -ENOMEM;
	channel->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	channel->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	channel->device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	return channel->event < 0 || channel->wake < 0 || channel->device < 0 ? -errno : 0;
}

int bpfuse_channel_open(struct bpfuse_channel **out, const struct bpfuse_channel_options *options, char *error,
			size_t size)
{
	struct bpfuse_channel *channel = calloc(1, sizeof(*channel));
	int result;

	if (!channel)
		return -ENOMEM;
	channel->uring = options->uring;
	channel->shared_locks = options->shared_locks;
	result = channel_allocate(channel);
	if (result)
		describe(error, size, "cannot open /dev/fuse: %s", strerror(-result));
	if (!result && channel->uring)
		result = channel_map_entries(channel, options, error, size);
	if (!result)
		result = pending_prepare(channel, channel->entry_count);
	if (!result)
		result = channel_mount(channel, options, error, size);
	if (!result)
		result = init_exchange(channel, error, size);
	if (result) {
		if (channel->mounted)
			umount2(options->mountpoint, MNT_DETACH);
		bpfuse_channel_close(channel);
		return result;
	}
	*out = channel;
	return 0;
}

static int start_queues(struct bpfuse_channel *channel)
{
	uint32_t started = 0;
	int error = 0;

	for (uint32_t i = 0; i < channel->queue_count && !error; i++) {
		error = -pthread_create(&channel->queues[i].thread, NULL, queue_serve, &channel->queues[i]);
		channel->queues[i].started = !error;
		started += !error;
	}
	pthread_mutex_lock(&channel->lock);
	while (channel->queues_reported < started)
		pthread_cond_wait(&channel->queue_reported, &channel->lock);
	if (!error)
		error = channel->start_error;
	pthread_mutex_unlock(&channel->lock);
	return error;
}

int bpfuse_channel_start(struct bpfuse_channel *channel)
{
	int error = io_uring_queue_init(64, &channel->bridge_ring, 0);

	if (!error)
		channel->ring_ready = true;
	else if (channel->uring)
		return error;
	error = -pthread_create(&channel->bridge, NULL, bridge_run, channel);
	channel->bridge_started = !error;
	if (!error) {
		error = -pthread_create(&channel->reader, NULL, device_reader, channel);
		channel->reader_started = !error;
	}
	if (!error && channel->uring)
		error = start_queues(channel);
	return error;
}

static void device_message(struct bpfuse_channel *channel, size_t length)
{
	const struct fuse_in_header *header = (void *)channel->device_buffer;

	if (length < sizeof(*header) || header->len != length) {
		pthread_mutex_lock(&channel->lock);
		channel->figures.malformed_requests++;
		pthread_mutex_unlock(&channel->lock);
		return;
	}
	switch (header->opcode) {
	case FUSE_INTERRUPT:
		bridge_interrupt(channel, header, length);
		break;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
		bridge_forward_copy(channel, PENDING_ONE_WAY, header, length);
		break;
	default:
		bridge_forward_copy(channel, PENDING_COPY, header, length);
	}
}

/*
 * Each file that is removed is forgotten at once, by a message that wakes this thread, the bridge and the worker on its
 * way, just when the next request is made. What comes while nobody reads the kernel hands over as one BATCH_FORGET; so,
 * if nothing but these is read here, they are left to gather.
 */
static void gather_forgets(const struct bpfuse_channel *channel)
{
	const struct fuse_in_header *header = (void *)channel->device_buffer;

	if (channel->uring && (header->opcode == FUSE_FORGET || header->opcode == FUSE_BATCH_FORGET))
		usleep(FORGETS_GATHER_US);
}

void *device_reader(void *argument)
{
	struct bpfuse_channel *channel = argument;
	ssize_t length;

	while ((length = device_read(channel)) >= 0) {
		device_message(channel, (size_t)length);
		gather_forgets(channel);
	}
	atomic_store(&channel->ended, true);
	channel_signal(channel);
	return NULL;
}

int bpfuse_channel_event_fd(const struct bpfuse_channel *channel)
{
	return channel->event;
}

int bpfuse_channel_ended(const struct bpfuse_channel *channel)
{
	return atomic_load(&channel->ended);
}

void bpfuse_channel_figures(struct bpfuse_channel *channel, struct bpfuse_channel_figures *out)
{
	pthread_mutex_lock(&channel->lock);
	*out = channel->figures;
	out->held = channel->held_count;
	out->worker_ready = channel->worker.ready;
	pthread_mutex_unlock(&channel->lock);
	out->committed = atomic_load(&channel->committed);
	out->queues = channel->queue_count;
	out->entries = channel->entry_count;
	out->pinned = atomic_load(&channel->pinned);
}

static void close_descriptor(int descriptor)
{
	if (descriptor >= 0)
		close(descriptor);
}

static void join_threads(struct bpfuse_channel *channel)
{
	if (channel->reader_started)
		pthread_join(channel->reader, NULL);
	for (uint32_t i = 0; i < channel->queue_count; i++)
		if (channel->queues[i].started)
			pthread_join(channel->queues[i].thread, NULL);
	if (channel->bridge_started)
		pthread_join(channel->bridge, NULL);
	pthread_mutex_lock(&channel->lock);
	while (channel->notifiers)
		pthread_cond_wait(&channel->notifier_ended, &channel->lock);
	pthread_mutex_unlock(&channel->lock);
}

void bpfuse_channel_close(struct bpfuse_channel *channel)
{
	uint64_t one = 1;

	atomic_store(&channel->closing, true);
	if (channel->wake >= 0 && write(channel->wake, &one, sizeof(one)) < 0)
		atomic_store(&channel->closing, true);
	join_threads(channel);
	for (uint32_t i = 0; i < channel->queue_count; i++) {
		if (channel->queues[i].ring_open)
			io_uring_queue_exit(&channel->queues[i].ring);
		free(channel->queues[i].vectors);
	}
	if (channel->ring_ready)
		io_uring_queue_exit(&channel->bridge_ring);
	free(channel->queues);
	if (channel->entries)
		munmap(channel->entries, channel->entry_count * sizeof(struct bpfuse_entry));
	pending_free_all(channel);
	close_descriptor(channel->device);
	close_descriptor(channel->event);
	close_descriptor(channel->wake);
	free(channel->reply_buffer);
	free(channel->device_buffer);
	free(channel->gathering.bytes);
	pthread_cond_destroy(&channel->notifier_ended);
	pthread_cond_destroy(&channel->queue_reported);
	pthread_mutex_destroy(&channel->lock);
	free(channel);
}
