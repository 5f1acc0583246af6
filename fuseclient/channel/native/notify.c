// SPDX-License-Identifier: Apache-2.0
/*
 * Notifications of the worker to the kernel, over a socket of their own: each message is a whole FUSE notification,
 * written to /dev/fuse and answered with its result, so that the worker knows when the kernel has dropped what it was
 * told to drop. They have their own thread because an invalidation may wait for a lock that is held by a request
 * whose reply the bridge has yet to carry.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel_internal.h"

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

static void *notify_run(void *argument)
{
	struct notifier *notifier = argument;
	struct bpfuse_channel *channel = notifier->channel;
	ssize_t length;

	for (;;) {
		length = recv(notifier->socket, notifier->message, sizeof(notifier->message), 0);
		if (length < 0 && errno == EINTR)
			continue;
		if (length <= 0)
			break;
		int32_t result = notify_write(channel, notifier->message, (size_t)length);

		pthread_mutex_lock(&channel->lock);
		if (result != -EINVAL)
			channel->figures.notifications++;
		pthread_mutex_unlock(&channel->lock);
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
