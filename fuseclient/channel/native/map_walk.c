// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <errno.h>
#include <stdlib.h>
#include "map_walk.h"

/* Entries read by one call; the kernel reads whole hash buckets, so it must hold the fullest of them. */
enum { CHUNK = 1024 };

struct chunk {
	char *keys, *values;
	__u32 key_size, value_size;
};

static int walk_chunks(int map_fd, const struct chunk *chunk, bpfuse_visit visit, void *context)
{
	__u32 position, count;
	__u32 *from = NULL;
	int result;

	do {
		count = CHUNK;
		result = bpf_map_lookup_batch(map_fd, from, &position, chunk->keys, chunk->values, &count, NULL);
		if (result && result != -ENOENT)
			return result;
		for (__u32 i = 0; i < count; i++)
			visit(context, chunk->keys + i * chunk->key_size, chunk->values + i * chunk->value_size);
		from = &position;
	} while (!result);
	return 0;
}

int bpfuse_map_walk(int map_fd, bpfuse_visit visit, void *context)
{
	struct bpf_map_info info = { 0 };
	__u32 size = sizeof(info);
	struct chunk chunk;
	int result = bpf_obj_get_info_by_fd(map_fd, &info, &size);

	if (result)
		return result;
	chunk = (struct chunk){ .key_size = info.key_size, .value_size = info.value_size };
	chunk.keys = malloc((size_t)CHUNK * info.key_size);
	chunk.values = malloc((size_t)CHUNK * info.value_size);
	result = chunk.keys && chunk.values ? walk_chunks(map_fd, &chunk, visit, context) : -ENOMEM;
	free(chunk.keys);
	free(chunk.values);
	return result;
}
