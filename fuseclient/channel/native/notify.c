// SPDX-License-Identifier: Apache-2.0
/*
 * Notifications of the worker to the kernel, over a socket of their own: each message is a whole FUSE notification,
 * written to /dev/fuse and answered with its result, so that the worker knows when the kernel has dropped what it was
 * told to drop. They have their own thread because an invalidation may wait for a lock that is held by a request
 * whose reply the bridge has yet to carry.
 *
 * Three more messages look like notifications and are for the channel: a file, as a descriptor that comes with the
 * message, becomes a backing file for passthrough, and its id is the result; or an id is given back; or many inodes are
 * dropped, which costs one message instead of one for each.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel_internal.h"

/* fuse_backing_map and the two ioctls of Linux 6.9, which Debian 12's <linux/fuse.h> lacks. */
struct backing_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};

#define IOC_BACKING_OPEN  _IOW(229, 1, struct backing_map)
#define IOC_BACKING_CLOSE _IOW(229, 2, uint32_t)

struct notifier {
	struct bpfuse_channel *channel;
	int socket;
	_Alignas(struct fuse_out_header) uint8_t message[MESSAGE_MAX];
};

static int32_t notify_write(struct bpfuse_channel *channel, const void *message, size_t length)
{
	const struct fuse_out_header *header = message;
	ssize_t written;

	if (length < sizeof(*header) || header->len != length || header->unique != 0 || header->error <= 0)
		return -EINVAL;
	written = device_write(channel, message, length);
	return written < 0 ? (int32_t)written : 0;
}

static int32_t backing_open(struct bpfuse_channel *channel, int descriptor)
{
	struct backing_map map = { .fd = descriptor };
	int id = descriptor < 0 ? -EBADF : ioctl(channel->device, IOC_BACKING_OPEN, &map);

	return id == -1 ? -errno : id;
}

static int32_t backing_close(struct bpfuse_channel *channel, const void *body, size_t length)
{
	uint32_t id;

	if (length != sizeof(id))
		return -EINVAL;
	memcpy(&id, body, sizeof(id));
	return ioctl(channel->device, IOC_BACKING_CLOSE, &id) ? -errno : 0;
}

static void count_notifications(struct bpfuse_channel *channel, size_t count)
{
	pthread_mutex_lock(&channel->lock);
	channel->figures.notifications += count;
	pthread_mutex_unlock(&channel->lock);
}

/* Has the kernel drop attributes and pages of all inodes that it knows of these; returns the last failure, if any. */
static int32_t drop_inodes(struct bpfuse_channel *channel, const uint8_t *body, size_t length)
{
	struct {
		struct fuse_out_header header;
		struct fuse_notify_inval_inode_out inode;
	} message = { .header = { .len = sizeof(message), .error = FUSE_NOTIFY_INVAL_INODE } };
	int32_t failure = 0;

	if (length % sizeof(message.inode.ino))
		return -EINVAL;
	for (size_t at = 0; at < length; at += sizeof(message.inode.ino)) {
		memcpy(&message.inode.ino, body + at, sizeof(message.inode.ino));
		ssize_t written = device_write(channel, &message, sizeof(message));

		if (written < 0 && written != -ENOENT)
			failure = (int32_t)written;
	}
	count_notifications(channel, length / sizeof(message.inode.ino));
	return failure;
}

/* Carries out a message; `descriptor` is what came with it, or -1. Returns its result. */
static int32_t notify_answer(struct bpfuse_channel *channel, const void *message, size_t length, int descriptor)
{
	const struct fuse_out_header *header = message;
	int32_t result;

	if (length >= sizeof(*header) && header->error == BPFUSE_NOTIFY_BACKING_OPEN)
		return backing_open(channel, descriptor);
	if (length >= sizeof(*header) && header->error == BPFUSE_NOTIFY_BACKING_CLOSE)
		return backing_close(channel, header + 1, length - sizeof(*header));
	if (length >= sizeof(*header) && header->error == BPFUSE_NOTIFY_DROP_INODES)
		return drop_inodes(channel, (const uint8_t *)(header + 1), length - sizeof(*header));
	result = notify_write(channel, message, length);
	if (result != -EINVAL)
		count_notifications(channel, 1);
	return result;
}

/* Receives a message and the descriptor that comes with it, or -1. Returns as recvmsg(2) does. */
static ssize_t notify_receive(struct notifier *notifier, int *descriptor)
{
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec part = { notifier->message, sizeof(notifier->message) };
	struct msghdr message = {
		.msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	ssize_t length = recvmsg(notifier->socket, &message, MSG_CMSG_CLOEXEC);
	struct cmsghdr *found = length > 0 ? CMSG_FIRSTHDR(&message) : NULL;

	*descriptor = -1;
	if (found && found->cmsg_level == SOL_SOCKET && found->cmsg_type == SCM_RIGHTS &&
	    found->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(descriptor, CMSG_DATA(found), sizeof(int));
	return length;
}

static void *notify_run(void *argument)
{
	struct notifier *notifier = argument;
	struct bpfuse_channel *channel = notifier->channel;
	ssize_t length;
	int descriptor;

	for (;;) {
		length = notify_receive(notifier, &descriptor);
		if (length < 0 && errno == EINTR)
			continue;
		if (length <= 0)
			break;
		int32_t result = notify_answer(channel, notifier->message, (size_t)length, descriptor);

		if (descriptor >= 0)
			close(descriptor);
		if (send(notifier->socket, &result, sizeof(result), MSG_NOSIGNAL) < 0 && errno != EINTR)
			break;
	}
	close(notifier->socket);
	free(notifier);
	pthread_mutex_lock(&channel->lock);
	channel->notifiers--;
	pthread_cond_broadcast(&channel->notifier_ended);
	pthread_mutex_unlock(&channel->lock);
	return NULL;
}

/* Serves a socket on a thread of its own until the worker closes it. Returns 0 or a negative errno. */
int notify_start(struct bpfuse_channel *channel, int socket)
{
	struct notifier *notifier = malloc(sizeof(*notifier));
	pthread_attr_t attributes;
	pthread_t thread;
	int error;

	if (!notifier)
		return -ENOMEM;
	notifier->channel = channel;
	notifier->socket = socket;
	pthread_mutex_lock(&channel->lock);
	channel->notifiers++;
	pthread_mutex_unlock(&channel->lock);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	error = -pthread_create(&thread, &attributes, notify_run, notifier);
	pthread_attr_destroy(&attributes);
	if (!error)
		return 0;
	free(notifier);
	pthread_mutex_lock(&channel->lock);
	channel->notifiers--;
	pthread_mutex_unlock(&channel->lock);
	return error;
}
