/*
 * s_clocks [SECONDS]: clocks that go on.
 *
 * A thread reads CLOCK_MONOTONIC and CLOCK_BOOTTIME without end, by the vdso and by the system call in turn, and
 * keeps the latest reading and the longest gap between two readings. No clock may ever go back, by whichever way it is
 * read, and none may jump by more than SECONDS (default: an hour; the time for which the process was not there counts
 * unless somebody hides it). `gaps` answers the longest gap of each clock since the last `gaps`:
 *     gaps MONOTONIC_NS BOOTTIME_NS REALTIME_NS
 * `now` answers what the clocks say, in the same order.
 */
#include "workload.h"

#define N_CLOCKS 3
#define N_CHECKED 2			/* CLOCK_REALTIME may be set by anybody: its gap is only reported */

static const clockid_t CLOCKS[N_CLOCKS] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME};
static const char *const NAMES[N_CLOCKS] = {"CLOCK_MONOTONIC", "CLOCK_BOOTTIME", "CLOCK_REALTIME"};
static struct gate gate = {.n_workers = 1};
static int64_t latest[N_CLOCKS], longest[N_CLOCKS], limit = 3600 * NS_PER_S;
static _Atomic int n_rounds;

static int64_t by_system_call(clockid_t clock)
{
	struct timespec ts;

	if (raw_syscall(SYS_clock_gettime, clock, (long)&ts, 0, 0, 0, 0))
		fail("clock_gettime failed");
	return ts.tv_sec * NS_PER_S + ts.tv_nsec;
}

static void take(int i, int64_t reading, const char *how)
{
	int64_t gap = reading - latest[i];

	if (i < N_CHECKED) {
		EXPECT(gap >= 0, "%s went back by %ld ns (%s)", NAMES[i], (long)-gap, how);
		EXPECT(gap <= limit, "%s jumped by %ld ns (%s)", NAMES[i], (long)gap, how);
	}
	if (gap > longest[i])
		longest[i] = gap;
	latest[i] = reading;
}

static void *read_clocks(void *argument)
{
	for (;;) {
		gate_pass(&gate);
		for (int i = 0; i < N_CLOCKS; i++) {
			take(i, now_ns(CLOCKS[i]), "vdso");
			take(i, by_system_call(CLOCKS[i]), "system call");
		}
		if (atomic_fetch_add(&n_rounds, 1) % 256 == 0)
			futex_wake_all(&n_rounds);
	}
	return argument;
}

static void run(void)
{
	int start = atomic_load(&n_rounds), now;

	while ((now = atomic_load(&n_rounds)) - start < 1000)
		futex_wait(&n_rounds, now, NS_PER_S);
}

/* The main thread is another one and may be on another processor: what it reads comes after, too. */
static void check(void)
{
	run();
	if (!gate_close(&gate))
		return;
	for (int i = 0; i < N_CHECKED; i++) {
		take(i, by_system_call(CLOCKS[i]), "system call");
		take(i, now_ns(CLOCKS[i]), "vdso");
	}
	EXPECT(latest[1] - latest[0] > -NS_PER_S, "CLOCK_BOOTTIME is %ld ns behind CLOCK_MONOTONIC",
	       (long)(latest[0] - latest[1]));
	gate_open(&gate);
}

static void shift(int64_t by)
{
	gate_close(&gate);
	latest[0] += by;
	gate_open(&gate);
	run();
}

static void damage_back(void) { shift(NS_PER_S); }
static void damage_jump(void) { shift(-limit - NS_PER_S); }

static void gaps(char *argument)
{
	(void)argument;
	gate_close(&gate);
	say("gaps %ld %ld %ld", (long)longest[0], (long)longest[1], (long)longest[2]);
	memset(longest, 0, sizeof longest);
	gate_open(&gate);
}

static void tell_now(char *argument)
{
	(void)argument;
	say("now %ld %ld %ld", (long)now_ns(CLOCKS[0]), (long)now_ns(CLOCKS[1]), (long)now_ns(CLOCKS[2]));
}

int main(int argc, char **argv)
{
	static const struct named steps[] = {{"run", run}, {NULL, NULL}};
	static const struct named damages[] = {{"back", damage_back}, {"jump", damage_jump}, {NULL, NULL}};
	static const struct command others[] = {{"gaps", gaps}, {"now", tell_now}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, others};
	pthread_t thread;

	if (argc > 1)
		limit = (int64_t)(atof(argv[1]) * 1e9);
	for (int i = 0; i < N_CLOCKS; i++)
		latest[i] = now_ns(CLOCKS[i]);
	start_thread(&thread, read_clocks, NULL);
	return serve(&program);
}
