/* SPDX-License-Identifier: Apache-2.0 */
/* Reading a whole hash map. */
#ifndef BPFUSE_MAP_WALK_H
#define BPFUSE_MAP_WALK_H

#include <linux/types.h>

typedef void (*bpfuse_visit)(void *context, const void *key, const void *value);

/* Visits the entries that are in a hash map all the while; others may be missed. Returns 0 or a negative errno. */
int bpfuse_map_walk(int map_fd, bpfuse_visit visit, void *context);

#endif
