/*
 * s_seccomp [strict|shared|listener]: what a thread may ask the kernel.
 *
 * All threads share two filters: calls with a magic argument fail with an error of the filter. Some
 * have more: one has two of its own, one another, all of which it tells by the error that it gets. One
 * has given up its privileges, without no_new_privs; no thread may do what a dump needs inside the
 * process: mapping and unmapping memory kills at once. With `strict` another thread is in strict mode,
 * and says with write() alone that it lives, and nobody shares anything. With `shared` no thread has a
 * filter of its own, so that a further one can be given to all at once. With `listener` a filter of the main thread
 * hands calls to whoever listens, which is nobody.
 */
#include "workload.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>

#define N_THREADS 4
#define MAGIC 0x5ecc0ull
#define UNUSUAL 0x7eull			/* prctl has no such option */
#define NR_AT ((uint32_t)offsetof(struct seccomp_data, nr))
#define ARG_AT(n) ((uint32_t)offsetof(struct seccomp_data, args) + 8 * (n))

static struct servant servants[N_THREADS + 1];	/* the last one stands for the main thread */
static int strict_pipe[2], strict_ask[2];
static bool with_strict, all_shared;

/* Which errors a thread gets for the magic arguments 0, 1, ...: 0 if the kernel's own. */
#define N_MAGIC 8
static int expected[N_THREADS + 1][N_MAGIC];

static int number_of(const struct servant *s) { return (int)(s - servants); }

static void must(long result, const char *what)
{
	if (result)
		die("%s", what);
}

/* prctl(UNUSUAL, MAGIC + index) fails with `error`; calls that map and unmap memory, and those that a
 * look from inside makes, are fatal. */
static long install_or_tell(uint32_t index, uint32_t error, unsigned flags)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, NR_AT),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_munmap, 6, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_get_robust_list, 5, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 4, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_prctl, 0, 2),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, ARG_AT(1)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)MAGIC + index, 2, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
	};
	struct sock_fprog program = {LEN(code), code};

	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static void install(uint32_t index, uint32_t error, unsigned flags)
{
	must(install_or_tell(index, error, flags), "seccomp");
}

static int answer_to(uint32_t index)
{
	long result = raw_syscall(SYS_prctl, UNUSUAL, (long)(MAGIC + index), 0, 0, 0, 0);

	return result == -EINVAL ? 0 : (int)-result;
}

static void compare(struct servant *s)
{
	for (uint32_t i = 0; i < N_MAGIC; i++) {
		int got = answer_to(i), wanted = expected[number_of(s)][i];

		EXPECT(got == wanted, "thread %d: magic %u gives error %d, not %d", number_of(s), i, got, wanted);
	}
}

static void expect_all(uint32_t index, int error)
{
	for (int i = 0; i <= N_THREADS; i++)
		expected[i][index] = error;
}

static void confine_twice(struct servant *s)
{
	install(3, 103, 0);
	install(4, 104, SECCOMP_FILTER_FLAG_LOG);
	expected[number_of(s)][3] = 103;
	expected[number_of(s)][4] = 104;
}

/* The same filter as another thread has, but not shared with that. */
static void confine_once(struct servant *s)
{
	install(3, 103, 0);
	expected[number_of(s)][3] = 103;
}

/* What nobody listens to does not exist. */
static void hand_over(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, ARG_AT(1)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)MAGIC, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
	};
	struct sock_fprog program = {LEN(code), code};

	must(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program), "seccomp");
	expected[N_THREADS][0] = ENOSYS;
}

static void give_up(struct servant *s)
{
	(void)s;
	must(syscall(SYS_setresuid, 65534, 65534, 65534), "setresuid");
}

static void *live_strictly(void *argument)
{
	static char letter;

	must(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT), "strict mode");
	while (raw_syscall(SYS_read, strict_ask[0], (long)&letter, 1, 0, 0, 0) == 1)
		raw_syscall(SYS_write, strict_pipe[1], (long)&letter, 1, 0, 0, 0);
	raw_syscall(SYS_exit, 0, 0, 0, 0, 0, 0);
	return argument;
}

static void check(void)
{
	char letter = 'x';

	for (int i = 0; i < N_THREADS; i++)
		servant_ask(&servants[i], compare);
	compare(&servants[N_THREADS]);
	if (with_strict) {
		write_all(strict_ask[1], "s", 1);
		EXPECT(read(strict_pipe[0], &letter, 1) == 1 && letter == 's', "the strict thread says %c", letter);
	}
}

/* One more for one thread. */
static void step_confine(void)
{
	static int done;

	if (!all_shared && !done++)
		servant_ask(&servants[0], confine_once);
}

/* The kernel takes a filter for all threads only if it is on top of what each of them has. */
static void step_sync(void)
{
	if (install_or_tell(7, 107, SECCOMP_FILTER_FLAG_TSYNC) == 0) {
		EXPECT(all_shared, "threads with filters of their own were synchronized");
		expect_all(7, 107);
	} else {
		EXPECT(!all_shared, "threads that share their filters cannot be synchronized");
	}
}

static void be_there(struct servant *s) { (void)s; }
static void spoil_own(struct servant *s) { (void)s; install(5, 105, 0); }
static void damage_own(void) { servant_ask(&servants[2], spoil_own); }
static void damage_main(void) { install(6, 106, 0); }

int main(int argc, char **argv)
{
	static const struct named steps[] = {{"confine", step_confine}, {"sync", step_sync}, {NULL, NULL}};
	static const struct named damages[] = {{"own", damage_own}, {"main", damage_main}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};
	pthread_t strict;

	with_strict = argc > 1 && !strcmp(argv[1], "strict");
	all_shared = argc > 1 && !strcmp(argv[1], "shared");
	for (int i = 0; i < N_THREADS; i++)
		start_thread(&servants[i].thread, servant_run, &servants[i]);
	/* A thread that has not begun yet has every signal blocked. */
	for (int i = 0; i < N_THREADS; i++)
		servant_ask(&servants[i], be_there);
	if (with_strict) {
		must(pipe(strict_pipe) || pipe(strict_ask), "pipe");
		start_thread(&strict, live_strictly, NULL);
	} else {
		install(1, 101, SECCOMP_FILTER_FLAG_TSYNC);
		install(2, 102, SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_LOG);
		expect_all(1, 101);
		expect_all(2, 102);
	}
	if (argc > 1 && !strcmp(argv[1], "listener"))
		hand_over();
	if (!all_shared) {
		servant_ask(&servants[1], confine_twice);
		servant_ask(&servants[2], confine_once);
	}
	servant_ask(&servants[3], give_up);
	return serve(&program);
}
