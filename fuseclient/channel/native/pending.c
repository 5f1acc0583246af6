// SPDX-License-Identifier: Apache-2.0
/*
 * Requests on their way through the worker. The unique that a worker sees is a token, (generation << 24 | index) << 1:
 * its reply finds the pending without a search, and a reply to a request of long ago finds none.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "channel_internal.h"

enum { INDEX_BITS = 24 };

static struct pending *pending_new(struct bpfuse_channel *channel, enum pending_kind kind)
{
	struct pending *pending = calloc(1, sizeof(*pending));

	if (!pending)
		return NULL;
	pending->origin.kind = kind;
	pending->origin.index = channel->pending_count;
	pending->generation = 1;
	channel->pendings[channel->pending_count++] = pending;
	return pending;
}

int pending_prepare(struct bpfuse_channel *channel, uint32_t entry_count)
{
	channel->held_tail = &channel->held_head;
	/* It never moves: the queues look up their own entries' in it without the lock. */
	channel->pendings = calloc((size_t)entry_count + MAX_COPIES, sizeof(*channel->pendings));
	if (!channel->pendings)
		return -ENOMEM;
	for (uint32_t i = 0; i < entry_count; i++)
		if (!pending_new(channel, PENDING_ENTRY))
			return -ENOMEM;
	return 0;
}

void pending_free_all(struct bpfuse_channel *channel)
{
	for (uint32_t i = 0; i < channel->pending_count; i++) {
		free(channel->pendings[i]->bytes);
		free(channel->pendings[i]);
	}
	free(channel->pendings);
	channel->pendings = NULL;
	channel->pending_count = 0;
}

/* Returns a pending that holds a copy of a message, or NULL without memory or with too many held already. */
struct pending *pending_copy(struct bpfuse_channel *channel, enum pending_kind kind, const void *message, size_t length)
{
	struct pending *pending = channel->free_copies;
	void *bytes = malloc(length);

	if (!bytes)
		return NULL;
	if (pending)
		channel->free_copies = pending->next;
	else if (channel->pending_count < channel->entry_count + MAX_COPIES)
		pending = pending_new(channel, kind);
	if (!pending) {
		free(bytes);
		return NULL;
	}
	memcpy(bytes, message, length);
	pending->origin.kind = kind;
	pending->bytes = bytes;
	pending->length = length;
	pending->next = NULL;
	return pending;
}

uint64_t pending_token(const struct pending *pending)
{
	return ((uint64_t)pending->generation << INDEX_BITS | pending->origin.index) << 1;
}

/* Returns the pending that was sent under a token and has no reply yet, or NULL. */
struct pending *pending_by_token(struct bpfuse_channel *channel, uint64_t token)
{
	uint64_t index = token >> 1 & ((1u << INDEX_BITS) - 1);
	struct pending *pending = index < channel->pending_count ? channel->pendings[index] : NULL;

	if (!pending || pending->state != PENDING_SENT || pending_token(pending) != token)
		return NULL;
	return pending;
}

struct pending *pending_by_unique(struct bpfuse_channel *channel, uint64_t unique)
{
	for (uint32_t i = 0; i < channel->pending_count; i++) {
		struct pending *pending = channel->pendings[i];

		if (pending->state != PENDING_IDLE && pending->origin.kind != PENDING_ONE_WAY &&
		    pending->origin.unique == unique)
			return pending;
	}
	return NULL;
}

void pending_hold(struct bpfuse_channel *channel, struct pending *pending)
{
	pending->state = PENDING_HELD;
	pending->next = NULL;
	*channel->held_tail = pending;
	channel->held_tail = &pending->next;
	channel->held_count++;
}

void pending_unhold(struct bpfuse_channel *channel, struct pending *pending)
{
	struct pending **link = &channel->held_head;

	while (*link != pending)
		link = &(*link)->next;
	*link = pending->next;
	if (!*link)
		channel->held_tail = link;
	pending->next = NULL;
	channel->held_count--;
}

/* Ends a pending: its token is never valid again, and a copy's memory is given back. */
void pending_finish(struct bpfuse_channel *channel, struct pending *pending)
{
	pending->state = PENDING_IDLE;
	pending->generation++;
	pending->interrupted = pending->tried = false;
	channel->withholding -= pending->withholds;
	pending->withholds = false;
	if (pending->waits)
		pending->waits->waiting--;
	pending->waits = NULL;
	if (pending->origin.kind == PENDING_ENTRY)
		return;
	free(pending->bytes);
	pending->bytes = NULL;
	pending->next = channel->free_copies;
	channel->free_copies = pending;
}
