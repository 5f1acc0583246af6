// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <linux/types.h>
#include "abi.h"
#include "groups.h"

enum { FIRST_ROOM = 16 };

struct groups {
	struct group *all;
	__u32 *buckets; /* the newest group of each, by directory; 0: none */
	__u64 *uses;
	__u32 slots, most, mask;
	__u32 free;    /* the first free one that was in use before */
	__u32 reached; /* those from here on were never in use */
	__u32 count;
	size_t members;
	__u64 serial;
};

struct groups *groups_new(__u32 slots, __u32 most, __u64 *uses)
{
	struct groups *groups = calloc(1, sizeof(*groups));
	__u32 buckets = 1;

	while (buckets < slots)
		buckets *= 2;
	if (!groups)
		return NULL;
	*groups = (struct groups){ .slots = slots, .most = most, .uses = uses, .mask = buckets - 1, .reached = 1 };
	groups->all = calloc(slots, sizeof(*groups->all));
	groups->buckets = calloc(buckets, sizeof(*groups->buckets));
	if (groups->all && groups->buckets)
		return groups;
	groups_free(groups);
	return NULL;
}

void groups_free(struct groups *groups)
{
	if (!groups)
		return;
	for (__u32 slot = 1; groups->all && slot < groups->reached; slot++)
		free(groups->all[slot].members);
	free(groups->all);
	free(groups->buckets);
	free(groups);
}

/* CLOCK_BOOTTIME in the units of `uses`. */
static __u64 now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_BOOTTIME, &time);
	return ((__u64)time.tv_sec * 1000000000 + time.tv_nsec) >> BPFUSE_USE_SHIFT;
}

static __u32 *bucket(struct groups *groups, __u64 directory)
{
	return &groups->buckets[(directory * 0x9e3779b97f4a7c15ULL >> 32) & groups->mask];
}

struct group *groups_get(struct groups *groups, __u32 slot)
{
	return slot && slot < groups->reached && groups->all[slot].serial ? &groups->all[slot] : NULL;
}

__u32 groups_newest(struct groups *groups, __u64 directory)
{
	__u32 slot = *bucket(groups, directory);

	while (slot && groups->all[slot].directory != directory)
		slot = groups->all[slot].next;
	return slot;
}

static __u32 take_slot(struct groups *groups)
{
	__u32 slot = groups->free;

	if (slot)
		groups->free = groups->all[slot].next;
	else if (groups->reached < groups->slots)
		slot = groups->reached++;
	return slot;
}

static void begin(struct groups *groups, __u32 slot, __u64 directory)
{
	__u32 *first = bucket(groups, directory);

	groups->all[slot] = (struct group){ .directory = directory, .serial = ++groups->serial, .next = *first };
	*first = slot;
	groups->count++;
}

__u32 groups_open(struct groups *groups, __u64 directory)
{
	__u32 slot = groups_newest(groups, directory);

	if (!slot || groups->all[slot].count >= groups->most) {
		slot = take_slot(groups);
		if (!slot)
			return 0;
		begin(groups, slot, directory);
		__atomic_store_n(&groups->uses[slot], 0, __ATOMIC_RELAXED);
	}
	groups->all[slot].serial = ++groups->serial;
	groups->all[slot].put = now();
	return slot;
}

bool groups_restore(struct groups *groups, __u32 slot, __u64 directory)
{
	if (!slot || slot >= groups->slots)
		return false;
	if (groups->reached <= slot)
		groups->reached = slot + 1;
	if (groups->all[slot].serial)
		return groups->all[slot].directory == directory;
	begin(groups, slot, directory);
	return true;
}

void groups_restored(struct groups *groups)
{
	for (__u32 slot = groups->reached; --slot;)
		if (!groups->all[slot].serial) {
			groups->all[slot].next = groups->free;
			groups->free = slot;
		}
}

static int compare_members(const void *one, const void *other)
{
	return memcmp(one, other, sizeof(struct member));
}

/* Leaves one of each. */
static void tidy(struct groups *groups, struct group *group)
{
	__u32 kept = 0;

	if (!group->count)
		return;
	qsort(group->members, group->count, sizeof(*group->members), compare_members);
	for (__u32 i = 0; i < group->count; i++)
		if (!kept || compare_members(&group->members[kept - 1], &group->members[i]))
			group->members[kept++] = group->members[i];
	groups->members -= group->count - kept;
	group->count = kept;
}

static bool make_room(struct groups *groups, struct group *group)
{
	__u32 room = group->room ? 2 * group->room : FIRST_ROOM;
	struct member *members;

	tidy(groups, group);
	if (group->count < group->room / 2)
		return true;
	if (room > groups->most)
		room = groups->most;
	if (room == group->room)
		return group->count < room / 4 * 3; /* or it would be tidied too often */
	members = realloc(group->members, room * sizeof(*members));
	if (!members)
		return group->count < group->room;
	group->members = members;
	group->room = room;
	return true;
}

bool groups_add(struct groups *groups, __u32 slot, const struct member *member)
{
	struct group *group = groups_get(groups, slot);

	if (!group || (group->count == group->room && !make_room(groups, group)))
		return false;
	group->members[group->count++] = *member;
	groups->members++;
	return true;
}

__u64 groups_serial(const struct groups *groups)
{
	return groups->serial;
}

size_t groups_members(const struct groups *groups)
{
	return groups->members;
}

void groups_remove(struct groups *groups, __u32 slot)
{
	struct group *group = &groups->all[slot];
	__u32 *link = bucket(groups, group->directory);

	while (*link != slot)
		link = &groups->all[*link].next;
	*link = group->next;
	groups->members -= group->count;
	groups->count--;
	free(group->members);
	*group = (struct group){ .next = groups->free };
	groups->free = slot;
}

void groups_cool(struct groups *groups)
{
	for (__u32 slot = 1; slot < groups->reached; slot++) {
		groups->all[slot].put = 0;
		__atomic_store_n(&groups->uses[slot], 0, __ATOMIC_RELAXED);
	}
}

static __u64 last_use(const struct groups *groups, __u32 slot)
{
	__u64 put = groups->all[slot].put, used = __atomic_load_n(&groups->uses[slot], __ATOMIC_RELAXED);

	return used > put ? used : put;
}

struct ranked {
	__u64 serial, use;
	__u32 slot;
};

static int compare_ranked(const void *one, const void *other)
{
	const struct ranked *a = one, *b = other;

	if (a->use != b->use)
		return a->use < b->use ? -1 : 1;
	return a->serial < b->serial ? -1 : a->serial > b->serial;
}

__u32 groups_by_use(struct groups *groups, __u32 *out)
{
	struct ranked *ranked = malloc((groups->count + 1) * sizeof(*ranked));
	__u32 count = 0;

	if (!ranked)
		return 0;
	for (__u32 slot = 1; slot < groups->reached; slot++)
		if (groups->all[slot].serial)
			ranked[count++] = (struct ranked){ groups->all[slot].serial, last_use(groups, slot), slot };
	qsort(ranked, count, sizeof(*ranked), compare_ranked);
	for (__u32 i = 0; i < count; i++)
		out[i] = ranked[i].slot;
	free(ranked);
	return count;
}

__u32 groups_count(const struct groups *groups)
{
	return groups->count;
}

bool groups_is_used(const struct groups *groups, __u32 slot)
{
	return __atomic_load_n(&groups->uses[slot], __ATOMIC_RELAXED) != 0;
}
