/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which entries of the kernel cache belong together, and which of them are the coldest.
 *
 * A group is a directory's entries, or some of those of a large one: what is given up together. Its number lies in the values
 * of its entries; BPF programs note under that number, in the map `uses`, when one of them was last asked for. Group 0 is none.
 * An entry may be remembered here that is gone, or was put again as another group's: who gives a group up asks the maps.
 */
#ifndef BPFUSE_GROUPS_H
#define BPFUSE_GROUPS_H

#include <stdbool.h>
#include <stddef.h>
#include <linux/types.h>

struct groups;

struct member {
	__u64 hash[2]; /* of the name; without one, both 0 */
	__u64 ino;     /* 0: the name is known to be absent */
};

struct group {
	__u64 directory; /* whose entries they are; 0: inodes that were put without a name */
	__u64 serial;    /* rises with each put into any group */
	__u64 put;       /* the last time, in units of `uses` */
	__u32 count, room;
	__u32 next; /* of those in the same bucket; of a free one, the next free */
	struct member *members;
};

/* `uses` is the map's memory: `slots` words. No group has more than `most` members. NULL if there is no memory. */
struct groups *groups_new(__u32 slots, __u32 most, __u64 *uses);
void groups_free(struct groups *groups);

struct group *groups_get(struct groups *groups, __u32 slot);
/* The newest group of a directory, 0 if there is none. */
__u32 groups_newest(struct groups *groups, __u64 directory);
/* The group that a directory's next entry goes to, made if need be; 0 if all are taken, or there is no memory. */
__u32 groups_open(struct groups *groups, __u64 directory);
/* As a group of this number was left by an earlier worker; false if there can be none. At first, and then _restored(). */
bool groups_restore(struct groups *groups, __u32 slot, __u64 directory);
void groups_restored(struct groups *groups);
/* False if it is full, or there is no memory. */
bool groups_add(struct groups *groups, __u32 slot, const struct member *member);
/* The last put's. */
__u64 groups_serial(const struct groups *groups);
/* Members of all groups. */
size_t groups_members(const struct groups *groups);
void groups_remove(struct groups *groups, __u32 slot);
/* None was ever used. */
void groups_cool(struct groups *groups);
/* Fills `out`, which has room for all, with the groups, the coldest first; returns how many there are. */
__u32 groups_by_use(struct groups *groups, __u32 *out);
__u32 groups_count(const struct groups *groups);
/* Whether an entry of a group was asked for since it was made. */
bool groups_is_used(const struct groups *groups, __u32 slot);

#endif
