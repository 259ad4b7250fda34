/*
 * What every workload shares: the protocol on stdin and stdout, the verdict, small syscalls, and a gate
 * that stops worker threads at a safe point. All of it is in headers, so that a workload is one gcc
 * call. pages.h adds page contents that can be predicted.
 *
 * The programs know nothing of checkpoints. Everything they need in order to judge themselves is in
 * their own memory, so a restored process judges by what was restored with it.
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define NS_PER_S 1000000000ll
#define LEN(array) (sizeof(array) / sizeof((array)[0]))

/* ---- trouble ---------------------------------------------------------------------------------- */

/* The program cannot do its work at all: say so on stderr, with errno, and end with status 3. */
static inline __attribute__((format(printf, 1, 2), noreturn)) void die(const char *format, ...)
{
	int error = errno;
	char text[512];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof text, format, args);
	va_end(args);
	dprintf(2, "%s: %s\n", text, strerror(error));
	_exit(3);
}

static struct {
	_Atomic int state;		/* 0 nothing wrong, 1 somebody writes the reason, 2 reason complete */
	bool ever;			/* a FAIL was answered, or will be */
	char why[400];
} verdict;

/* Something is not as it must be. Any thread may call it at any time; the first reason is answered to
 * the next `check`. */
static inline __attribute__((format(printf, 1, 2))) void fail(const char *format, ...)
{
	int nothing = 0;
	va_list args;

	if (!atomic_compare_exchange_strong(&verdict.state, &nothing, 1))
		return;
	va_start(args, format);
	vsnprintf(verdict.why, sizeof verdict.why, format, args);
	va_end(args);
	verdict.ever = true;
	atomic_store(&verdict.state, 2);
}

#define EXPECT(condition, ...) do { if (!(condition)) fail(__VA_ARGS__); } while (0)

/* ---- protocol --------------------------------------------------------------------------------- */

static inline void write_all(int fd, const void *data, size_t len)
{
	const char *at = data;

	while (len) {
		ssize_t n = write(fd, at, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			die("write to fd %d", fd);
		at += n;
		len -= (size_t)n;
	}
}

/* Answer one line. */
static inline __attribute__((format(printf, 1, 2))) void say(const char *format, ...)
{
	char text[16384];
	va_list args;
	int len;

	va_start(args, format);
	len = vsnprintf(text, sizeof text - 1, format, args);
	va_end(args);
	if (len > (int)sizeof text - 2)
		len = sizeof text - 2;
	text[len] = '\n';
	write_all(1, text, (size_t)len + 1);
}

/* Read one command without its newline; false at the end of input. */
static inline bool next_line(char *line, size_t size)
{
	static char held[1024];
	static size_t n_held;

	for (;;) {
		char *end = memchr(held, '\n', n_held);
		ssize_t n;

		if (end) {
			size_t len = (size_t)(end - held);

			if (len >= size)
				die("command too long");
			memcpy(line, held, len);
			line[len] = 0;
			n_held -= len + 1;
			memmove(held, end + 1, n_held);
			return true;
		}
		if (n_held == sizeof held)
			die("command too long");
		n = read(0, held + n_held, sizeof held - n_held);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			die("read commands");
		if (n == 0)
			return false;
		n_held += (size_t)n;
	}
}

struct command {
	const char *name;
	void (*run)(char *argument);	/* says its own answer */
};

/* Something that can be done by name, or in turn; the last entry of a list has a null name. */
struct named {
	const char *name;
	void (*run)(void);
};

struct program {
	void (*check)(void);		/* calls fail() for what is wrong */
	const struct named *steps;	/* each does one next thing; may be null */
	const struct named *damages;	/* each damages the state so that the next check must fail */
	const struct command *others;	/* ends with a null name; may be null */
};

static inline bool run_named(const struct named *list, const char *name, size_t *turn)
{
	size_t n = 0;

	while (list && list[n].name && strcmp(list[n].name, name))
		n++;
	if (!*name && list && list[0].name) {
		n = *turn;
		*turn = list[n + 1].name ? n + 1 : 0;
	}
	if (!list || !list[n].name)
		return false;
	list[n].run();
	return true;
}

static inline void say_names(const char *word, const struct named *list)
{
	char text[1024];
	size_t len = (size_t)snprintf(text, sizeof text, "%s", word);

	for (; list && list->name && len < sizeof text; list++)
		len += (size_t)snprintf(text + len, sizeof text - len, " %s", list->name);
	say("%s", text);
}

static inline void answer_verdict(const char *good)
{
	int state = atomic_load(&verdict.state);

	while (state == 1) {
		sched_yield();
		state = atomic_load(&verdict.state);
	}
	if (state == 0) {
		say("%s", good);
		return;
	}
	say("FAIL %s", verdict.why);
	atomic_store(&verdict.state, 0);
}

static inline void obey(const struct program *program, char *name, char *argument)
{
	static size_t step_turn, damage_turn;

	if (!strcmp(name, "check")) {
		program->check();
		answer_verdict("ok");
	} else if (!strcmp(name, "step")) {
		if (!run_named(program->steps, argument, &step_turn))
			fail("no step '%s'", argument);
		answer_verdict("stepped");
	} else if (!strcmp(name, "corrupt")) {
		/* Threads may notice at once; that is for the next check to say. */
		if (run_named(program->damages, argument, &damage_turn))
			say("corrupted");
		else
			say("FAIL no damage '%s'", argument);
	} else if (!strcmp(name, "steps")) {
		say_names(name, program->steps);
	} else if (!strcmp(name, "damages")) {
		say_names(name, program->damages);
	} else {
		const struct command *other = program->others;

		while (other && other->name && strcmp(other->name, name))
			other++;
		if (other && other->name) {
			other->run(argument);
		} else {
			fail("unknown command %s", name);
			answer_verdict("");
		}
	}
}

/* Obey commands until quit or the end of input; the value is main's exit status. A step may answer by
 * itself and go on in a loop of its own, deeper in the stack. */
static inline int serve_loop(const struct program *program)
{
	char line[256];

	while (next_line(line, sizeof line) && strcmp(line, "quit")) {
		char *argument = strchr(line, ' ');

		if (argument)
			*argument++ = 0;
		obey(program, line, argument ? argument : line + strlen(line));
	}
	return verdict.ever ? 1 : 0;
}

static inline int serve(const struct program *program)
{
	say("ready");
	return serve_loop(program);
}

/* ---- time and small syscalls ------------------------------------------------------------------ */

static inline int64_t now_ns(clockid_t clock)
{
	struct timespec ts;

	if (clock_gettime(clock, &ts))
		die("clock_gettime %d", (int)clock);
	return ts.tv_sec * NS_PER_S + ts.tv_nsec;
}

static inline struct timespec to_timespec(int64_t ns)
{
	return (struct timespec){.tv_sec = ns / NS_PER_S, .tv_nsec = ns % NS_PER_S};
}

/* The system call itself: -errno for an error, and no library code around it. */
static inline long raw_syscall(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long result;

	__asm__ volatile("syscall" : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

/* timeout_ns < 0: wait for as long as it takes. Returns early at any wake or signal: look again. */
static inline void futex_wait(_Atomic int *word, int value, int64_t timeout_ns)
{
	struct timespec ts = to_timespec(timeout_ns < 0 ? 0 : timeout_ns);

	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, timeout_ns < 0 ? NULL : &ts, NULL, 0);
}

static inline void futex_wake_all(_Atomic int *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static inline void *map_or_die(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	void *got = mmap(addr, len, prot, flags, fd, offset);

	if (got == MAP_FAILED)
		die("mmap %p len %zu", addr, len);
	return got;
}

static inline void *map_anonymous(size_t n_pages)
{
	return map_or_die(NULL, n_pages * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* Map `flags` again where the program itself has just unmapped something. Somebody else's short-lived
 * mapping may have landed there meanwhile: it is left alone until it is gone. */
static inline void map_back(void *addr, size_t len, int prot, int flags, int fd, off_t offset)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 20 * NS_PER_S;

	while (mmap(addr, len, prot, flags | MAP_FIXED_NOREPLACE, fd, offset) == MAP_FAILED) {
		if (errno != EEXIST || now_ns(CLOCK_MONOTONIC) > give_up)
			die("mmap again at %p len %zu", addr, len);
		sched_yield();
	}
}

static inline void start_thread(pthread_t *thread, void *(*run)(void *), void *argument)
{
	errno = pthread_create(thread, NULL, run, argument);
	if (errno)
		die("pthread_create");
}

/* ---- a gate that stops worker threads at a safe point ------------------------------------------ */

struct gate {
	_Atomic int closed;
	_Atomic int n_parked;
	int n_workers;
};

/* Called by a worker where its part of the state is consistent. */
static inline void gate_pass(struct gate *gate)
{
	if (!atomic_load_explicit(&gate->closed, memory_order_relaxed))
		return;
	atomic_fetch_add(&gate->n_parked, 1);
	futex_wake_all(&gate->n_parked);
	while (atomic_load(&gate->closed))
		futex_wait(&gate->closed, 1, -1);
	atomic_fetch_sub(&gate->n_parked, 1);
	futex_wake_all(&gate->n_parked);
}

static inline bool gate_await(struct gate *gate, int n_parked)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 20 * NS_PER_S;
	int now;

	while ((now = atomic_load(&gate->n_parked)) != n_parked) {
		if (now_ns(CLOCK_MONOTONIC) > give_up) {
			fail("%d of %d threads at the safe point, %d wanted", now, gate->n_workers,
			     n_parked);
			return false;
		}
		futex_wait(&gate->n_parked, now, NS_PER_S);
	}
	return true;
}

/* Stop all workers; false (and a verdict) if one of them never comes. */
static inline bool gate_close(struct gate *gate)
{
	atomic_store(&gate->closed, 1);
	return gate_await(gate, gate->n_workers);
}

static inline void gate_open(struct gate *gate)
{
	atomic_store(&gate->closed, 0);
	futex_wake_all(&gate->closed);
	gate_await(gate, 0);
}

/* ---- threads that do what main asks for -------------------------------------------------------- */

struct servant {
	pthread_t thread;
	pid_t tid;
	_Atomic int asked;		/* 1: run `task` */
	void (*task)(struct servant *);
	void *own;
};

static inline void *servant_run(void *argument)
{
	struct servant *s = argument;

	s->tid = (pid_t)syscall(SYS_gettid);
	for (;;) {
		if (atomic_load(&s->asked)) {
			s->task(s);
			atomic_store(&s->asked, 0);
			futex_wake_all(&s->asked);
		}
		futex_wait(&s->asked, 0, -1);
	}
	return NULL;
}

/* Let the thread run the task, and wait until it has. */
static inline void servant_ask(struct servant *s, void (*task)(struct servant *))
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 20 * NS_PER_S;

	s->task = task;
	atomic_store(&s->asked, 1);
	futex_wake_all(&s->asked);
	while (atomic_load(&s->asked)) {
		if (now_ns(CLOCK_MONOTONIC) > give_up)
			return fail("thread %d does not answer", (int)s->tid);
		futex_wait(&s->asked, 1, NS_PER_S);
	}
}

/* ---- numbers that look random and can be had again ------------------------------------------------- */

static inline uint64_t mix64(uint64_t x)
{
	x += 0x9e3779b97f4a7c15u;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

static inline uint64_t next_random(uint64_t *state)
{
	*state += 0x9e3779b97f4a7c15u;
	return mix64(*state);
}

#endif
