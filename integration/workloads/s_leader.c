/*
 * s_leader: a process whose first thread has ended while others go on.
 *
 * One of the others obeys, one counts when it is asked to; a child of the process waits to be asked, too. With `kid`, the
 * process that has lost its first thread is a child of the one that speaks; that waits for it in the end. Its exit status is 5 then.
 */
#include "workload.h"

#include <sys/prctl.h>

static struct servant worker;
static pthread_t speaker;
static pid_t process, child, speaker_tid;
static int to_child[2], from_child[2], count, kept;
static bool is_kid;
static unsigned char *memory;

static void exit_thread(int code)
{
	syscall(SYS_exit, code);
}

static void count_on(struct servant *s)
{
	(void)s;
	count++;
	memory[(size_t)count % 16 * PAGE] = (unsigned char)count;
}

static void be_child(void)
{
	char order;

	while (read(to_child[0], &order, 1) == 1)
		write_all(from_child[1], &order, 1);
	_exit(3);
}

/* ---- what must be so -------------------------------------------------------------------------------- */

static char state_of_first(void)
{
	char path[64], text[256] = "", *at;
	int fd;

	snprintf(path, sizeof path, "/proc/self/task/%d/stat", process);
	fd = open(path, O_RDONLY);
	if (fd < 0 || read(fd, text, sizeof text - 1) <= 0)
		return '?';
	close(fd);
	at = strrchr(text, ')');
	if (strncmp(strchr(text, '('), "(gone)", 6))
		return 'n';
	return at ? at[2] : '?';
}

static void check(void)
{
	char order = 'c', answer = 0;

	EXPECT(getpid() == process, "the process is %d, not %d", getpid(), process);
	EXPECT((pid_t)syscall(SYS_gettid) == speaker_tid, "the thread is %d, not %d", (int)syscall(SYS_gettid), speaker_tid);
	EXPECT(state_of_first() == 'Z', "the first thread is %c", state_of_first());
	EXPECT(memory[(size_t)count % 16 * PAGE] == (unsigned char)count, "after %d there is %d", count,
	       memory[(size_t)count % 16 * PAGE]);
	servant_ask(&worker, count_on);
	EXPECT(memory[(size_t)count % 16 * PAGE] == (unsigned char)count, "%d was not counted", count);
	EXPECT(lseek(kept, 0, SEEK_CUR) == 5, "the offset is %ld", (long)lseek(kept, 0, SEEK_CUR));
	write_all(to_child[1], &order, 1);
	EXPECT(read(from_child[0], &answer, 1) == 1 && answer == order, "the child does not answer");
	EXPECT(getppid() != child && child > 0, "the child is its parent");
}

static void step_bear(void)
{
	int status = 0;
	pid_t pid = fork();

	if (pid == 0)
		_exit(9);
	EXPECT(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 9, "a new child ended with %d", status);
}

static void step_count(void)
{
	for (int i = 0; i < 40; i++)
		servant_ask(&worker, count_on);
}

static void damage_count(void) { memory[(size_t)count % 16 * PAGE]++; }
static void damage_offset(void) { lseek(kept, 0, SEEK_SET); }

static const struct named steps[] = {{"count", step_count}, {"bear", step_bear}, {NULL, NULL}};
static const struct named damages[] = {{"count", damage_count}, {"offset", damage_offset}, {NULL, NULL}};
static const struct program program = {check, steps, damages, NULL};

/* ---- threads ---------------------------------------------------------------------------------------- */

static void finish(struct servant *s)
{
	(void)s;
	exit_thread(5);
}

static void *speak(void *argument)
{
	int status = 0;

	(void)argument;
	speaker_tid = (pid_t)syscall(SYS_gettid);
	while (state_of_first() != 'Z')
		sched_yield();
	if (serve(&program))
		_exit(1);
	close(to_child[1]);
	if (waitpid(child, &status, 0) != child || WEXITSTATUS(status) != 3)
		_exit(2);
	/* Which of the two is the last one nobody knows; that one tells how the process ends (before 5.17, the first did). */
	worker.task = finish;
	atomic_store(&worker.asked, 1);
	futex_wake_all(&worker.asked);
	exit_thread(5);
	return NULL;
}

int main(int argc, char **argv)
{
	int status = 0;

	is_kid = argc > 1 && !strcmp(argv[1], "kid");
	if (is_kid) {
		pid_t pid = fork();

		if (pid) {
			close(0);
			close(1);
			return waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : 4;
		}
	}
	process = getpid();
	kept = open("/proc/self/limits", O_RDONLY);
	if (kept < 0 || lseek(kept, 5, SEEK_SET) != 5 || pipe(to_child) || pipe(from_child))
		die("prepare");
	memory = map_anonymous(16);
	child = fork();
	if (child == 0) {
		close(to_child[1]);
		be_child();
	}
	prctl(PR_SET_NAME, "gone");
	start_thread(&worker.thread, servant_run, &worker);
	start_thread(&speaker, speak, NULL);
	exit_thread(5);
	return 0;
}
