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

enum { FILES = 50, SIZE = 5000, THREADS = 4, ROUNDS = 40, DEADLINE_S = 40 };

static const char *directory;

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
	int fuse, notify;
	long answers;   /* answers so many requests and dies with the next in its hands */
	uint32_t fatal; /* dies with the first request of this opcode in its hands */
	bool nonsense;  /* answers with what is not a reply */
	pthread_t thread;
};

static void attributes_of(uint64_t ino, struct fuse_attr *attr)
{
	memset(attr, 0, sizeof(*attr));
	attr->ino = ino;
	attr->mode = ino == 1 ? S_IFDIR | 0755 : S_IFREG | 0644;
	attr->nlink = 1;
	attr->size = ino == 1 ? 0 : SIZE;
}

/* Writes the payload of a reply to `out`; returns its size or a negative errno. */
static int answer(const struct fuse_in_header *in, const void *body, void *out)
{
	const struct fuse_read_in *read = body;
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
	case FUSE_GETATTR:
		memset(attr, 0, sizeof(*attr));
		attributes_of(in->nodeid, &attr->attr);
		return sizeof(*attr);
	case FUSE_OPEN:
		memset(out, 0, sizeof(struct fuse_open_out));
		return sizeof(struct fuse_open_out);
	case FUSE_READ:
		if (read->offset >= SIZE)
			return 0;
		memset(out, (int)in->nodeid, SIZE);
		return read->size < SIZE - read->offset ? (int)read->size : (int)(SIZE - read->offset);
	case FUSE_MKDIR:
		return -EACCES;
	case FUSE_RELEASE:
	case FUSE_FLUSH:
		return 0;
	default:
		return -ENOSYS;
	}
}

static bool is_one_way(uint32_t opcode)
{
	return opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET || opcode == FUSE_INTERRUPT;
}

static void *worker_run(void *argument)
{
	struct worker *worker = argument;
	static const size_t room = 400000;
	char *request = malloc(room), *reply = malloc(room);

	for (;;) {
		ssize_t length = recv(worker->fuse, request, room, 0);
		const struct fuse_in_header *in = (void *)request;
		struct fuse_out_header *out = (void *)reply;

		if (length <= 0)
			break;
		CHECK((size_t)length >= sizeof(*in) && in->len == (size_t)length);
		if (is_one_way(in->opcode))
			continue;
		if (in->opcode != FUSE_INIT && (in->opcode == worker->fatal || worker->answers-- <= 0))
			break;
		int size = answer(in, in + 1, out + 1);

		*out = (struct fuse_out_header){
			.len = sizeof(*out) + (size > 0 ? (uint32_t)size : 0),
			.error = size < 0 ? size : 0,
			.unique = in->unique,
		};
		if (worker->nonsense && in->opcode != FUSE_INIT)
			out->error = 12345;
		if (send(worker->fuse, reply, out->len, MSG_NOSIGNAL) < 0)
			break;
	}
	shutdown(worker->fuse, SHUT_RDWR);
	shutdown(worker->notify, SHUT_RDWR);
	free(request);
	free(reply);
	return NULL;
}

static const struct worker immortal = { .answers = 1L << 40 };

static void worker_start(struct worker *worker, struct bpfuse_channel *channel, struct worker kind)
{
	int fuse[2], notify[2];

	CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fuse) && !socketpair(AF_UNIX, SOCK_SEQPACKET, 0, notify));
	*worker = kind;
	worker->fuse = fuse[1];
	worker->notify = notify[1];
	CHECK(!pthread_create(&worker->thread, NULL, worker_run, worker));
	CHECK(!bpfuse_channel_attach_worker(channel, fuse[0], notify[0]));
}

static void worker_join(struct worker *worker)
{
	CHECK(!pthread_join(worker->thread, NULL));
	close(worker->fuse);
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

	shutdown(worker->fuse, SHUT_RDWR);
	worker_join(worker);
	worker_start(worker, channel, (struct worker){ .answers = 1L << 40, .fatal = FUSE_MKDIR });
	wait_ready(channel);
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

	CHECK(send(worker->fuse, junk, sizeof(junk), 0) == sizeof(junk));
	CHECK(send(worker->fuse, &stale, sizeof(stale), 0) == sizeof(stale));
	CHECK(stat(path, &status) == -1 && errno == EIO);
	bpfuse_channel_figures(channel, &figures);
	CHECK(figures.malformed_replies == 1 && figures.stale_replies == 1);
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

	worker_start(worker, channel, immortal);
	wait_ready(channel);
	read_file(1);
	CHECK(notify(worker, &message, sizeof(message)) == 0);
	message.inode.ino = 1234567;
	CHECK(notify(worker, &message, sizeof(message)) == -ENOENT);
	CHECK(notify(worker, &message, 7) == -EINVAL);
	printf("ok: notifications return the kernel's result\n");
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

static void on_alarm(int number)
{
	(void)number;
	give_up();
}

int main(int argc, char **argv)
{
	struct bpfuse_channel_options options = { .source = "channel_test", .allow_other = 1, .depth = 4 };
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
	CHECK(!umount(directory));
	bpfuse_channel_close(channel);
	worker_join(&worker);
	close(options.entries_fd);
	printf("ok: unmounted\n");
	return 0;
}
