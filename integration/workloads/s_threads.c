/*
 * s_threads: what belongs to a thread and not to its process.
 *
 * Five threads differ in name (one looks like the end of a stat line), signal mask, alternative stack (one has none, one
 * disarms it by itself), thread-local storage, robust list, and pending signals with their siginfo. The last
 * one waits in ppoll with a temporary mask, the others at a futex. The threads look at themselves when main asks.
 * `step respawn` lets a thread end while it holds a robust mutex and starts a successor: joining needs the address
 * that the kernel clears at its end, and the mutex must report that its owner died.
 */
#include "workload.h"

#include <linux/prctl.h>
#include <sys/prctl.h>

#define N_THREADS 5
#define PPOLLER (N_THREADS - 1)
#define MAX_PENDING 8

struct worker {
	int index;
	pthread_t thread;
	pid_t tid;
	_Atomic int request;		/* 1: run `task` */
	void (*task)(struct worker *);
	bool leave;
	const char *name;
	uint64_t mask;			/* bit n - 1: signal n is blocked */
	stack_t alternative;
	pthread_mutex_t robust;
	void *robust_head, *tls_at;
	size_t robust_len;
	int wake[2];			/* of the one that polls */
	siginfo_t pending[MAX_PENDING];	/* in the order in which the kernel hands them out */
	int n_pending;
};

static struct worker workers[N_THREADS];
static const char *const THREAD_NAMES[N_THREADS] = {"plain", "fifteen-letters", "a) R 1 (b", "", "\xc3\xbc \\n ppoll"};
static __thread uint64_t tls_value;
static __thread char tls_text[2000] = "as it was linked";
static pthread_key_t specific;
static __thread uintptr_t handler_at;

static uint64_t bit(int number)
{
	return 1ull << (number - 1);
}

/* ---- what a thread sets up for itself ----------------------------------------------------------- */

static void queue(struct worker *w, int number, int code, int value)
{
	siginfo_t *info = &w->pending[w->n_pending++];

	info->si_signo = number;
	info->si_code = code;
	info->si_pid = code == SI_TKILL ? getpid() : 4000 + value;	/* who sent it: anything may stand here */
	info->si_uid = code == SI_TKILL ? 0 : 5000;
	info->si_value.sival_ptr = NULL;
	if (code != SI_TKILL)
		info->si_value.sival_ptr = (void *)(0x123400000000 + value);
	if (syscall(SYS_rt_tgsigqueueinfo, getpid(), w->tid, number, info))
		die("rt_tgsigqueueinfo");
}

static void prepare(struct worker *w)
{
	static const size_t stack_sizes[N_THREADS] = {0, 65536, 20480, 36864, 65536};
	pthread_mutexattr_t robust;

	w->tid = (pid_t)syscall(SYS_gettid);
	w->name = THREAD_NAMES[w->index];
	prctl(PR_SET_NAME, w->name);
	tls_value = mix64((uint64_t)w->index);
	snprintf(tls_text + 1000, 100, "written by thread %d", w->index);
	w->tls_at = &tls_value;
	pthread_setspecific(specific, w);
	w->alternative = (stack_t){.ss_flags = SS_DISABLE};
	if (stack_sizes[w->index]) {
		w->alternative.ss_sp = map_anonymous(stack_sizes[w->index] / PAGE);
		w->alternative.ss_size = stack_sizes[w->index];
		w->alternative.ss_flags = w->index == 3 ? (int)(1u << 31) /* SS_AUTODISARM */ : 0;
	}
	sigaltstack(&w->alternative, NULL);
	syscall(SYS_get_robust_list, 0, &w->robust_head, &w->robust_len);
	pthread_mutexattr_init(&robust);
	pthread_mutexattr_setrobust(&robust, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&w->robust, &robust);
	pthread_mutex_lock(&w->robust);
	w->mask = bit(SIGUSR2) | bit(SIGRTMIN + 5) | bit(SIGTERM) | mix64((uint64_t)w->index + 9) << 40;
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &w->mask, NULL, sizeof w->mask);
	w->n_pending = 0;
	if (w->index == 0)
		return;			/* this one has nothing pending */
	queue(w, SIGUSR2, SI_QUEUE, w->index);
	queue(w, SIGTERM, SI_TKILL, 0);
	queue(w, SIGRTMIN + 5, SI_QUEUE, 10 * w->index);
	queue(w, SIGRTMIN + 5, -60, 10 * w->index + 1);		/* a code that nobody has defined */
	queue(w, SIGRTMIN + 5, SI_MESGQ, 10 * w->index + 2);
}

/* ---- what a thread finds out about itself -------------------------------------------------------- */

static void check_signals(struct worker *w)
{
	uint64_t mask = 0, waiting = 0, all = ~0ull;
	siginfo_t got[MAX_PENDING + 1];
	struct timespec none = {0, 0};
	int n = 0;

	syscall(SYS_rt_sigprocmask, SIG_SETMASK, NULL, &mask, sizeof mask);
	EXPECT(mask == w->mask, "thread %d blocks %lx, blocked %lx", w->index, mask, w->mask);
	syscall(SYS_rt_sigpending, &waiting, sizeof waiting);
	/* Take them out one by one, compare, and queue them again in the same order. */
	while (n <= MAX_PENDING && syscall(SYS_rt_sigtimedwait, &all, &got[n], &none, sizeof all) > 0)
		n++;
	EXPECT(n == w->n_pending, "thread %d has %d signals pending, had %d", w->index, n, w->n_pending);
	for (int i = 0; i < n && i < w->n_pending; i++) {
		const siginfo_t *is = &got[i], *was = &w->pending[i];

		EXPECT(waiting & bit(was->si_signo), "thread %d: signal %d is not pending", w->index,
		       was->si_signo);
		EXPECT(is->si_signo == was->si_signo && is->si_code == was->si_code &&
		       is->si_pid == was->si_pid && is->si_uid == was->si_uid &&
		       (was->si_code == SI_TKILL || is->si_value.sival_ptr == was->si_value.sival_ptr),
		       "thread %d: pending signal %d is %d code %d pid %d value %p, was %d code %d pid %d value %p",
		       w->index, i, is->si_signo, is->si_code, is->si_pid, is->si_value.sival_ptr,
		       was->si_signo, was->si_code, was->si_pid, was->si_value.sival_ptr);
	}
	for (int i = 0; i < n; i++)
		syscall(SYS_rt_tgsigqueueinfo, getpid(), w->tid, got[i].si_signo, &got[i]);
}

static void note_place(int number)
{
	(void)number;
	handler_at = (uintptr_t)__builtin_frame_address(0);
}

static void check_stack(struct worker *w)
{
	const stack_t *was = &w->alternative;
	stack_t is;
	uintptr_t from = (uintptr_t)was->ss_sp;

	sigaltstack(NULL, &is);
	EXPECT(is.ss_sp == was->ss_sp && is.ss_size == was->ss_size && is.ss_flags == was->ss_flags,
	       "thread %d: alternative stack %p size %zu flags %x, was %p size %zu flags %x", w->index,
	       is.ss_sp, is.ss_size, (unsigned)is.ss_flags, was->ss_sp, was->ss_size,
	       (unsigned)was->ss_flags);
	syscall(SYS_tgkill, getpid(), w->tid, SIGUSR1);
	EXPECT((handler_at >= from && handler_at < from + was->ss_size) == (was->ss_size > 0),
	       "thread %d: a handler ran at %p", w->index, (void *)handler_at);
}

static void check_self(struct worker *w)
{
	char name[16] = "", text[32];
	void *head;
	size_t len;

	EXPECT((pid_t)syscall(SYS_gettid) == w->tid, "thread %d has tid %ld", w->index, syscall(SYS_gettid));
	prctl(PR_GET_NAME, name);
	EXPECT(!strcmp(name, w->name), "thread %d is named '%s', was '%s'", w->index, name, w->name);
	snprintf(text, sizeof text, "written by thread %d", w->index);
	EXPECT(&tls_value == w->tls_at && tls_value == mix64((uint64_t)w->index) &&
	       !strcmp(tls_text, "as it was linked") && !strcmp(tls_text + 1000, text) &&
	       pthread_equal(pthread_self(), w->thread), "thread %d: thread-local storage changed", w->index);
	EXPECT(pthread_getspecific(specific) == w, "thread %d: its specific value changed", w->index);
	syscall(SYS_get_robust_list, 0, &head, &len);
	EXPECT(head == w->robust_head && len == w->robust_len, "thread %d: robust list at %p, was %p",
	       w->index, head, w->robust_head);
	EXPECT(pthread_mutex_trylock(&w->robust) == EBUSY, "thread %d lost its mutex", w->index);
	check_stack(w);
	check_signals(w);
}

/* ---- threads ---------------------------------------------------------------------------------- */

/* A mask that holds only while it sleeps: what a dump reads must be the other one, and both must live. */
static void wait_in_ppoll(struct worker *w)
{
	struct pollfd polled = {.fd = w->wake[0], .events = POLLIN};
	uint64_t while_asleep = ~0ull;
	long n = raw_syscall(SYS_ppoll, (long)&polled, 1, 0, (long)&while_asleep, sizeof while_asleep, 0);
	char byte;

	EXPECT(n == 1, "ppoll returned %ld", n);
	EXPECT(n != 1 || read(w->wake[0], &byte, 1) == 1, "nothing to read after ppoll");
}

static void *work(void *argument)
{
	struct worker *w = argument;

	prepare(w);
	atomic_store(&w->request, 0);
	futex_wake_all(&w->request);
	while (!w->leave) {
		if (w->index == PPOLLER)
			wait_in_ppoll(w);
		else
			futex_wait(&w->request, 0, -1);
		if (!atomic_load(&w->request))
			continue;
		w->task(w);
		atomic_store(&w->request, 0);
		futex_wake_all(&w->request);
	}
	return NULL;
}

static void await(struct worker *w)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 20 * NS_PER_S;

	while (atomic_load(&w->request)) {
		if (now_ns(CLOCK_MONOTONIC) > give_up)
			return fail("thread %d does not answer", w->index);
		futex_wait(&w->request, 1, NS_PER_S);
	}
}

static void run_in(struct worker *w, void (*task)(struct worker *))
{
	w->task = task;
	atomic_store(&w->request, 1);
	if (w->index == PPOLLER)
		write_all(w->wake[1], "x", 1);
	else
		futex_wake_all(&w->request);
	await(w);
}

static void start(struct worker *w)
{
	w->leave = false;
	atomic_store(&w->request, 1);
	start_thread(&w->thread, work, w);
	await(w);
}

/* ---- protocol --------------------------------------------------------------------------------- */

static void check(void)
{
	char path[64], name[32];

	for (struct worker *w = workers; w < workers + N_THREADS; w++) {
		int fd;
		ssize_t n;

		snprintf(path, sizeof path, "/proc/self/task/%d/comm", (int)w->tid);
		fd = open(path, O_RDONLY | O_CLOEXEC);
		n = read(fd, name, sizeof name - 1);
		close(fd);
		name[n > 0 ? n - 1 : 0] = 0;
		EXPECT(!strcmp(name, w->name), "thread %d is called '%s'", w->index, name);
		run_in(w, check_self);
	}
}

static void leave(struct worker *w)
{
	w->leave = true;
}

static void respawn(void)
{
	static unsigned turn;
	struct worker *w = &workers[turn++ % N_THREADS];

	run_in(w, leave);
	EXPECT(!pthread_join(w->thread, NULL), "cannot join");
	EXPECT(pthread_mutex_lock(&w->robust) == EOWNERDEAD, "the mutex of a dead thread does not say so");
	pthread_mutex_consistent(&w->robust);
	pthread_mutex_unlock(&w->robust);
	start(w);
}

static void spoil_name(struct worker *w) { (void)w; prctl(PR_SET_NAME, "other"); }
static void spoil_tls(struct worker *w) { (void)w; tls_text[1003] ^= 1; }
static void spoil_specific(struct worker *w) { (void)w; pthread_setspecific(specific, &specific); }
static void spoil_robust(struct worker *w) { syscall(SYS_set_robust_list, &w->name, w->robust_len); }
static void spoil_mutex(struct worker *w) { pthread_mutex_unlock(&w->robust); }

static void spoil_stack(struct worker *w)
{
	stack_t smaller = w->alternative;

	smaller.ss_size -= PAGE;
	sigaltstack(&smaller, NULL);
}

static void spoil_mask(struct worker *w)
{
	uint64_t mask = w->mask ^ bit(SIGHUP);

	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, sizeof mask);
}

static void spoil_pending(struct worker *w)
{
	uint64_t set = bit(SIGRTMIN + 5);
	struct timespec none = {0, 0};
	siginfo_t info;

	(void)w;
	syscall(SYS_rt_sigtimedwait, &set, &info, &none, sizeof set);
}

/* The same signals in another order. */
static void spoil_order(struct worker *w)
{
	uint64_t set = bit(SIGRTMIN + 5);
	struct timespec none = {0, 0};
	siginfo_t info;

	syscall(SYS_rt_sigtimedwait, &set, &info, &none, sizeof set);
	syscall(SYS_rt_tgsigqueueinfo, getpid(), w->tid, info.si_signo, &info);
}

static void damage_name(void) { run_in(&workers[1], spoil_name); }
static void damage_tls(void) { run_in(&workers[1], spoil_tls); }
static void damage_specific(void) { run_in(&workers[2], spoil_specific); }
static void damage_robust(void) { run_in(&workers[2], spoil_robust); }
static void damage_mutex(void) { run_in(&workers[3], spoil_mutex); }
static void damage_stack(void) { run_in(&workers[3], spoil_stack); }
static void damage_mask(void) { run_in(&workers[PPOLLER], spoil_mask); }
static void damage_pending(void) { run_in(&workers[PPOLLER], spoil_pending); }
static void damage_order(void) { run_in(&workers[1], spoil_order); }

int main(void)
{
	static const struct named steps[] = {{"respawn", respawn}, {NULL, NULL}};
	static const struct named damages[] = {
		{"name", damage_name}, {"tls", damage_tls}, {"specific", damage_specific},
		{"robust", damage_robust}, {"mutex", damage_mutex}, {"stack", damage_stack},
		{"mask", damage_mask}, {"pending", damage_pending}, {"order", damage_order}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};
	struct sigaction action = {.sa_handler = note_place, .sa_flags = SA_ONSTACK | SA_RESTART};

	sigaction(SIGUSR1, &action, NULL);
	pthread_key_create(&specific, NULL);
	for (int i = 0; i < N_THREADS; i++) {
		workers[i].index = i;
		if (pipe2(workers[i].wake, O_CLOEXEC))
			die("pipe2");
		start(&workers[i]);
	}
	return serve(&program);
}
