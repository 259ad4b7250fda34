/*
 * s_unix: pairs of unix sockets, and what waits in them.
 *
 * For stream, datagram and sequential packet sockets: a pair that is empty, a pair with messages of many sizes in both queues,
 * a pair with options, a half closed one, one whose other end has gone, one whose end has a duplicate; a stream with credentials
 * in its queue. `check` takes everything out, compares it, and puts it in again; it asks the kernel for types,
 * options, flags, and the credentials of who made each pair. `step send` puts one more message into each queue.
 */
#include "workload.h"

#include <sys/socket.h>
#include <sys/un.h>

#define MAX_MESSAGES 40
#define ROUND 4

static const int TYPES[] = {SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET};
static const size_t SIZES[] = {10, 1, 3000, 40000};

struct queue {
	int from, to, type;
	uint64_t seeds[MAX_MESSAGES];
	size_t sizes[MAX_MESSAGES];
	int n;
};

struct kind {
	const char *name;
	int type;
	int plain[2], full[2], tuned[2], half[2], dup;
	int left;			/* its other end has gone */
	struct queue there, back, last;
};
static struct kind kinds[3];
static int credited[2];			/* a stream that tells who wrote */
static uint64_t n_messages;
static struct ucred maker;
static char buffer[1 << 18], wanted[1 << 18];

static void make_content(char *to, size_t size, uint64_t seed)
{
	for (size_t i = 0; i < size; i++)
		to[i] = (char)mix64(seed + i / 8) + (char)i;
}

/* ---- queues ----------------------------------------------------------------------------------- */

static void put(struct queue *q, size_t size, uint64_t seed)
{
	make_content(buffer, size, seed);
	if (send(q->from, buffer, size, MSG_DONTWAIT | MSG_NOSIGNAL) != (ssize_t)size)
		die("send of %zu bytes", size);
}

static void append(struct queue *q)
{
	if (q->n == MAX_MESSAGES)
		die("queue full");
	q->sizes[q->n] = q->n < ROUND ? SIZES[q->n] : 20;
	q->seeds[q->n] = ++n_messages;
	put(q, q->sizes[q->n], q->seeds[q->n]);
	q->n++;
}

static void compare(size_t got, const struct queue *q, int first, int n)
{
	size_t size = 0;

	for (int i = first; i < first + n; i++) {
		make_content(wanted + size, q->sizes[i], q->seeds[i]);
		size += q->sizes[i];
	}
	EXPECT(got == size, "message %d of type %d has %zu bytes, not %zu", first, q->type, got, size);
	EXPECT(got != size || !memcmp(buffer, wanted, size), "message %d of type %d is another one", first, q->type);
}

static size_t take(int fd)
{
	ssize_t n = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);

	return n < 0 ? 0 : (size_t)n;
}

/* A stream gives all at once, the others packet by packet; nothing may be left. */
static void drain(struct queue *q)
{
	if (q->type == SOCK_STREAM) {
		compare(take(q->to), q, 0, q->n);
	} else {
		for (int i = 0; i < q->n; i++)
			compare(take(q->to), q, i, 1);
	}
}

static void check_queue(struct queue *q)
{
	drain(q);
	EXPECT(recv(q->to, buffer, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN, "more in a queue than was sent");
	for (int i = 0; i < q->n; i++)
		put(q, q->sizes[i], q->seeds[i]);
}

/* ---- setting up ------------------------------------------------------------------------------- */

static void set(int fd, int option, int value)
{
	if (setsockopt(fd, SOL_SOCKET, option, &value, sizeof value))
		die("setsockopt %d", option);
}

static int get(int fd, int option)
{
	int value = -1;
	socklen_t len = sizeof value;

	if (getsockopt(fd, SOL_SOCKET, option, &value, &len))
		fail("getsockopt %d: %s", option, strerror(errno));
	return value;
}

static void make_pair(int pair[2], int type)
{
	if (socketpair(AF_UNIX, type, 0, pair))
		die("socketpair");
}

static void make_kind(struct kind *k, int type)
{
	int gone[2];

	k->type = type;
	make_pair(k->plain, type | SOCK_CLOEXEC);
	make_pair(k->full, type | SOCK_NONBLOCK);
	make_pair(k->tuned, type);
	make_pair(k->half, type);
	make_pair(gone, type);
	k->there = (struct queue){.from = k->full[0], .to = k->full[1], .type = type};
	k->back = (struct queue){.from = k->full[1], .to = k->full[0], .type = type};
	k->last = (struct queue){.from = gone[0], .to = gone[1], .type = type};
	for (int i = 0; i < ROUND; i++) {
		append(&k->there);
		append(&k->back);
	}
	append(&k->last);
	k->left = gone[1];
	close(gone[0]);
	set(k->tuned[0], SO_SNDBUF, 50000);
	set(k->tuned[0], SO_PRIORITY, 5);
	set(k->tuned[1], SO_PASSCRED, 1);
	set(k->tuned[1], SO_RCVLOWAT, 1);
	if (type != SOCK_DGRAM && shutdown(k->half[0], SHUT_WR))
		die("shutdown");
	k->dup = fcntl(k->plain[1], F_DUPFD_CLOEXEC, 100 + type);
}

static void prepare(void)
{
	for (size_t i = 0; i < LEN(TYPES); i++)
		make_kind(&kinds[i], TYPES[i]);
	make_pair(credited, SOCK_STREAM);
	set(credited[1], SO_PASSCRED, 1);
	write_all(credited[0], "who wrote this?", 15);
	maker = (struct ucred){getpid(), geteuid(), getegid()};
}

/* ---- protocol --------------------------------------------------------------------------------- */

static void check_exchange(struct kind *k)
{
	EXPECT(send(k->plain[0], "ping", 4, MSG_DONTWAIT) == 4 && recv(k->dup, buffer, 9, MSG_DONTWAIT) == 4, "no ping of type %d", k->type);
	EXPECT(send(k->dup, "pong", 4, MSG_DONTWAIT) == 4 && recv(k->plain[0], buffer, 9, MSG_DONTWAIT) == 4, "no pong of type %d", k->type);
	EXPECT(recv(k->plain[1], buffer, 9, MSG_DONTWAIT) < 0 && errno == EAGAIN, "the duplicate is another socket");
}

static void check_maker(int fd)
{
	struct ucred is;
	socklen_t len = sizeof is;

	EXPECT(!getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &is, &len), "SO_PEERCRED: %s", strerror(errno));
	EXPECT(is.pid == maker.pid && is.uid == maker.uid && is.gid == maker.gid,
	       "made by %d of %u:%u, not by %d", is.pid, is.uid, is.gid, maker.pid);
}

static void check_ends(struct kind *k)
{
	static char saved[sizeof buffer];
	struct pollfd p = {.fd = k->left, .events = POLLIN};
	ssize_t n = recv(k->left, saved, sizeof saved, MSG_PEEK | MSG_DONTWAIT);

	memcpy(buffer, saved, sizeof buffer);
	compare(n < 0 ? 0 : (size_t)n, &k->last, 0, 1);
	poll(&p, 1, 0);
	if (k->type == SOCK_DGRAM)
		return;
	EXPECT(p.revents == (POLLIN | POLLHUP), "the end without another one has events %x", p.revents);
	EXPECT(recv(k->half[1], buffer, 9, MSG_DONTWAIT) == 0, "the half closed pair is not at its end");
	EXPECT(send(k->half[0], "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE, "the closed half can be written");
	EXPECT(send(k->half[1], "back", 4, MSG_NOSIGNAL) == 4 && recv(k->half[0], buffer, 9, MSG_DONTWAIT) == 4,
	       "the open half of type %d does not work", k->type);
}

static void check_credentials(void)
{
	union { char bytes[CMSG_SPACE(sizeof(struct ucred))]; struct cmsghdr align; } control;
	struct iovec vector = {buffer, sizeof buffer};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t n = recvmsg(credited[1], &message, MSG_DONTWAIT);
	struct cmsghdr *got = CMSG_FIRSTHDR(&message);
	struct ucred who = {0};

	EXPECT(n == 15 && !memcmp(buffer, "who wrote this?", 15), "the credited stream gives %zd bytes", n);
	EXPECT(got && got->cmsg_type == SCM_CREDENTIALS, "no credentials came");
	if (got)
		memcpy(&who, CMSG_DATA(got), sizeof who);
	EXPECT(who.pid == maker.pid && who.uid == maker.uid, "written by %d of %u", who.pid, who.uid);
	write_all(credited[0], "who wrote this?", 15);
}

static void check(void)
{
	for (struct kind *k = kinds; k < kinds + LEN(kinds); k++) {
		int type = k->type;

		EXPECT(get(k->plain[0], SO_TYPE) == type, "type %d, not %d", get(k->plain[0], SO_TYPE), type);
		check_queue(&k->there);
		check_queue(&k->back);
		check_exchange(k);
		check_ends(k);
		check_maker(k->plain[0]);
		check_maker(k->full[1]);
		EXPECT(get(k->tuned[0], SO_SNDBUF) == 100000, "SO_SNDBUF %d", get(k->tuned[0], SO_SNDBUF));
		EXPECT(get(k->tuned[0], SO_PRIORITY) == 5, "SO_PRIORITY %d", get(k->tuned[0], SO_PRIORITY));
		EXPECT(get(k->tuned[1], SO_PASSCRED) == 1, "SO_PASSCRED %d", get(k->tuned[1], SO_PASSCRED));
		EXPECT(get(k->full[0], SO_SNDBUF) == get(k->plain[0], SO_SNDBUF), "the full pair has another buffer");
		EXPECT(fcntl(k->plain[0], F_GETFD) == FD_CLOEXEC && fcntl(k->tuned[0], F_GETFD) == 0, "close on exec");
		EXPECT(fcntl(k->full[0], F_GETFL) == (O_RDWR | O_NONBLOCK), "flags %x", fcntl(k->full[0], F_GETFL));
	}
	check_credentials();
}

static void send_more(void)
{
	for (struct kind *k = kinds; k < kinds + LEN(kinds); k++) {
		if (k->type == SOCK_DGRAM && k->there.n > 8) {
			drain(&k->there);	/* the kernel takes some ten packets */
			k->there.n = 0;
		}
		append(&k->there);
	}
}

static int pass_fds(int channel, const int *fds, int n)
{
	union { char bytes[CMSG_SPACE(2 * sizeof(int))]; struct cmsghdr align; } control = {0};
	struct iovec vector = {"x", 1};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};

	control.align = (struct cmsghdr){CMSG_LEN((size_t)n * sizeof *fds), SOL_SOCKET, SCM_RIGHTS};
	memcpy(CMSG_DATA(&control.align), fds, (size_t)n * sizeof *fds);
	return sendmsg(channel, &message, 0) != 1;
}

static void take_fds(int channel, int *fds, int n)
{
	union { char bytes[CMSG_SPACE(2 * sizeof(int))]; struct cmsghdr align; } control;
	struct iovec vector = {buffer, 1};
	struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};

	if (recvmsg(channel, &message, MSG_CMSG_CLOEXEC) != 1 || !CMSG_FIRSTHDR(&message))
		die("no descriptors came");
	memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), (size_t)n * sizeof *fds);
}

static void damage_content(void) { EXPECT(take(kinds[0].full[1]), "nothing there"); put(&kinds[0].there, 7, 77); }
static void damage_packet(void) { EXPECT(take(kinds[1].full[1]), "nothing there"); }
static void damage_order(void)
{
	ssize_t n = recv(kinds[2].full[0], wanted, sizeof wanted, MSG_DONTWAIT);

	EXPECT(n > 0 && send(kinds[2].full[1], wanted, (size_t)n, MSG_DONTWAIT) == n, "cannot exchange packets");
}
static void damage_buffer(void) { set(kinds[0].tuned[0], SO_SNDBUF, 40000); }
static void damage_option(void) { set(kinds[1].tuned[1], SO_PASSCRED, 0); }
static void damage_flags(void) { fcntl(kinds[0].full[0], F_SETFL, 0); }
static void damage_shutdown(void) { shutdown(kinds[0].half[1], SHUT_WR); }
static void damage_closed(void) { close(kinds[2].plain[0]); }
static void damage_sharing(void)
{
	int other[2];

	make_pair(other, SOCK_DGRAM);
	dup3(other[0], kinds[1].dup, O_CLOEXEC);
}
/* Its writer is a child of ours now. */
static void damage_writer(void)
{
	EXPECT(take(credited[1]) == 15, "the credited stream is empty");
	if (fork() == 0) {
		write_all(credited[0], "who wrote this?", 15);
		_exit(0);
	}
	wait(NULL);
}

/* A pair as before, but made by a child: it hands the ends over. */
static void damage_maker(void)
{
	int channel[2];

	make_pair(channel, SOCK_STREAM);
	if (fork() == 0) {
		maker.pid = getpid();
		make_pair(kinds[0].plain, SOCK_STREAM);
		_exit(pass_fds(channel[0], kinds[0].plain, 2));
	}
	wait(NULL);
	close(kinds[0].plain[0]);
	close(kinds[0].plain[1]);
	take_fds(channel[1], kinds[0].plain, 2);
	dup3(kinds[0].plain[1], kinds[0].dup, O_CLOEXEC);
	close(channel[0]);
	close(channel[1]);
}

int main(void)
{
	static const struct named steps[] = {{"send", send_more}, {NULL, NULL}};
	static const struct named damages[] = {
		{"content", damage_content}, {"packet", damage_packet}, {"order", damage_order}, {"buffer", damage_buffer},
		{"option", damage_option}, {"flags", damage_flags}, {"shutdown", damage_shutdown},
		{"closed", damage_closed}, {"sharing", damage_sharing}, {"writer", damage_writer},
		{"maker", damage_maker}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
