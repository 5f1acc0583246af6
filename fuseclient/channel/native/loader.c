// SPDX-License-Identifier: Apache-2.0
/*
 * Loading of the BPF object. The object holds a tracepoint program for each form that the kernel's tracepoint has had;
 * the one whose number of arguments is that in the kernel's BTF is loaded, the others are left out.
 */
#define _GNU_SOURCE
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include "abi.h"
#include "loader.h"

struct bpfuse_bpf {
	struct bpf_object *object;
	struct bpf_program *tracepoint;
	struct bpf_link *link;
};

/* What the kernel calls each form: the typedef's function has one argument more, the tracepoint's private data. */
static const struct {
	unsigned int arguments;
	const char *program;
} variants[] = {
	{ 3, "on_complete_cqe" },
	{ 7, "on_complete_fields" },
};

/* The first complaint of libbpf since the last bpfuse_bpf_open() of this thread: the most telling one. */
static _Thread_local char complaint[160];

__attribute__((format(printf, 2, 0))) static int keep_complaint(enum libbpf_print_level level, const char *format,
								va_list arguments)
{
	if (getenv("BPFUSE_BPF_LOG"))
		return vfprintf(stderr, format, arguments);
	if (level == LIBBPF_WARN && !complaint[0]) {
		vsnprintf(complaint, sizeof(complaint), format, arguments);
		complaint[strcspn(complaint, "\n")] = 0;
	}
	return 0;
}

static int fail(int code, const char *what, char *error, size_t error_size)
{
	/* Of missing rights libbpf says nothing that helps. */
	const char *detail = code == -EPERM ? "" : complaint;

	snprintf(error, error_size, "%s: %s%s%s", what, strerror(-code), detail[0] ? "; " : "", detail);
	return code;
}

/* How many arguments tracepoint io_uring_complete has, or a negative errno. */
static int tracepoint_arguments(const struct btf *btf)
{
	const struct btf_type *type;
	int id = btf__find_by_name_kind(btf, "btf_trace_io_uring_complete", BTF_KIND_TYPEDEF);

	if (id < 0)
		return id;
	type = btf__type_by_id(btf, btf__type_by_id(btf, id)->type);
	if (!type || !btf_is_ptr(type))
		return -EINVAL;
	type = btf__type_by_id(btf, type->type);
	if (!type || !btf_is_func_proto(type))
		return -EINVAL;
	return (int)btf_vlen(type) - 1;
}

static int choose_programs(struct bpfuse_bpf *bpf, const struct btf *btf)
{
	int arguments = tracepoint_arguments(btf);

	for (size_t i = 0; i < sizeof(variants) / sizeof(variants[0]); i++) {
		struct bpf_program *program = bpf_object__find_program_by_name(bpf->object, variants[i].program);
		bool fits = arguments == (int)variants[i].arguments;

		if (!program)
			return -ENOENT;
		bpf_program__set_autoload(program, fits);
		if (fits)
			bpf->tracepoint = program;
	}
	return bpf->tracepoint ? 0 : -EOPNOTSUPP;
}

static int choose_sizes(struct bpfuse_bpf *bpf, const struct bpfuse_bpf_options *options)
{
	const struct {
		const char *map;
		__u32 size;
	} sizes[] = {
		{ "names", options->name_capacity },
		{ "inodes", options->inode_capacity },
		{ "uses", options->inode_capacity / BPFUSE_GROUP_SHARE + 2 },
		{ "xattrs", options->inode_capacity / BPFUSE_XATTR_SHARE + BPFUSE_XATTR_SHARE },
		{ "pages", options->page_count },
		{ "entries", options->ring_entries },
	};

	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct bpf_map *map = bpf_object__find_map_by_name(bpf->object, sizes[i].map);
		int result = map ? bpf_map__set_max_entries(map, sizes[i].size) : -ENOENT;

		if (result)
			return result;
	}
	return 0;
}

/* Nothing is answered until the worker sets a deadline; epoch 0 is that of values never written. */
static int init_control(struct bpfuse_bpf *bpf, __u32 ring_entries)
{
	struct bpfuse_control control = { .epoch = 1, .entries = ring_entries };
	__u32 zero = 0;

	if (getrandom(control.hash_key, sizeof(control.hash_key), 0) != sizeof(control.hash_key))
		return -EIO;
	return bpf_map_update_elem(bpfuse_bpf_map_fd(bpf, "control"), &zero, &control, BPF_ANY);
}

static int prepare(struct bpfuse_bpf *bpf, const struct bpfuse_bpf_options *options, const char **what)
{
	struct btf *btf;
	int result;

	*what = "cannot read the kernel's BTF";
	btf = btf__load_vmlinux_btf();
	if (!btf)
		return -errno;
	*what = "cannot use this kernel's tracepoint io_uring_complete";
	result = choose_programs(bpf, btf);
	btf__free(btf);
	if (result)
		return result;
	*what = "cannot size the BPF maps";
	result = choose_sizes(bpf, options);
	if (result)
		return result;
	*what = "cannot load the BPF programs";
	result = bpf_object__load(bpf->object);
	if (result)
		return result;
	*what = "cannot set up the control map";
	return init_control(bpf, options->ring_entries);
}

int bpfuse_bpf_open(struct bpfuse_bpf **out, const struct bpfuse_bpf_options *options, char *error, size_t error_size)
{
	struct bpfuse_bpf *bpf = calloc(1, sizeof(*bpf));
	const char *what = "cannot open the BPF object";
	int result;

	if (!bpf)
		return -ENOMEM;
	complaint[0] = 0;
	libbpf_set_print(keep_complaint);
	bpf->object = bpf_object__open_file(options->object_path, NULL);
	result = bpf->object ? prepare(bpf, options, &what) : -errno;
	if (result) {
		fail(result, what, error, error_size);
		bpfuse_bpf_close(bpf);
		return result;
	}
	*out = bpf;
	return 0;
}

int bpfuse_bpf_map_fd(const struct bpfuse_bpf *bpf, const char *map)
{
	return bpf_object__find_map_fd_by_name(bpf->object, map);
}

int bpfuse_bpf_map_id(const struct bpfuse_bpf *bpf, const char *map, __u32 *id)
{
	struct bpf_map_info info = { 0 };
	__u32 size = sizeof(info);
	int fd = bpfuse_bpf_map_fd(bpf, map);

	if (fd < 0)
		return fd;
	if (bpf_obj_get_info_by_fd(fd, &info, &size))
		return -errno;
	*id = info.id;
	return 0;
}

int bpfuse_map_open(__u32 id)
{
	int fd = bpf_map_get_fd_by_id(id);

	return fd < 0 ? -errno : fd;
}

int bpfuse_bpf_program_fd(const struct bpfuse_bpf *bpf, const char *program)
{
	const struct bpf_program *found = bpf_object__find_program_by_name(bpf->object, program);

	return found ? bpf_program__fd(found) : -ENOENT;
}

int bpfuse_bpf_run_fd(int program, void *context, size_t size)
{
	LIBBPF_OPTS(bpf_test_run_opts, run, .ctx_in = context, .ctx_size_in = size);
	int result = bpf_prog_test_run_opts(program, &run);

	return result ? result : (int)run.retval;
}

int bpfuse_bpf_run(const struct bpfuse_bpf *bpf, const char *program, void *context, size_t size)
{
	int fd = bpfuse_bpf_program_fd(bpf, program);

	return fd < 0 ? fd : bpfuse_bpf_run_fd(fd, context, size);
}

int bpfuse_bpf_attach(struct bpfuse_bpf *bpf)
{
	int result = bpfuse_bpf_run(bpf, "adopt_owner", NULL, 0);

	if (result)
		return result;
	bpf->link = bpf_program__attach(bpf->tracepoint);
	return bpf->link ? 0 : -errno;
}

void bpfuse_bpf_close(struct bpfuse_bpf *bpf)
{
	if (!bpf)
		return;
	bpf_link__destroy(bpf->link);
	bpf_object__close(bpf->object);
	free(bpf);
}
