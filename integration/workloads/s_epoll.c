/*
 * s_epoll: epoll instances, what they watch, and what they have seen.
 *
 * Targets: pipes, eventfds, a listening socket, one instance inside another, the same file twice (two descriptors), a
 * descriptor number that was closed and used again. Modes: level, edge (with an event that was reported, which
 * may come a second time, and one that was not), one shot (armed and spent), exclusive, with all 64 bits of data. `check` compares what
 * /proc/self/fdinfo lists with the start and asks each instance for its events; what it takes it puts back.
 * `step fire` makes events happen; the next check wants each of them once.
 */
#include "workload.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#define MAX_TARGETS 16

static struct target {
	const char *name;
	int epoll, fd;
	uint32_t events;
	uint64_t data;
	bool spent;			/* one shot, and it was */
	uint32_t due;			/* what the next wait must report of it */
	uint32_t may;			/* what it may report again: an edge that was already seen */
} targets[MAX_TARGETS];
static int n_targets;
static int level, edge, inner, outer, pipes[4][2], counter, listener;
static struct sockaddr_in address;
static uint64_t n_fired;

static struct target *watch(const char *name, int epoll, int fd, uint32_t events)
{
	struct target *t = &targets[n_targets++];
	struct epoll_event event = {.events = events};

	*t = (struct target){.name = name, .epoll = epoll, .fd = fd, .events = events,
			     .data = mix64((uint64_t)n_targets)};
	event.data.u64 = t->data;
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl for %s", name);
	return t;
}

static struct target *find(const char *name)
{
	for (struct target *t = targets; t < targets + n_targets; t++)
		if (!strcmp(t->name, name))
			return t;
	die("no target %s", name);
}

static int compare_lines(const void *a, const void *b)
{
	return strcmp(a, b);
}

static size_t list_line(char lines[][64], size_t n, int fd, uint32_t events, uint64_t data)
{
	sprintf(lines[n], "fd %d events %x data %lx", fd, events, data);
	return n + 1;
}

/* What the kernel lists for one instance must be what the table says; in which order does not matter. */
static void check_listing(int epoll)
{
	static const uint32_t stay = EPOLLONESHOT | EPOLLET | EPOLLEXCLUSIVE;
	char path[64], line[256], is[MAX_TARGETS][64], must[MAX_TARGETS][64];
	size_t n_is = 0, n_must = 0;
	FILE *info;

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", epoll);
	info = fopen(path, "re");
	while (info && fgets(line, sizeof line, info) && n_is < MAX_TARGETS) {
		unsigned fd, events;
		unsigned long data;

		if (sscanf(line, "tfd: %u events: %x data: %lx", &fd, &events, &data) == 3)
			n_is = list_line(is, n_is, (int)fd, events, data);
	}
	if (info)
		fclose(info);
	for (struct target *t = targets; t < targets + n_targets; t++)
		if (t->epoll == epoll)		/* errors and hang-ups are always watched, but not once spent */
			n_must = list_line(must, n_must, t->fd, t->spent ? t->events & stay :
					   t->events | EPOLLERR | EPOLLHUP, t->data);
	qsort(is, n_is, sizeof is[0], compare_lines);
	qsort(must, n_must, sizeof must[0], compare_lines);
	EXPECT(n_is == n_must, "instance %d watches %zu files, not %zu", epoll, n_is, n_must);
	for (size_t i = 0; i < n_is && i < n_must; i++)
		EXPECT(!strcmp(is[i], must[i]), "instance %d watches '%s', not '%s'", epoll, is[i], must[i]);
}

/* ---- setting up ------------------------------------------------------------------------------- */

static void open_listener(void)
{
	socklen_t len = sizeof address;

	address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (bind(listener, (struct sockaddr *)&address, len) || listen(listener, 10) ||
	    getsockname(listener, (struct sockaddr *)&address, &len))
		die("listen");
}

/* Wait without waiting, and tell every target what was reported of it. */
static void collect(int epoll, uint32_t reported[MAX_TARGETS])
{
	struct epoll_event events[MAX_TARGETS];
	int n = epoll_wait(epoll, events, MAX_TARGETS, 0);

	for (int i = 0; i < n; i++) {
		int found = 0;

		for (int t = 0; t < n_targets; t++)
			if (targets[t].epoll == epoll && targets[t].data == events[i].data.u64) {
				reported[t] = events[i].events;
				found++;
			}
		EXPECT(found == 1, "an event came with unknown data %lx", (unsigned long)events[i].data.u64);
	}
}

static void prepare(void)
{
	uint32_t seen[MAX_TARGETS] = {0};
	int old, again;

	level = epoll_create1(EPOLL_CLOEXEC);
	edge = epoll_create1(0);
	inner = epoll_create1(EPOLL_CLOEXEC);
	outer = fcntl(epoll_create1(EPOLL_CLOEXEC), F_DUPFD_CLOEXEC, 60);
	for (int i = 0; i < 4; i++)
		if (pipe2(pipes[i], O_CLOEXEC | O_NONBLOCK))
			die("pipe2");
	counter = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	open_listener();
	old = dup(pipes[0][0]);
	watch("pipe", level, pipes[0][0], EPOLLIN);
	watch("full pipe", level, pipes[1][0], EPOLLIN | EPOLLRDHUP)->due = EPOLLIN;
	watch("writable end", level, pipes[1][1], EPOLLOUT)->due = EPOLLOUT;
	watch("pipe again", level, old, EPOLLIN | EPOLLPRI);
	watch("listener", level, listener, EPOLLIN);
	watch("counter", level, counter, EPOLLIN | EPOLLEXCLUSIVE);
	watch("inner instance", outer, inner, EPOLLIN);
	watch("in the inner one", inner, pipes[2][0], EPOLLIN);
	watch("one shot", edge, pipes[2][0], EPOLLIN | EPOLLONESHOT);
	watch("spent", edge, pipes[1][0], EPOLLIN | EPOLLONESHOT);
	watch("edge, reported", edge, pipes[3][0], EPOLLIN | EPOLLET)->may = EPOLLIN;
	watch("edge, quiet", edge, pipes[0][0], EPOLLIN | EPOLLET);
	write_all(pipes[1][1], "stays", 5);
	write_all(pipes[3][1], "stays", 5);
	collect(edge, seen);			/* the first events: reported once, and spent */
	EXPECT(seen[find("spent") - targets] == EPOLLIN && seen[find("edge, reported") - targets] == EPOLLIN,
	       "the first events do not come");
	find("spent")->spent = true;
	/* A number that was closed and is used again by another file: the old entry is gone with its file. */
	again = eventfd(0, EFD_CLOEXEC);
	watch("short-lived", edge, again, EPOLLIN);
	n_targets--;
	close(again);
	if (eventfd(3, EFD_CLOEXEC) != again)
		die("another number");
}

/* ---- protocol --------------------------------------------------------------------------------- */

static void check(void)
{
	uint32_t reported[MAX_TARGETS] = {0};

	check_listing(level);
	check_listing(edge);
	check_listing(inner);
	check_listing(outer);
	collect(level, reported);
	collect(edge, reported);
	collect(inner, reported);
	collect(outer, reported);
	for (int i = 0; i < n_targets; i++) {
		struct target *t = &targets[i];

		EXPECT((reported[i] & ~t->may) == t->due, "%s: events %x, not %x", t->name, reported[i], t->due);
		t->spent |= (t->events & EPOLLONESHOT) && reported[i];
		if (t->events & (EPOLLET | EPOLLONESHOT))
			t->due = 0;
	}
}

/* A byte in both watched pipes and a count: each is due where it is watched, at an edge only once. */
static void fire(void)
{
	struct target *one_shot = find("one shot");
	struct epoll_event armed = {.events = one_shot->events, .data.u64 = one_shot->data};

	EXPECT(n_fired < 60000, "the pipes are full");
	write_all(pipes[0][1], "x", 1);
	write_all(pipes[2][1], "x", 1);
	EXPECT(!eventfd_write(counter, 1), "eventfd_write");
	if (n_fired++)
		EXPECT(!epoll_ctl(edge, EPOLL_CTL_MOD, one_shot->fd, &armed), "cannot arm it again");
	one_shot->spent = false;
	find("pipe")->due = find("pipe again")->due = find("counter")->due = EPOLLIN;
	find("in the inner one")->due = find("inner instance")->due = EPOLLIN;
	one_shot->due = find("edge, quiet")->due = EPOLLIN;
}

/* Empty what fire filled: nothing is due there any more. */
static void drain(void)
{
	char bytes[64];
	eventfd_t value;

	while (read(pipes[0][0], bytes, sizeof bytes) > 0 || read(pipes[2][0], bytes, sizeof bytes) > 0)
		;
	eventfd_read(counter, &value);
	find("pipe")->due = find("pipe again")->due = find("counter")->due = 0;
	find("in the inner one")->due = find("inner instance")->due = 0;
	find("one shot")->due = find("edge, quiet")->due = 0;
}

/* Somebody connects: the listener is readable until the connection is taken. */
static void knock(void)
{
	int here = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), there;
	uint32_t reported[MAX_TARGETS] = {0};
	struct linger at_once = {1, 0};
	struct pollfd polled = {.fd = listener, .events = POLLIN};

	EXPECT(!connect(here, (struct sockaddr *)&address, sizeof address), "cannot connect");
	while (poll(&polled, 1, 20000) < 0 && errno == EINTR)
		;
	collect(level, reported);
	EXPECT(reported[find("listener") - targets] == EPOLLIN, "the listener's event does not come");
	there = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	setsockopt(here, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
	close(here);
	close(there);
}

static void change(struct target *t, uint32_t events, uint64_t data)
{
	struct epoll_event event = {.events = events, .data.u64 = data};

	if (epoll_ctl(t->epoll, EPOLL_CTL_MOD, t->fd, &event))
		die("EPOLL_CTL_MOD");
}

static void remove_target(struct target *t)
{
	epoll_ctl(t->epoll, EPOLL_CTL_DEL, t->fd, NULL);
}

static void damage_data(void) { struct target *t = find("full pipe"); change(t, t->events, t->data ^ 1); }
static void damage_events(void) { struct target *t = find("pipe"); change(t, EPOLLIN | EPOLLPRI, t->data); }
static void damage_removed(void) { remove_target(find("pipe again")); }
static void damage_inner(void) { remove_target(find("inner instance")); fire(); }
static void damage_spent(void) { struct target *t = find("spent"); change(t, t->events, t->data); }
static void damage_edge(void) { struct target *t = find("edge, quiet"); change(t, t->events & ~EPOLLET, t->data); }
static void damage_content(void) { char bytes[8]; EXPECT(read(pipes[1][0], bytes, 8) == 5, "read"); }

int main(void)
{
	static const struct named steps[] = {{"fire", fire}, {"drain", drain}, {"knock", knock}, {NULL, NULL}};
	static const struct named damages[] = {
		{"data", damage_data}, {"events", damage_events}, {"removed", damage_removed},
		{"inner", damage_inner}, {"spent", damage_spent}, {"edge", damage_edge},
		{"content", damage_content}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
