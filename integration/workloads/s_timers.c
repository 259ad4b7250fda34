/*
 * s_timers: the three interval timers, and POSIX timers with gaps between their ids.
 *
 * Timers differ in clock, notification (signal, signal to one thread, none), value, interval, and state (running for
 * hours, periodic, absolute, never armed, run out, ringing with its signal blocked so that it overruns). What the
 * kernel lists in /proc/self/timers must stay word for word. The time that remains may not grow while
 * somebody watches, and may not be less than the clock has left of it: while the process is not there, time may
 * stand still for its timers, but never fly. `drift` answers by how many nanoseconds it stood still at most, as of the
 * latest check. `step tick` waits for three more signals of the periodic timers.
 */
#include "workload.h"

#include <sys/time.h>

#define N_TIMERS 12
#define HOUR (3600 * NS_PER_S)
#define TOLERANCE 20000000ll		/* ns: a tick of CPU clocks and of coarse reading, generously */

enum { OFTEN = 9, TO_THREAD = 10, OVERRUN = 11 };	/* the timers that ring */

static struct timer {
	bool exists;
	clockid_t clock;
	int notify, signal;
	int64_t first, interval, deadline, last_left;
	int flags, id;
} timers[N_TIMERS] = {
	{true, CLOCK_MONOTONIC, SIGEV_SIGNAL, 40, HOUR, 0, 0, 0, 0, 0},
	{true, CLOCK_REALTIME, SIGEV_SIGNAL, 41, 2 * HOUR, 7 * NS_PER_S, 0, 0, 0, 0},
	{false, CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0, 0, 0, 0, 0},
	{true, CLOCK_BOOTTIME, SIGEV_NONE, 0, HOUR, NS_PER_S / 3, 0, 0, 0, 0},
	{true, CLOCK_PROCESS_CPUTIME_ID, SIGEV_SIGNAL, 42, HOUR, HOUR, 0, 0, 0, 0},
	{false, CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0, 0, 0, 0, 0},
	{true, CLOCK_MONOTONIC, SIGEV_SIGNAL, 43, 3 * HOUR, 0, 0, 0, TIMER_ABSTIME, 0},
	{true, CLOCK_MONOTONIC, SIGEV_SIGNAL, 44, 0, 0, 0, 0, 0, 0},		/* never armed */
	{true, CLOCK_MONOTONIC, SIGEV_NONE, 0, 1, 0, 0, 0, 0, 0},			/* has run out */
	{true, CLOCK_MONOTONIC, SIGEV_SIGNAL, 45, 20000000, 20000000, 0, 0, 0, 0},
	{true, CLOCK_MONOTONIC, SIGEV_THREAD_ID, 46, 25000000, 25000000, 0, 0, 0, 0},
	{true, CLOCK_MONOTONIC, SIGEV_SIGNAL, 47, 1000000, 1000000, 0, 0, 0, 0},
};
static struct { int which; int64_t first, interval, last_left; } itimers[3] = {
	{ITIMER_REAL, HOUR, 11 * NS_PER_S, 0},
	{ITIMER_VIRTUAL, 2 * HOUR, 0, 0},
	{ITIMER_PROF, 3 * HOUR, NS_PER_S / 2, 0},
};
static char listing[4096];
static pid_t other_tid;
static _Atomic int parked;
static volatile int rings[N_TIMERS], wrong_place;
static int64_t drift_ns;

static void read_listing(char *text, size_t size)
{
	int fd = open("/proc/self/timers", O_RDONLY | O_CLOEXEC);
	ssize_t n = read(fd, text, size - 1);

	text[n < 0 ? 0 : n] = 0;	/* a kernel may be built without this file */
	close(fd);
}

static void ring(int number, siginfo_t *info, void *context)
{
	int which = info->si_value.sival_int - 1000;

	(void)context;
	if (which < 0 || which >= N_TIMERS || timers[which].signal != number ||
	    info->si_code != SI_TIMER || info->si_timerid != timers[which].id ||
	    (which == TO_THREAD) != ((pid_t)syscall(SYS_gettid) == other_tid))
		wrong_place++;
	else
		rings[which] += 1 + info->si_overrun;
}

static void *park(void *argument)
{
	sigset_t set;

	/* Open for its own timer's signal alone. */
	sigfillset(&set);
	sigdelset(&set, timers[TO_THREAD].signal);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	other_tid = (pid_t)syscall(SYS_gettid);
	atomic_store(&parked, 1);
	futex_wake_all(&parked);
	for (;;)
		futex_wait(&parked, 1, -1);
	return argument;
}

static struct itimerspec left_of(const struct timer *t)
{
	struct itimerspec spec;

	if (syscall(SYS_timer_gettime, t->id, &spec))
		fail("timer %d is gone", (int)(t - timers));
	return spec;
}

static int64_t to_ns(struct timespec ts)
{
	return ts.tv_sec * NS_PER_S + ts.tv_nsec;
}

static void create(struct timer *t, int value)
{
	struct sigevent event = {.sigev_notify = t->notify, .sigev_signo = t->signal};

	event.sigev_value.sival_int = value;
	if (t->notify == SIGEV_THREAD_ID)
		event._sigev_un._tid = other_tid;
	if (syscall(SYS_timer_create, t->clock, &event, &t->id))
		die("timer_create");
}

static void arm(struct timer *t)
{
	struct itimerspec spec = {to_timespec(t->interval), to_timespec(t->first)};

	t->last_left = t->first;
	t->deadline = now_ns(t->clock) + t->first;
	if (t->flags & TIMER_ABSTIME)
		spec.it_value = to_timespec(t->deadline);
	if (t->first && syscall(SYS_timer_settime, t->id, t->flags, &spec, NULL))
		die("timer_settime");
}

static void prepare(void)
{
	for (int i = 0; i < N_TIMERS; i++)
		create(&timers[i], 1000 + i);
	for (int i = 0; i < N_TIMERS; i++)
		if (!timers[i].exists)
			syscall(SYS_timer_delete, timers[i].id);	/* a gap */
	for (int i = 0; i < N_TIMERS; i++)
		if (timers[i].exists)
			arm(&timers[i]);
	for (size_t i = 0; i < LEN(itimers); i++) {
		struct itimerval value = {{itimers[i].interval / NS_PER_S, itimers[i].interval % NS_PER_S / 1000},
					  {itimers[i].first / NS_PER_S, 0}};

		if (setitimer((__itimer_which_t)itimers[i].which, &value, NULL))
			die("setitimer");
		itimers[i].last_left = itimers[i].first;
	}
	read_listing(listing, sizeof listing);
}

/* ---- checks ----------------------------------------------------------------------------------- */

static void check_long(struct timer *t)
{
	int number = (int)(t - timers);
	int64_t before = now_ns(t->clock), left, stood_still;
	struct itimerspec spec = left_of(t);

	left = to_ns(spec.it_value);
	stood_still = left - (t->deadline - before);
	EXPECT(to_ns(spec.it_interval) == t->interval, "timer %d has the interval %ld, had %ld", number,
	       (long)to_ns(spec.it_interval), (long)t->interval);
	EXPECT(left <= t->last_left + TOLERANCE, "timer %d has %ld ns left, had %ld before", number,
	       (long)left, (long)t->last_left);
	/* The processor time of a process that was brought back starts at zero: its clock tells nothing here. */
	EXPECT(stood_still >= -TOLERANCE || t->clock == CLOCK_PROCESS_CPUTIME_ID, "timer %d has lost %ld ns",
	       number, (long)-stood_still);
	t->last_left = left;
	if (stood_still > drift_ns && t->clock != CLOCK_PROCESS_CPUTIME_ID)
		drift_ns = stood_still;
}

static void await_rings(int which, int more)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 20 * NS_PER_S;
	int start = rings[which];

	while (rings[which] - start < more && !atomic_load(&verdict.state)) {
		if (now_ns(CLOCK_MONOTONIC) > give_up)
			return fail("timer %d does not ring", which);
		sched_yield();
	}
}

/* Its signal is blocked: it waits, counts what it missed, and once taken comes again. */
static void check_overrun(void)
{
	struct timer *t = &timers[OVERRUN];
	uint64_t set = 1ull << (t->signal - 1);
	struct timespec limit = {20, 0};
	siginfo_t info;

	for (int i = 0; i < 2; i++) {
		long got;

		do	/* the other timers ring meanwhile, and their handlers interrupt it */
			got = syscall(SYS_rt_sigtimedwait, &set, &info, &limit, sizeof set);
		while (got < 0 && errno == EINTR);
		if (got != t->signal)
			return fail("the blocked timer does not ring");
		EXPECT(info.si_code == SI_TIMER && info.si_timerid == t->id && info.si_overrun >= 0 &&
		       info.si_value.sival_int == 1000 + OVERRUN,
		       "the blocked timer rang with code %d, id %d, overrun %d, value %d", info.si_code,
		       info.si_timerid, info.si_overrun, info.si_value.sival_int);
	}
	EXPECT(to_ns(left_of(t).it_interval) == t->interval, "the blocked timer has another interval");
}

static void check(void)
{
	char now[4096];

	drift_ns = 0;
	read_listing(now, sizeof now);
	EXPECT(!strcmp(now, listing), "/proc/self/timers has changed");
	for (int i = 0; i < OFTEN; i++) {
		struct itimerspec spec;

		if (timers[i].exists && timers[i].first > NS_PER_S)
			check_long(&timers[i]);
		else if (timers[i].exists)
			EXPECT(to_ns((spec = left_of(&timers[i])).it_value) == 0, "timer %d runs", i);
	}
	for (size_t i = 0; i < LEN(itimers); i++) {
		struct itimerval value;
		int64_t left, interval;

		getitimer((__itimer_which_t)itimers[i].which, &value);
		left = value.it_value.tv_sec * NS_PER_S + value.it_value.tv_usec * 1000;
		interval = value.it_interval.tv_sec * NS_PER_S + value.it_interval.tv_usec * 1000;
		EXPECT(interval == itimers[i].interval, "itimer %zu has the interval %ld", i, (long)interval);
		EXPECT(left && left <= itimers[i].last_left + TOLERANCE, "itimer %zu has %ld ns left, had %ld",
		       i, (long)left, (long)itimers[i].last_left);
		itimers[i].last_left = left;
	}
	for (int i = OFTEN; i <= TO_THREAD; i++) {
		EXPECT(to_ns(left_of(&timers[i]).it_interval) == timers[i].interval, "timer %d has another interval",
		       i);
		await_rings(i, 1);
	}
	check_overrun();
	EXPECT(!wrong_place, "%d signals of timers came to the wrong thread or with wrong data", wrong_place);
}

static void tick(void)
{
	await_rings(OFTEN, 3);
	await_rings(TO_THREAD, 3);
}

static void drift(char *argument)
{
	(void)argument;
	say("drift %ld", (long)drift_ns);
}

/* ---- damages ---------------------------------------------------------------------------------- */

static void set_left(struct timer *t, int64_t ns)
{
	struct itimerspec spec = {to_timespec(t->interval), to_timespec(ns)};

	syscall(SYS_timer_settime, t->id, 0, &spec, NULL);
}

static void damage_gone(void) { syscall(SYS_timer_delete, timers[0].id); }
static void damage_later(void) { set_left(&timers[0], HOUR + NS_PER_S); }
static void damage_sooner(void) { set_left(&timers[1], HOUR); }
static void damage_interval(void) { timers[3].interval++; set_left(&timers[3], HOUR); timers[3].interval--; }
static void damage_stopped(void) { set_left(&timers[TO_THREAD], 0); }
static void damage_started(void) { set_left(&timers[7], HOUR); }

static void damage_id(void)
{
	syscall(SYS_timer_delete, timers[6].id);
	create(&timers[6], 1006);
	arm(&timers[6]);
}


static void damage_itimer(void)
{
	struct itimerval value = {{11, 0}, {3601, 0}};

	setitimer(ITIMER_REAL, &value, NULL);
}

int main(void)
{
	static const struct named steps[] = {{"tick", tick}, {NULL, NULL}};
	static const struct named damages[] = {
		{"gone", damage_gone}, {"later", damage_later}, {"sooner", damage_sooner},
		{"interval", damage_interval}, {"stopped", damage_stopped}, {"started", damage_started},
		{"id", damage_id}, {"itimer", damage_itimer}, {NULL, NULL}};
	static const struct command others[] = {{"drift", drift}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, others};
	struct sigaction action = {.sa_sigaction = ring, .sa_flags = SA_SIGINFO | SA_RESTART};
	pthread_t thread;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, timers[OVERRUN].signal);
	sigprocmask(SIG_BLOCK, &set, NULL);
	for (int signal = 40; signal <= 47; signal++)
		sigaction(signal, &action, NULL);
	start_thread(&thread, park, NULL);
	while (!atomic_load(&parked))
		futex_wait(&parked, 0, -1);
	prepare();
	return serve(&program);
}
