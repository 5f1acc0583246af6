// SPDX-License-Identifier: Apache-2.0
/*
 * The native channel against a worker of a hundred lines, for the sanitizers: threads work on a mount while workers
 * die with requests in their hands, send nonsense, and notify the kernel. No BPF: with "uring" the ring entries lie in
 * a memfd and every request is a miss.
 *
 *	channel_test DIR uring|devfuse		prints one line a check; exit code 1 at the first that fails
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../bpf/abi.h"
#include "../../fuseclient/channel/native/channel.h"

enum { COPY_FILE_RANGE_64 = 53 };
enum { FILES = 50, SIZE = 5000, THREADS = 4, ROUNDS = 40, DEADLINE_S = 40 };

static const char *directory;

/* What files with the number BACKED are opened with; 0: as all others. */
enum { BACKED = 33, OPEN_PASSTHROUGH = 1 << 7 };
/* The bytes that may be posted after each write that is answered; and to the file of this number, once it is open. */
enum { GRANT = BPFUSE_GRANT_UNIT, GRANTED = 34 };
/* The size up to which that one is closed without a word. */
enum { CLOSES = 2 * BPFUSE_GRANT_UNIT };
/* The inode of what is made here, and how often it may be posted to; its attributes may be changed without a word. */
enum { MADE = 2000, MADE_GRANT = 4 };
static atomic_uint backing;

/* A forced unmount aborts the connection; without it a thread that waits for a reply could not be killed. */
static void give_up(void)
{
	umount2(directory, MNT_FORCE | MNT_DETACH);
	_exit(1);
}

static void fail(int line, const char *condition)
{
	fprintf(stderr, "failed at line %d: %s (errno: %s)\n", line, condition, strerror(errno));
	give_up();
}

#define CHECK(condition) ((condition) ? (void)0 : fail(__LINE__, #condition))

struct worker {
	int fuse, extra, notify;
	long answers;                 /* answers so many requests and dies with the next in its hands */
	uint32_t fatal;               /* dies with the first request of this opcode in its hands */
	uint32_t endless;             /* answers requests of this opcode when they are interrupted */
	bool nonsense;                /* answers with what is not a reply */
	atomic_uint posted, messages; /* writes for which nobody waits, and in how many they came */
	atomic_uint changes;          /* changes of attributes for which nobody waits; the last of them is */
	struct fuse_setattr_in change;
	uint64_t written_ns;   /* when what was posted last was written */
	atomic_uint withdrawn; /* the writes that had come when the channel said that it had taken back its grants */
	atomic_uint_fast64_t unanswered; /* the unique of a request that waits to be interrupted */
	pthread_t thread;
};

static void attributes_of(uint64_t ino, struct fuse_attr *attr)
{
	memset(attr, 0, sizeof(*attr));
	attr->ino = ino;
	attr->mode = ino == 1 ? S_IFDIR | 0755 : S_IFREG | 0644;
	attr->nlink = 1;
	attr->size = ino == 1 || ino == MADE ? 0 : SIZE;
}

/* Writes the payload of a reply to `out`; returns its size or a negative errno. */
static int answer(const struct fuse_in_header *in, const void *body, void *out)
{
	const struct fuse_read_in *read = body;
	const struct fuse_copy_file_range_in *copy = body;
	const struct fuse_lseek_in *seek = body;
	const struct fuse_write_in *write = body;
	struct fuse_entry_out *entry = out;
	struct fuse_attr_out *attr = out;

	switch (in->opcode) {
	case FUSE_INIT:
		memset(out, 0, sizeof(struct fuse_init_out));
		((struct fuse_init_out *)out)->major = 7;
		((struct fuse_init_out *)out)->minor = 38;
		return sizeof(struct fuse_init_out);
	case FUSE_LOOKUP:
		if (*(const char *)body != 'f')
			return -ENOENT;
		memset(entry, 0, sizeof(*entry));
		entry->nodeid = 2 + (uint64_t)atoi((const char *)body + 1);
		attributes_of(entry->nodeid, &entry->attr);
		return sizeof(*entry);
	case FUSE_CREATE:
		memset(out, 0, sizeof(*entry) + sizeof(struct fuse_open_out));
		entry->nodeid = MADE;
		attributes_of(entry->nodeid, &entry->attr);
		((struct fuse_open_out *)(entry + 1))->fh = MADE;
		((struct fuse_open_out *)(entry + 1))->padding = (int32_t)(1u << BPFUSE_GRANT_CHANGES_BIT | MADE_GRANT);
		return sizeof(*entry) + sizeof(struct fuse_open_out);
	case FUSE_SETATTR:
	case FUSE_GETATTR:
		memset(attr, 0, sizeof(*attr));
		attributes_of(in->nodeid, &attr->attr);
		return sizeof(*attr);
	case FUSE_OPEN:
		memset(out, 0, sizeof(struct fuse_open_out));
		((struct fuse_open_out *)out)->fh = in->nodeid;
		if (in->nodeid == GRANTED + 2)
			((struct fuse_open_out *)out)->padding = 2 << BPFUSE_GRANT_CLOSE_SHIFT | 1;
		if (in->nodeid == BACKED + 2 && atomic_load(&backing)) {
			((struct fuse_open_out *)out)->open_flags = OPEN_PASSTHROUGH;
			((struct fuse_open_out *)out)->padding = (int32_t)atomic_load(&backing);
		}
		return sizeof(struct fuse_open_out);
	case FUSE_READ:
		if (read->offset >= SIZE)
			return 0;
		memset(out, (int)in->nodeid, SIZE);
		return read->size < SIZE - read->offset ? (int)read->size : (int)(SIZE - read->offset);
	case FUSE_WRITE:
		*(struct fuse_write_out *)out = (struct fuse_write_out){ .size = write->size, .padding = 1 };
		return sizeof(struct fuse_write_out);
	case FUSE_LSEEK:
		((struct fuse_lseek_out *)out)->offset = seek->whence == SEEK_HOLE ? SIZE : seek->offset;
		return sizeof(struct fuse_lseek_out);
	case FUSE_COPY_FILE_RANGE:
		*(struct fuse_write_out *)out = (struct fuse_write_out){ .size = (uint32_t)copy->len };
		return sizeof(struct fuse_write_out);
	case FUSE_TMPFILE:
		memset(out, 0, sizeof(*entry) + sizeof(struct fuse_open_out));
		entry->nodeid = 1000;
		attributes_of(entry->nodeid, &entry->attr);
		return sizeof(*entry) + sizeof(struct fuse_open_out);
	case FUSE_MKDIR:
		return -EACCES;
	case FUSE_FALLOCATE:
	case FUSE_RELEASE:
	case FUSE_FLUSH:
	case FUSE_SETLK:
		return 0;
	default:
		return -ENOSYS;
	}
}

static bool is_extra(uint32_t opcode)
{
	static const uint32_t extra[] = {
		FUSE_LOOKUP,
		FUSE_GETATTR,
		FUSE_SETATTR,
		FUSE_MKDIR,
		FUSE_UNLINK,
		FUSE_RMDIR,
		FUSE_RENAME,
		FUSE_RENAME2,
		FUSE_READ,
		FUSE_FSYNC,
		FUSE_WRITE,
		FUSE_CREATE,
		FUSE_FLUSH,
		FUSE_RELEASE,
		FUSE_GETLK,
		FUSE_SETLK,
		FUSE_SETLKW,
		FUSE_OPEN,
		FUSE_LSEEK,
		FUSE_TMPFILE,
		FUSE_FALLOCATE,
		FUSE_SETXATTR,
		FUSE_COPY_FILE_RANGE,
		COPY_FILE_RANGE_64,
		BPFUSE_WITHDRAWN_OPCODE,
	};

	for (size_t i = 0; i < sizeof(extra) / sizeof(extra[0]); i++)
		if (extra[i] == opcode)
			return true;
	return false;
}

static bool is_one_way(uint32_t opcode)
{
	return opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET || opcode == FUSE_INTERRUPT;
}

static bool worker_reply(struct worker *worker, int socket, uint64_t unique, int error, void *reply, size_t size)
{
	struct fuse_out_header *out = reply;

	*out = (struct fuse_out_header){ .len = (uint32_t)(sizeof(*out) + size), .error = error, .unique = unique };
	if (worker->nonsense && unique != 2)
		out->error = 12345;
	return send(socket, reply, out->len, MSG_NOSIGNAL) >= 0;
}

/* The end of a request that waited: the message must come where it came. */
static bool worker_interrupted(struct worker *worker, int socket, const struct fuse_interrupt_in *in, void *reply)
{
	uint64_t unique = in->unique;

	if (!atomic_compare_exchange_strong(&worker->unanswered, &unique, 0))
		return true;
	CHECK(socket == (is_extra(worker->endless) ? worker->extra : worker->fuse));
	return worker_reply(worker, socket, in->unique, -EINTR, reply, 0);
}

/* Receives one message and answers it; false: the worker is to die. */
static bool worker_serve(struct worker *worker, int socket, char *request, char *reply, size_t room)
{
	ssize_t length = recv(socket, request, room, 0);
	const struct fuse_in_header *in = (void *)request;
	int size;

	if (length <= 0)
		return false;
	CHECK((size_t)length >= sizeof(*in) && in->len == (size_t)length);
	if (in->opcode == FUSE_INTERRUPT)
		return worker_interrupted(worker, socket, (void *)(in + 1), reply);
	CHECK(socket == (is_extra(in->opcode) ? worker->extra : worker->fuse));
	if (is_one_way(in->opcode))
		return true;
	if (in->opcode == BPFUSE_WITHDRAWN_OPCODE) {
		CHECK(in->nodeid == GRANTED + 2 || in->nodeid == MADE);
		atomic_store(&worker->withdrawn, atomic_load(&worker->posted));
		return true;
	}
	if (in->opcode != FUSE_INIT && (in->opcode == worker->fatal || worker->answers-- <= 0))
		return false;
	if (in->opcode == FUSE_WRITE && ((const struct fuse_write_in *)(in + 1))->padding) {
		atomic_fetch_add(&worker->posted, ((const struct fuse_write_in *)(in + 1))->padding);
		worker->written_ns = ((const struct fuse_write_in *)(in + 1))->lock_owner;
		atomic_fetch_add(&worker->messages, 1);
		return true;
	}
	if (in->opcode == FUSE_SETATTR && ((const struct fuse_setattr_in *)(in + 1))->padding) {
		worker->change = *(const struct fuse_setattr_in *)(in + 1);
		atomic_fetch_add(&worker->changes, worker->change.padding);
		return true;
	}
	if (in->opcode == worker->endless) {
		atomic_store(&worker->unanswered, in->unique);
		return true;
	}
	size = answer(in, in + 1, reply + sizeof(struct fuse_out_header));
	return worker_reply(worker, socket, in->unique, size < 0 ? size : 0, reply, size > 0 ? (size_t)size : 0);
}

static void *worker_run(void *argument)
{
	struct worker *worker = argument;
	static const size_t room = 400000;
	char *request = malloc(room), *reply = malloc(room);
	bool alive = true;

	while (alive) {
		struct pollfd ready[2] = { { .fd = worker->fuse, .events = POLLIN },
					   { .fd = worker->extra, .events = POLLIN } };

		if (poll(ready, 2, -1) < 0)
			continue;
		for (int i = 0; i < 2 && alive; i++)
			if (ready[i].revents)
				alive = worker_serve(worker, ready[i].fd, request, reply, room);
	}
	shutdown(worker->fuse, SHUT_RDWR);
	shutdown(worker->extra, SHUT_RDWR);
	shutdown(worker->notify, SHUT_RDWR);
	free(request);
	free(reply);
	return NULL;
}

static const struct worker immortal = { .answers = 1L << 40 };

static void worker_start(struct worker *worker, struct bpfuse_channel *channel, struct worker kind)
{
	int fuse[2], extra[2], notify[2];

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fuse) && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, extra) &&
	      !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, notify));
	*worker = kind;
	worker->fuse = fuse[1];
	worker->extra = extra[1];
	worker->notify = notify[1];
	CHECK(!pthread_create(&worker->thread, NULL, worker_run, worker));
	CHECK(!bpfuse_channel_attach_worker(channel, fuse[0], extra[0], notify[0]));
}

static void worker_join(struct worker *worker)
{
	CHECK(!pthread_join(worker->thread, NULL));
	close(worker->fuse);
	close(worker->extra);
	close(worker->notify);
}

static void read_file(int number)
{
	char path[200];
	unsigned char bytes[SIZE + 1];
	int descriptor;

	snprintf(path, sizeof(path), "%s/f%d", directory, number);
	descriptor = open(path, O_RDONLY);
	CHECK(descriptor >= 0);
	posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
	CHECK(read(descriptor, bytes, sizeof(bytes)) == SIZE);
	for (int i = 0; i < SIZE; i++)
		CHECK(bytes[i] == (unsigned char)(number + 2));
	CHECK(lseek(descriptor, 1, SEEK_HOLE) == SIZE && lseek(descriptor, 70, SEEK_DATA) == 70);
	CHECK(!close(descriptor));
}

static void *load_run(void *argument)
{
	unsigned seed = (unsigned)(uintptr_t)argument;

	for (int i = 0; i < ROUNDS * FILES / THREADS; i++)
		read_file((int)(rand_r(&seed) % FILES));
	return NULL;
}

static void wait_ready(struct bpfuse_channel *channel)
{
	struct bpfuse_channel_figures figures;
	struct pollfd event = { .fd = bpfuse_channel_event_fd(channel), .events = POLLIN };
	uint64_t count;

	for (;;) {
		bpfuse_channel_figures(channel, &figures);
		if (figures.worker_ready)
			return;
		CHECK(poll(&event, 1, DEADLINE_S * 1000) == 1);
		CHECK(read(event.fd, &count, sizeof(count)) == sizeof(count));
	}
}

/* Ends a worker, and starts another one in its place. */
static void worker_replace(struct worker *worker, struct bpfuse_channel *channel, struct worker kind)
{
	shutdown(worker->fuse, SHUT_RDWR);
	worker_join(worker);
	worker_start(worker, channel, kind);
	wait_ready(channel);
}

/* Workers die again and again under load; not one application may notice. */
static void test_workers_die(struct bpfuse_channel *channel, struct worker *last)
{
	struct bpfuse_channel_figures figures;
	pthread_t threads[THREADS];
	const struct worker kind = { .answers = 100 };
	struct worker mortal;

	worker_start(&mortal, channel, kind);
	for (uintptr_t i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, load_run, (void *)(i + 1)));
	for (int i = 0; i < 5; i++) {
		worker_join(&mortal);
		if (i < 4)
			worker_start(&mortal, channel, kind);
	}
	worker_start(last, channel, immortal);
	for (int i = 0; i < THREADS; i++)
		CHECK(!pthread_join(threads[i], NULL));
	bpfuse_channel_figures(channel, &figures);
	CHECK(figures.replayed >= 5 && figures.refused == 0);
	CHECK(figures.ring_errors == 0 && figures.malformed_replies == 0 && figures.device_errors == 0);
	printf("ok: %d reads while 5 workers died, %llu requests replayed\n", ROUNDS * FILES,
	       (unsigned long long)figures.replayed);
}

/* A request that cannot be repeated is answered EIO when its worker dies with it. */
static void test_refused(struct bpfuse_channel *channel, struct worker *worker)
{
	struct bpfuse_channel_figures figures;
	char path[200];

	worker_replace(worker, channel, (struct worker){ .answers = 1L << 40, .fatal = FUSE_MKDIR });
	snprintf(path, sizeof(path), "%s/absent", directory);
	CHECK(mkdir(path, 0755) == -1 && errno == EIO);
	worker_join(worker);
	bpfuse_channel_figures(channel, &figures);
	CHECK(figures.refused == 1);
	printf("ok: a mkdir whose worker died was refused\n");
}

static void test_nonsense(struct bpfuse_channel *channel, struct worker *worker)
{
	struct bpfuse_channel_figures figures;
	struct stat status;
	char path[200];

	worker_start(worker, channel, (struct worker){ .answers = 1L << 40, .nonsense = true });
	wait_ready(channel);
	snprintf(path, sizeof(path), "%s/f1", directory);
	CHECK(stat(path, &status) == -1 && errno == EIO);
	char junk[3] = "abc";
	struct fuse_out_header stale = { .len = sizeof(stale), .unique = 77ull << 30 };

	for (int i = 0; i < 2; i++) {
		int socket = i ? worker->extra : worker->fuse;

		stale.unique = 77ull << 30;
		CHECK(send(socket, junk, sizeof(junk), 0) == sizeof(junk));
		CHECK(send(socket, &stale, sizeof(stale), 0) == sizeof(stale));
	}
	stale.unique = 2; /* the token of INIT, which is not answered here */
	CHECK(send(worker->extra, &stale, sizeof(stale), 0) == sizeof(stale));
	do
		bpfuse_channel_figures(channel, &figures);
	while (figures.malformed_replies + figures.stale_replies < 5);
	CHECK(stat(path, &status) == -1 && errno == EIO);
	bpfuse_channel_figures(channel, &figures);
	CHECK(figures.malformed_replies == 2 && figures.stale_replies == 3);
	shutdown(worker->fuse, SHUT_RDWR);
	worker_join(worker);
	printf("ok: nonsense from a worker became EIO\n");
}

static int32_t notify(struct worker *worker, const void *message, size_t length)
{
	int32_t result;

	CHECK(send(worker->notify, message, length, 0) == (ssize_t)length);
	CHECK(recv(worker->notify, &result, sizeof(result), 0) == sizeof(result));
	return result;
}

static void test_notifications(struct bpfuse_channel *channel, struct worker *worker)
{
	struct {
		struct fuse_out_header header;
		struct fuse_notify_inval_inode_out inode;
	} message = { .header = { .len = sizeof(message), .error = FUSE_NOTIFY_INVAL_INODE }, .inode = { .ino = 3 } };
	struct {
		struct fuse_out_header header;
		uint64_t inodes[3];
	} many = { .header = { .error = BPFUSE_NOTIFY_DROP_INODES }, .inodes = { 3, 1234567, 2 } };

	worker_start(worker, channel, immortal);
	wait_ready(channel);
	read_file(1);
	CHECK(notify(worker, &message, sizeof(message)) == 0);
	message.inode.ino = 1234567;
	CHECK(notify(worker, &message, sizeof(message)) == -ENOENT);
	CHECK(notify(worker, &message, 7) == -EINVAL);
	many.header.len = sizeof(many);
	CHECK(notify(worker, &many, sizeof(many)) == 0);
	CHECK(notify(worker, &many, sizeof(many) - 1) == -EINVAL);
	printf("ok: notifications return the kernel's result\n");
}

/* Sends a message, with a descriptor unless it is negative, and returns its result. */
static int32_t ask_with(struct worker *worker, void *bytes, size_t length, int descriptor)
{
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = { .header = {
			      .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS } };
	struct iovec part = { bytes, length };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
	int32_t result;

	if (descriptor >= 0) {
		message.msg_control = &control;
		message.msg_controllen = sizeof(control);
		memcpy(CMSG_DATA(&control.header), &descriptor, sizeof(int));
	}
	CHECK(sendmsg(worker->notify, &message, 0) == (ssize_t)length);
	CHECK(recv(worker->notify, &result, sizeof(result), 0) == sizeof(result));
	return result;
}

/* A file becomes a backing, is read by the kernel alone, and stays open when its id is given back. */
static void test_backing(struct worker *worker)
{
	struct {
		struct fuse_out_header header;
		uint32_t id;
	} message = { .header = { .len = sizeof(message.header), .error = BPFUSE_NOTIFY_BACKING_OPEN } };
	int file = memfd_create("backing", 0), descriptor;
	char path[200], byte;
	int32_t id;

	CHECK(file >= 0 && pwrite(file, "b", 1, SIZE - 1) == 1);
	CHECK(ask_with(worker, &message, sizeof(message.header), -1) == -EBADF);
	id = ask_with(worker, &message, sizeof(message.header), file);
	if (id == -EPERM || id == -EOPNOTSUPP || id == -ENOTTY) {
		printf("ok: this kernel has no passthrough\n");
		close(file);
		return;
	}
	CHECK(id > 0);
	atomic_store(&backing, (unsigned)id);
	snprintf(path, sizeof(path), "%s/f%d", directory, BACKED);
	descriptor = open(path, O_RDONLY);
	CHECK(descriptor >= 0);
	atomic_store(&backing, 0);
	message.header.error = BPFUSE_NOTIFY_BACKING_CLOSE;
	CHECK(ask_with(worker, &message, sizeof(message.header), -1) == -EINVAL);
	message.id = (uint32_t)id;
	CHECK(ask_with(worker, &message, sizeof(message.header) + sizeof(id), file) == 0);
	CHECK(ask_with(worker, &message, sizeof(message.header) + sizeof(id), -1) == -ENOENT);
	CHECK(pread(descriptor, &byte, 1, SIZE - 1) == 1 && byte == 'b');
	CHECK(pread(descriptor, &byte, 1, 0) == 1 && byte == 0);
	CHECK(!close(descriptor) && !close(file));
	printf("ok: a backing file was read by the kernel\n");
}

static void on_interrupt(int number)
{
	(void)number;
}

static void *interrupted_run(void *argument)
{
	struct stat status;
	char path[200];

	(void)argument;
	snprintf(path, sizeof(path), "%s/f2", directory);
	return stat(path, &status) == -1 && errno == EINTR ? (void *)directory : NULL;
}

/* While there is no worker, a request waits; a signal ends the wait. */
static void test_interrupted(struct bpfuse_channel *channel)
{
	struct sigaction action = { .sa_handler = on_interrupt };
	struct bpfuse_channel_figures figures;
	pthread_t thread;
	void *result;

	CHECK(!sigaction(SIGUSR1, &action, NULL));
	CHECK(!pthread_create(&thread, NULL, interrupted_run, NULL));
	do
		bpfuse_channel_figures(channel, &figures);
	while (!figures.held);
	CHECK(!pthread_kill(thread, SIGUSR1));
	CHECK(!pthread_join(thread, &result) && result);
	bpfuse_channel_figures(channel, &figures);
	CHECK(figures.interrupted == 1);
	printf("ok: a request that waited for a worker was interrupted\n");
}

/* What goes over the second socket, and what the kernel makes of the answers. */
static void test_extra(struct bpfuse_channel *channel, struct worker *worker)
{
	struct bpfuse_channel_figures figures;
	off_t from = 0, to = 100;
	char path[200];
	int one, other, nameless;

	snprintf(path, sizeof(path), "%s/f1", directory);
	one = open(path, O_RDWR);
	snprintf(path, sizeof(path), "%s/f2", directory);
	other = open(path, O_RDWR);
	CHECK(one >= 0 && other >= 0);
	CHECK(!fallocate(one, 0, 0, 100));
	CHECK(copy_file_range(one, &from, other, &to, 1000, 0) == 1000 && from == 1000 && to == 1100);
	nameless = open(directory, O_TMPFILE | O_RDWR, 0600);
	CHECK(nameless >= 0);
	CHECK(!close(nameless) && !close(other));
	bpfuse_channel_figures(channel, &figures);
	CHECK(figures.forwarded[FUSE_FALLOCATE] == 1 && figures.forwarded[FUSE_TMPFILE] == 1);
	/* The end of the second socket is the worker's end; what it had is the next one's. */
	shutdown(worker->extra, SHUT_RDWR);
	worker_join(worker);
	worker_start(worker, channel, (struct worker){ .answers = 1L << 40, .fatal = FUSE_LSEEK });
	wait_ready(channel);
	pthread_t thread;

	CHECK(!pthread_create(&thread, NULL, load_run, (void *)1));
	worker_join(worker);
	worker_start(worker, channel, immortal);
	CHECK(!pthread_join(thread, NULL));
	CHECK(!close(one));
	printf("ok: requests over the second socket\n");
}

static void *interrupted_seek_run(void *argument)
{
	int descriptor = (int)(intptr_t)argument;

	return lseek(descriptor, 1, SEEK_DATA) == -1 && errno == EINTR ? (void *)directory : NULL;
}

/* A request that a worker has is interrupted over the socket that it went over. */
static void test_interrupted_extra(struct bpfuse_channel *channel, struct worker *worker)
{
	pthread_t thread;
	char path[200];
	void *result;
	int descriptor;

	worker_replace(worker, channel, (struct worker){ .answers = 1L << 40, .endless = FUSE_LSEEK });
	snprintf(path, sizeof(path), "%s/f3", directory);
	descriptor = open(path, O_RDONLY);
	CHECK(descriptor >= 0);
	CHECK(!pthread_create(&thread, NULL, interrupted_seek_run, (void *)(intptr_t)descriptor));
	while (!atomic_load(&worker->unanswered))
		sched_yield();
	CHECK(!pthread_kill(thread, SIGUSR1));
	CHECK(!pthread_join(thread, &result) && result);
	CHECK(!close(descriptor));
	printf("ok: a worker was told of an interrupt over the second socket\n");
}

/* The writes that are posted by a number of writes of `size` bytes. */
static unsigned posted_by(struct bpfuse_channel *channel, int descriptor, int count, size_t size)
{
	struct bpfuse_channel_figures before, after;
	const char bytes[GRANT + 1] = { 0 };

	bpfuse_channel_figures(channel, &before);
	for (int i = 0; i < count; i++)
		CHECK(pwrite(descriptor, bytes, size, i) == (ssize_t)size);
	bpfuse_channel_figures(channel, &after);
	CHECK(after.forwarded[FUSE_WRITE] - before.forwarded[FUSE_WRITE] == (unsigned)count);
	return (unsigned)(after.posted - before.posted);
}

/* Writes are posted as far as they are granted, and until something ends that. */
static void test_posted(struct bpfuse_channel *channel, struct worker *worker)
{
	struct bpfuse_channel_figures figures;
	char path[200];
	uint64_t releases, stale;
	int one, other;

	bpfuse_channel_figures(channel, &figures);
	stale = figures.stale_replies;
	snprintf(path, sizeof(path), "%s/f4", directory);
	one = open(path, O_WRONLY);
	other = open(path, O_WRONLY);
	CHECK(one >= 0 && other >= 0);
	CHECK(posted_by(channel, one, 1, 10) == 0);    /* the first waits, */
	CHECK(posted_by(channel, one, 10, 100) == 10); /* what it is granted does not, */
	CHECK(posted_by(channel, other, 2, 520) == 1); /* nor is another handle another file; */
	CHECK(posted_by(channel, one, 1, 520) == 0);   /* a write is posted whole, or waits. */
	CHECK(posted_by(channel, one, 2, GRANT + 1) == 0);
	CHECK(pwrite(one, "", 1, (off_t)1 << 56) == 1);
	CHECK(posted_by(channel, one, 1, 1) == 1);
	CHECK(!fcntl(other, F_SETFL, O_APPEND)); /* Whoever appends, waits, and so does the next. */
	CHECK(posted_by(channel, other, 1, 1) == 0 && posted_by(channel, one, 2, 1) == 1);
	CHECK(posted_by(channel, one, 10, 1) == 10); /* What follows each other goes together, soon enough. */
	bpfuse_channel_figures(channel, &figures);
	while (atomic_load(&worker->posted) < figures.posted)
		sched_yield();
	CHECK(atomic_load(&worker->messages) < atomic_load(&worker->posted));
	releases = figures.forwarded[FUSE_RELEASE];
	CHECK(!close(other)); /* A handle that is released ends the grant, */
	while (figures.forwarded[FUSE_RELEASE] == releases)
		bpfuse_channel_figures(channel, &figures);
	CHECK(posted_by(channel, one, 1, 1) == 0);
	bpfuse_channel_figures(channel, &figures);
	CHECK(atomic_load(&worker->posted) == figures.posted && figures.stale_replies == stale);
	worker_replace(worker, channel, immortal);
	CHECK(posted_by(channel, one, 2, 1) == 1); /* and so does the end of the worker. */
	CHECK(!close(one));
	printf("ok: writes that nobody waits for\n");
}

static void *wait_for_lock(void *argument)
{
	struct flock lock = { .l_type = F_WRLCK, .l_len = 1 };

	return fcntl((int)(intptr_t)argument, F_SETLKW, &lock) == -1 && errno == EINTR ? (void *)directory : NULL;
}

/* While a lock is asked for, by whatever handle, the replies to writes that are under way grant nothing. */
static void test_posted_and_locks(struct bpfuse_channel *channel, struct worker *worker)
{
	struct flock lock = { .l_type = F_WRLCK, .l_len = 1 };
	pthread_t thread;
	char path[200];
	void *result;
	int one, other;

	worker_replace(worker, channel, (struct worker){ .answers = 1L << 40, .endless = FUSE_SETLKW });
	snprintf(path, sizeof(path), "%s/f5", directory);
	one = open(path, O_WRONLY);
	other = open(path, O_RDWR);
	CHECK(one >= 0 && other >= 0 && posted_by(channel, one, 2, 1) == 1);
	CHECK(!pthread_create(&thread, NULL, wait_for_lock, (void *)(intptr_t)other));
	while (!atomic_load(&worker->unanswered))
		sched_yield();
	CHECK(posted_by(channel, one, 3, 1) == 0);
	CHECK(!pthread_kill(thread, SIGUSR1));
	CHECK(!pthread_join(thread, &result) && result);
	CHECK(posted_by(channel, one, 3, 1) == 2);
	CHECK(!fcntl(other, F_SETLK, &lock)); /* It is answered: the next grant knows of it. */
	CHECK(posted_by(channel, one, 2, 1) == 1);
	CHECK(!close(one) && !close(other));
	printf("ok: nothing is posted while a lock is asked for\n");
}

/* How many FLUSHes were sent for the closing of a descriptor's copy, that is 0 or 1. */
static unsigned flushes(struct bpfuse_channel *channel, int descriptor)
{
	struct bpfuse_channel_figures before, after;

	bpfuse_channel_figures(channel, &before);
	CHECK(!close(dup(descriptor)));
	bpfuse_channel_figures(channel, &after);
	CHECK(after.flushed - before.flushed + after.forwarded[FUSE_FLUSH] - before.forwarded[FUSE_FLUSH] == 1);
	return (unsigned)(after.forwarded[FUSE_FLUSH] - before.forwarded[FUSE_FLUSH]);
}

/* What is granted when a file is opened, and taken back. */
static void test_granted_at_open(struct bpfuse_channel *channel, struct worker *worker)
{
	struct {
		struct fuse_out_header header;
		uint64_t ino;
	} withdrawal = { { sizeof(withdrawal), 0, BPFUSE_WITHDRAW_UNIQUE }, GRANTED + 2 };
	struct {
		struct fuse_out_header header;
		struct bpfuse_renewed renewed;
	} renewal = { { sizeof(renewal), 0, BPFUSE_RENEW_UNIQUE }, { GRANTED + 2, 2, 0 } };
	char path[200];
	struct stat known;
	unsigned posted = atomic_load(&worker->posted);
	int one;

	snprintf(path, sizeof(path), "%s/f%d", directory, GRANTED);
	one = open(path, O_WRONLY);
	CHECK(one >= 0 && flushes(channel, one) == 0);
	CHECK(posted_by(channel, one, 2, 100) == 2 && flushes(channel, one) == 0);
	CHECK(pwrite(one, "", 1, CLOSES - 1) == 1 && flushes(channel, one) == 0);
	CHECK(pwrite(one, "", 1, CLOSES) == 1 && flushes(channel, one) == 1); /* It is too long now. */
	CHECK(!close(one));
	one = open(path, O_WRONLY);
	CHECK(one >= 0 && posted_by(channel, one, 2, 100) == 2);
	CHECK(send(worker->extra, &withdrawal, sizeof(withdrawal), MSG_NOSIGNAL) == sizeof(withdrawal));
	while (atomic_load(&worker->withdrawn) < posted + 6) /* All that was posted has come then. */
		sched_yield();
	CHECK(flushes(channel, one) == 1 && posted_by(channel, one, 1, 100) == 0);
	CHECK(flushes(channel, one) == 1 && posted_by(channel, one, 1, 100) == 1);
	CHECK(posted_by(channel, one, 1, GRANT - 100) == 1);
	CHECK(send(worker->extra, &renewal, sizeof(renewal), MSG_NOSIGNAL) == sizeof(renewal));
	CHECK(fstat(one, &known) == 0); /* Its reply comes the same way, behind that. */
	CHECK(posted_by(channel, one, 2, GRANT) == 2 && posted_by(channel, one, 1, 1) == 0);
	CHECK(send(worker->extra, &withdrawal, sizeof(withdrawal), MSG_NOSIGNAL) == sizeof(withdrawal));
	CHECK(send(worker->extra, &renewal, sizeof(renewal), MSG_NOSIGNAL) == sizeof(renewal));
	CHECK(fstat(one, &known) == 0);
	CHECK(posted_by(channel, one, 1, 1) == 0); /* What has ended is not renewed. */
	CHECK(!close(one));
	printf("ok: what is granted at opening, and taken back\n");
}

static int make_file(void)
{
	char path[200];
	int descriptor;

	snprintf(path, sizeof(path), "%s/made", directory);
	descriptor = open(path, O_CREAT | O_EXCL | O_WRONLY, 0644);
	CHECK(descriptor >= 0);
	return descriptor;
}

/* Whether the attributes of a file are known without the worker. */
static bool is_told(struct bpfuse_channel *channel, int descriptor, struct stat *status)
{
	struct bpfuse_channel_figures before, after;

	bpfuse_channel_figures(channel, &before);
	CHECK(!fstat(descriptor, status));
	bpfuse_channel_figures(channel, &after);
	CHECK(after.told - before.told + after.forwarded[FUSE_GETATTR] - before.forwarded[FUSE_GETATTR] == 1);
	return after.told > before.told;
}

static void release(struct bpfuse_channel *channel, int descriptor)
{
	struct bpfuse_channel_figures before, after;

	bpfuse_channel_figures(channel, &before);
	CHECK(!close(descriptor));
	do
		bpfuse_channel_figures(channel, &after);
	while (after.forwarded[FUSE_RELEASE] == before.forwarded[FUSE_RELEASE]);
}

static uint64_t ns_of(struct timespec time)
{
	return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* The attributes of a new file are changed and told without the worker, which learns all of it in order. */
static void test_changes(struct bpfuse_channel *channel, struct worker *worker)
{
	const struct timespec times[2] = { { -5, 6 }, { 7, 8 } };
	struct {
		struct fuse_out_header header;
		uint64_t ino;
	} withdrawal = { { sizeof(withdrawal), 0, BPFUSE_WITHDRAW_UNIQUE }, MADE };
	struct stat made, written, changed;
	unsigned withdrawn;
	int one;

	worker_replace(worker, channel, immortal);
	one = make_file();
	CHECK(is_told(channel, one, &made) && made.st_size == 0 && made.st_blocks == 0);
	CHECK(write(one, "abc", 3) == 3 && is_told(channel, one, &written));
	CHECK(written.st_size == 3 && written.st_blocks == 1 && written.st_mode == made.st_mode);
	CHECK(ns_of(written.st_mtim) == ns_of(written.st_ctim) && ns_of(written.st_mtim) > ns_of(made.st_mtim));
	CHECK(!fchmod(one, 0600) && !fchown(one, 5, 6) && !futimens(one, times));
	CHECK(is_told(channel, one, &changed) && changed.st_mode == (S_IFREG | 0600) && changed.st_size == 3);
	CHECK(changed.st_uid == 5 && changed.st_gid == 6);
	CHECK(!memcmp(&changed.st_atim, &times[0], sizeof(times[0])) &&
	      !memcmp(&changed.st_mtim, &times[1], sizeof(times[1])));
	CHECK(ns_of(changed.st_ctim) > ns_of(written.st_ctim));
	CHECK(!fsync(one)); /* It goes behind what is gathered, and ends it. */
	CHECK(atomic_load(&worker->changes) == 3 && worker->written_ns == ns_of(written.st_ctim));
	CHECK(worker->change.mode == (S_IFREG | 0600) && worker->change.uid == 5 && worker->change.gid == 6);
	CHECK((int64_t)worker->change.atime == -5 && worker->change.mtimensec == 8);
	CHECK(worker->change.valid == (FATTR_MODE | FATTR_UID | FATTR_GID | FATTR_ATIME | FATTR_MTIME | FATTR_CTIME));
	CHECK(worker->change.ctime * 1000000000 + worker->change.ctimensec == ns_of(changed.st_ctim));
	CHECK(!is_told(channel, one, &changed) && !fchmod(one, 0644) && atomic_load(&worker->changes) == 3);
	release(channel, one);

	one = make_file();
	CHECK(pwrite(one, "abc", 3, 1) == 3 && !is_told(channel, one, &changed)); /* It has a hole. */
	release(channel, one);
	one = make_file();
	CHECK(is_told(channel, one, &changed) && !ftruncate(one, 0) && !is_told(channel, one, &changed));
	release(channel, one);
	one = make_file();
	CHECK(!fchmod(one, 0600)); /* What is gathered does not wait for long. */
	while (atomic_load(&worker->changes) < 4)
		sched_yield();
	CHECK(is_told(channel, one, &changed) && !fchmod(one, 0640));
	CHECK(write(one, "abc", 3) == 3 && write(one, "def", 3) == 3); /* It goes behind the change. */
	while (atomic_load(&worker->changes) < 5)
		sched_yield();
	withdrawn = atomic_load(&worker->posted);
	CHECK(!fchmod(one, 0600));
	CHECK(send(worker->extra, &withdrawal, sizeof(withdrawal), MSG_NOSIGNAL) == sizeof(withdrawal));
	while (atomic_load(&worker->withdrawn) <= withdrawn) /* All that was answered has come then. */
		sched_yield();
	CHECK(atomic_load(&worker->changes) == 6 && !is_told(channel, one, &changed));
	release(channel, one);
	printf("ok: attributes of what is made\n");
}

static void on_alarm(int number)
{
	(void)number;
	give_up();
}

int main(int argc, char **argv)
{
	struct bpfuse_channel_options options = {
		.source = "channel_test", .allow_other = 1, .shared_locks = 1, .depth = 4
	};
	struct bpfuse_channel *channel;
	struct worker worker;
	char error[200] = "";

	CHECK(argc == 3);
	directory = options.mountpoint = argv[1];
	options.uring = !strcmp(argv[2], "uring");
	options.entries_fd = memfd_create("entries", 0);
	CHECK(!ftruncate(options.entries_fd, (off_t)bpfuse_channel_entries(4) * (off_t)sizeof(struct bpfuse_entry)));
	setlinebuf(stdout);
	signal(SIGALRM, on_alarm);
	alarm(DEADLINE_S);
	if (bpfuse_channel_open(&channel, &options, error, sizeof(error))) {
		fprintf(stderr, "%s\n", error);
		return 1;
	}
	CHECK(!bpfuse_channel_start(channel));
	test_interrupted(channel);
	test_workers_die(channel, &worker);
	test_refused(channel, &worker);
	test_nonsense(channel, &worker);
	test_notifications(channel, &worker);
	test_backing(&worker);
	test_extra(channel, &worker);
	test_interrupted_extra(channel, &worker);
	test_posted(channel, &worker);
	test_posted_and_locks(channel, &worker);
	test_granted_at_open(channel, &worker);
	test_changes(channel, &worker);
	CHECK(!umount(directory));
	bpfuse_channel_close(channel);
	worker_join(&worker);
	close(options.entries_fd);
	printf("ok: unmounted\n");
	return 0;
}
