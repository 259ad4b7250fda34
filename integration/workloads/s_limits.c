/*
 * s_limits: numbers that the kernel keeps about a process or a thread. Needs root at its start.
 *
 * Process: resource limits, umask, working directory, oom_score_adj, personality, dumpable, parent-death signal,
 * child subreaper, huge pages disabled, memory-failure policy, session and process group. Three threads:
 * nice value, policy and priority, reset-on-fork, affinity, I/O priority, timer slack, name, coredump filter.
 * What a kernel or its rights do not allow is left as it is, and must then stay as it is.
 */
#include "workload.h"

#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#define N_THREADS 3
#define N_LIMITS 16
#define N_NUMBERS 12

struct of_process {
	struct rlimit64 limits[N_LIMITS];
	long numbers[N_NUMBERS];
	char cwd[256];
};
static const char *const NUMBERS[N_NUMBERS] = {
	"umask", "oom_score_adj", "personality", "dumpable", "parent-death signal", "child subreaper",
	"huge pages disabled", "memory-failure policy", "session", "process group", "coredump_filter", "KSM"};

struct sched_attributes {		/* struct sched_attr */
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};

struct of_thread {
	struct sched_attributes scheduling;
	cpu_set_t affinity;
	long io_priority, slack;
	char name[16];
};

static struct of_process process_was, process_is;
static struct of_thread threads_were[N_THREADS + 1], threads_are[N_THREADS + 1];
static struct servant servants[N_THREADS + 1];		/* the last one stands for the main thread */

/* ---- what the kernel says --------------------------------------------------------------------- */

static long read_number(const char *path, int base)
{
	char text[64] = "";
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = read(fd, text, sizeof text - 1);

	close(fd);
	return n > 0 ? strtol(text, NULL, base) : -1;
}

static void write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (write(fd, text, strlen(text)) < 0)
		dprintf(2, "%s stays as it is: %s\n", path, strerror(errno));
	close(fd);
}

static int asked_of_prctl(int option)
{
	int value = -1;

	prctl(option, &value, 0, 0, 0);
	return value;
}

static void look_at_process(struct of_process *p)
{
	long *n = p->numbers;

	for (int i = 0; i < N_LIMITS; i++)
		syscall(SYS_prlimit64, 0, i, NULL, &p->limits[i]);
	*n++ = umask(0);
	umask((mode_t)n[-1]);
	*n++ = read_number("/proc/self/oom_score_adj", 10);
	*n++ = personality(0xffffffff);
	*n++ = prctl(PR_GET_DUMPABLE);
	*n++ = asked_of_prctl(PR_GET_PDEATHSIG);
	*n++ = asked_of_prctl(PR_GET_CHILD_SUBREAPER);
	*n++ = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
	*n++ = prctl(PR_MCE_KILL_GET, 0, 0, 0, 0);
	*n++ = getsid(0);
	*n++ = getpgid(0);
	*n++ = read_number("/proc/self/coredump_filter", 16);
	*n++ = prctl(68 /* PR_GET_MEMORY_MERGE */, 0, 0, 0, 0);
	if (!getcwd(p->cwd, sizeof p->cwd))
		strcpy(p->cwd, "nowhere");
}

static void look_at_thread(struct servant *s)
{
	struct of_thread *t = &threads_are[s - servants];

	memset(t, 0, sizeof *t);
	syscall(SYS_sched_getattr, 0, &t->scheduling, sizeof t->scheduling, 0);
	sched_getaffinity(0, sizeof t->affinity, &t->affinity);
	t->io_priority = syscall(SYS_ioprio_get, 1 /* a thread */, 0);
	t->slack = prctl(PR_GET_TIMERSLACK);
	prctl(PR_GET_NAME, t->name);
}

/* ---- making them unlike ------------------------------------------------------------------------- */

static void lower_limits(void)
{
	for (int i = 0; i < N_LIMITS; i++) {
		struct rlimit64 limit;
		uint64_t ample = i == RLIMIT_NOFILE ? 900 : i == RLIMIT_NICE || i == RLIMIT_RTPRIO ? 10 : 1ull << 40;

		syscall(SYS_prlimit64, 0, i, NULL, &limit);
		/* Lowering needs no right; still far above what is used. Some stay as they are: */
		if (i == RLIMIT_STACK || i == RLIMIT_SIGPENDING || i == RLIMIT_CORE)
			continue;
		if (limit.rlim_max > ample + (uint64_t)i)
			limit.rlim_max = ample + (uint64_t)i;
		limit.rlim_cur = limit.rlim_max - limit.rlim_max / 8;
		syscall(SYS_prlimit64, 0, i, &limit, NULL);
	}
}

static void prepare_process(void)
{
	char path[64];

	lower_limits();
	umask(037);
	write_text("/proc/self/oom_score_adj", "321");
	write_text("/proc/self/coredump_filter", "0x5");
	personality(ADDR_NO_RANDOMIZE | STICKY_TIMEOUTS);
	prctl(PR_SET_DUMPABLE, 0);
	/* A signal that does nothing: the parent of a restored process may well end. */
	prctl(PR_SET_PDEATHSIG, SIGWINCH);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
	snprintf(path, sizeof path, "s_limits-%d.d", (int)getpid());
	if (mkdir(path, 0700) || chdir(path))
		die("%s", path);
}

static void set_scheduling(uint32_t policy, int nice, uint32_t priority, uint64_t flags)
{
	struct sched_attributes a = {.size = sizeof a, .policy = policy, .flags = flags, .nice = nice,
				     .priority = priority};

	syscall(SYS_sched_setattr, 0, &a, 0);
}

static void set_affinity(int cpu)
{
	cpu_set_t one;

	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	sched_setaffinity(0, sizeof one, &one);
}

static void be_batch(struct servant *s)
{
	set_scheduling(SCHED_BATCH, 7, 0, 0);
	set_affinity(0);
	syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6);		/* best effort, 6 */
	prctl(PR_SET_TIMERSLACK, 123456);
	prctl(PR_SET_NAME, "batch");
	(void)s;
}

static void be_realtime(struct servant *s)
{
	set_scheduling(SCHED_FIFO, 0, 3, 1 /* SCHED_FLAG_RESET_ON_FORK */);
	syscall(SYS_ioprio_set, 1, 0, 1 << 13 | 2);		/* real time, 2 */
	prctl(PR_SET_NAME, "real time");
	(void)s;
}

static void be_idle(struct servant *s)
{
	set_scheduling(SCHED_IDLE, 19, 0, 0);
	syscall(SYS_ioprio_set, 1, 0, 3 << 13);			/* idle */
	prctl(PR_SET_TIMERSLACK, 1);
	(void)s;
}

static void be_nice(struct servant *s)
{
	set_scheduling(SCHED_OTHER, 3, 0, 0);
	prctl(PR_SET_NAME, "main, nice");
	(void)s;
}

/* ---- protocol --------------------------------------------------------------------------------- */

static void look_at_threads(void)
{
	for (int i = 0; i < N_THREADS; i++)
		servant_ask(&servants[i], look_at_thread);
	look_at_thread(&servants[N_THREADS]);
}

static void compare_thread(int i)
{
	const struct of_thread *is = &threads_are[i], *was = &threads_were[i];

	EXPECT(is->scheduling.policy == was->scheduling.policy &&
	       is->scheduling.priority == was->scheduling.priority &&
	       is->scheduling.flags == was->scheduling.flags, "thread %d: policy %u priority %u flags %lx, not %u %u %lx",
	       i, is->scheduling.policy, is->scheduling.priority, is->scheduling.flags, was->scheduling.policy,
	       was->scheduling.priority, was->scheduling.flags);
	EXPECT(is->scheduling.nice == was->scheduling.nice, "thread %d is nice %d, was %d", i,
	       is->scheduling.nice, was->scheduling.nice);
	EXPECT(!memcmp(&is->affinity, &was->affinity, sizeof is->affinity), "thread %d may run on other cpus", i);
	EXPECT(is->io_priority == was->io_priority, "thread %d has I/O priority %lx, had %lx", i,
	       is->io_priority, was->io_priority);
	EXPECT(is->slack == was->slack, "thread %d has a timer slack of %ld, had %ld", i, is->slack, was->slack);
	EXPECT(!strcmp(is->name, was->name), "thread %d is named '%s'", i, is->name);
}

static void check(void)
{
	look_at_process(&process_is);
	for (int i = 0; i < N_LIMITS; i++)
		EXPECT(!memcmp(&process_is.limits[i], &process_was.limits[i], sizeof process_is.limits[i]),
		       "limit %d is %lu %lu, was %lu %lu", i, (unsigned long)process_is.limits[i].rlim_cur,
		       (unsigned long)process_is.limits[i].rlim_max, (unsigned long)process_was.limits[i].rlim_cur,
		       (unsigned long)process_was.limits[i].rlim_max);
	for (int i = 0; i < N_NUMBERS; i++)
		EXPECT(process_is.numbers[i] == process_was.numbers[i], "%s is %ld, was %ld", NUMBERS[i],
		       process_is.numbers[i], process_was.numbers[i]);
	EXPECT(!strcmp(process_is.cwd, process_was.cwd), "the working directory is %s", process_is.cwd);
	look_at_threads();
	for (int i = 0; i <= N_THREADS; i++)
		compare_thread(i);
}

static void remember(void)
{
	look_at_process(&process_was);
	look_at_threads();
	memcpy(threads_were, threads_are, sizeof threads_are);
}

/* Other values than before, from now on. */
static void step_change(void)
{
	umask((mode_t)(process_was.numbers[0] ^ 02));
	set_scheduling(SCHED_OTHER, threads_were[N_THREADS].scheduling.nice + 1, 0, 0);
	remember();
}

static void spoil_slack(struct servant *s) { (void)s; prctl(PR_SET_TIMERSLACK, 50000); }
static void spoil_policy(struct servant *s) { (void)s; set_scheduling(SCHED_OTHER, 7, 0, 0); }
static void spoil_io(struct servant *s) { (void)s; syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 1); }
static void spoil_reset(struct servant *s) { (void)s; set_scheduling(SCHED_OTHER, 0, 0, 0); }

static void spoil_affinity(struct servant *s)
{
	cpu_set_t all;

	memset(&all, 0xff, sizeof all);
	sched_setaffinity(0, sizeof all, &all);
	look_at_thread(s);
	if (CPU_COUNT(&threads_are[0].affinity) == 1)
		threads_were[0].affinity = (cpu_set_t){{0}};	/* one processor: nothing to widen to */
}

static void damage_slack(void) { servant_ask(&servants[0], spoil_slack); }
static void damage_policy(void) { servant_ask(&servants[0], spoil_policy); }
static void damage_io(void) { servant_ask(&servants[1], spoil_io); }
static void damage_reset(void) { servant_ask(&servants[1], spoil_reset); }
static void damage_affinity(void) { servant_ask(&servants[0], spoil_affinity); }
static void damage_nice(void) { set_scheduling(SCHED_OTHER, 11, 0, 0); }
static void damage_umask(void) { umask(0777); }
static void damage_cwd(void) { if (chdir("..")) die("chdir"); }
static void damage_oom(void) { write_text("/proc/self/oom_score_adj", "322"); }
static void damage_personality(void) { personality(0); }
static void damage_dumpable(void) { prctl(PR_SET_DUMPABLE, 1); }
static void damage_parent(void) { prctl(PR_SET_PDEATHSIG, 0); }
static void damage_subreaper(void) { prctl(PR_SET_CHILD_SUBREAPER, 0); }
static void damage_huge(void) { prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0); }

static void damage_limit(void)
{
	struct rlimit64 limit = process_was.limits[RLIMIT_NOFILE];

	limit.rlim_cur--;
	syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, &limit, NULL);
}

int main(void)
{
	static void (*const become[N_THREADS])(struct servant *) = {be_batch, be_realtime, be_idle};
	static const struct named steps[] = {{"change", step_change}, {NULL, NULL}};
	static const struct named damages[] = {
		{"slack", damage_slack}, {"policy", damage_policy}, {"io", damage_io}, {"reset", damage_reset},
		{"affinity", damage_affinity}, {"nice", damage_nice}, {"umask", damage_umask}, {"cwd", damage_cwd},
		{"oom", damage_oom}, {"personality", damage_personality}, {"dumpable", damage_dumpable},
		{"parent", damage_parent}, {"subreaper", damage_subreaper}, {"huge", damage_huge},
		{"limit", damage_limit}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	for (int i = 0; i < N_THREADS; i++) {
		start_thread(&servants[i].thread, servant_run, &servants[i]);
		servant_ask(&servants[i], become[i]);
	}
	be_nice(&servants[N_THREADS]);
	prepare_process();
	remember();
	return serve(&program);
}
