/*
 * blocking CASE [SECONDS]: a thread sits in a system call while the main thread serves commands.
 *
 * `ready` and every answer come when the thread is really asleep in the kernel (or, for a case with a
 * timeout, has returned). `peek` answers "blocked" or "returned RESULT ERRNO" and disturbs nothing.
 * `check` and `step` end the call the way it is meant to end (or wait for its timeout of SECONDS, default
 * 1), compare result, data and time, and let the thread block again. nanosleep_long and nobody else
 * cannot be ended: there, check wants it asleep. `late` answers by how many nanoseconds the latest timed
 * call came back after its deadline. `corrupt` interrupts the call with a signal: EINTR must be noticed.
 */
#include "workload.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/time.h>

enum { IDLE, CALLING, RETURNED };

static struct {
	_Atomic int phase;
	pid_t tid;
	pthread_t thread;
	long result;			/* as the kernel gave it: -errno for an error */
	int64_t called_at, returned_at;	/* CLOCK_MONOTONIC, ns */
} blocker;

static int64_t duration_ns = NS_PER_S, late_ns;
static int fds[2], listener, caller, epoll;
static struct sockaddr_in address;
static char received[64];
static struct pollfd polled;
static struct epoll_event event;
static siginfo_t info;
static pid_t child;
static int status;
static _Atomic int word;
static uint64_t n_rounds;		/* goes into data, so that no round's data is another's */

/* ---- one group per system call: prepare, block, release, verify ------------------------------------ */

static void open_pipe(void)
{
	if (pipe2(fds, O_CLOEXEC))
		die("pipe2");
}

static void feed_pipe(void)
{
	char text[32];

	write_all(fds[1], text, (size_t)sprintf(text, "round %lu", n_rounds));
}

static void drain_pipe(void)
{
	char text[32], expected[32];
	ssize_t n = read(fds[0], text, sizeof text);
	int len = sprintf(expected, "round %lu", n_rounds);

	EXPECT(n == len && !memcmp(text, expected, (size_t)len), "the pipe holds %zd other bytes", n);
}

static long sleep_for(int64_t ns)
{
	struct timespec wanted = to_timespec(ns), left;

	return raw_syscall(SYS_nanosleep, (long)&wanted, (long)&left, 0, 0, 0, 0);
}

static long block_nanosleep(void)
{
	return sleep_for(duration_ns);
}

static long block_for_an_hour(void)
{
	return sleep_for(3600 * NS_PER_S);
}

static long block_clock_nanosleep(void)
{
	struct timespec wanted = to_timespec(duration_ns), left;

	return raw_syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, (long)&wanted, (long)&left, 0, 0);
}

static long block_clock_nanosleep_abs(void)
{
	struct timespec until = to_timespec(blocker.called_at + duration_ns);

	return raw_syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, (long)&until, 0, 0, 0);
}

static void verify_zero(void)
{
	EXPECT(blocker.result == 0, "returned %ld, not 0", blocker.result);
}

static long poll_for(long timeout_ms)
{
	polled = (struct pollfd){.fd = fds[0], .events = POLLIN};
	return raw_syscall(SYS_poll, (long)&polled, 1, timeout_ms, 0, 0, 0);
}

static long block_poll(void)
{
	return poll_for(-1);
}

static long block_poll_timed(void)
{
	return poll_for(duration_ns / 1000000);
}

static void verify_poll(void)
{
	EXPECT(blocker.result == 1 && polled.revents == POLLIN, "poll returned %ld, events %x",
	       blocker.result, (unsigned)polled.revents);
	if (blocker.result == 1)
		drain_pipe();
}

static long block_select_timed(void)
{
	struct timeval left = {duration_ns / NS_PER_S, duration_ns % NS_PER_S / 1000};
	fd_set set;

	FD_ZERO(&set);
	FD_SET(fds[0], &set);
	return raw_syscall(SYS_select, fds[0] + 1, (long)&set, 0, 0, (long)&left, 0);
}

static long block_futex(void)
{
	return raw_syscall(SYS_futex, (long)&word, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0);
}

static void release_futex(void)
{
	EXPECT(syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0) == 1,
	       "nobody waits at the futex");
}

static long block_futex_timed(void)
{
	struct timespec wanted = to_timespec(duration_ns);

	return raw_syscall(SYS_futex, (long)&word, FUTEX_WAIT_PRIVATE, 0, (long)&wanted, 0, 0);
}

static long block_futex_abs(void)
{
	struct timespec until = to_timespec(blocker.called_at + duration_ns);

	return raw_syscall(SYS_futex, (long)&word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, 0, (long)&until,
			   0, FUTEX_BITSET_MATCH_ANY);
}

static void verify_timeout(void)
{
	EXPECT(blocker.result == -ETIMEDOUT, "returned %ld, not ETIMEDOUT", blocker.result);
}

static long block_read(void)
{
	return raw_syscall(SYS_read, fds[0], (long)received, sizeof received, 0, 0, 0);
}

static void verify_read(void)
{
	char expected[32];
	int len = sprintf(expected, "round %lu", n_rounds);

	EXPECT(blocker.result == len && !memcmp(received, expected, (size_t)len), "read %ld bytes, not %s",
	       blocker.result, expected);
}

static void open_epoll(void)
{
	struct epoll_event wanted = {.events = EPOLLIN, .data.u64 = 0x1122334455667788};

	open_pipe();
	epoll = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fds[0], &wanted))
		die("epoll_ctl");
}

static long epoll_for(long timeout_ms)
{
	return raw_syscall(SYS_epoll_wait, epoll, (long)&event, 1, timeout_ms, 0, 0);
}

static long block_epoll(void)
{
	return epoll_for(-1);
}

static long block_epoll_timed(void)
{
	return epoll_for(duration_ns / 1000000);
}

static void verify_epoll(void)
{
	EXPECT(blocker.result == 1 && event.events == EPOLLIN && event.data.u64 == 0x1122334455667788,
	       "epoll_wait returned %ld, events %x, data %lx", blocker.result, event.events,
	       event.data.u64);
	if (blocker.result == 1)
		drain_pipe();
}

static void block_signal(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
}

static long wait_signal(int64_t timeout_ns)
{
	struct timespec wanted = to_timespec(timeout_ns < 0 ? 0 : timeout_ns);
	unsigned long set = 1ul << (SIGUSR2 - 1);

	memset(&info, 0, sizeof info);
	return raw_syscall(SYS_rt_sigtimedwait, (long)&set, (long)&info, timeout_ns < 0 ? 0 : (long)&wanted,
			   sizeof set, 0, 0);
}

static long block_sigwait(void)
{
	return wait_signal(-1);
}

static long block_sigtimedwait(void)
{
	return wait_signal(duration_ns);
}

static void release_sigwait(void)
{
	union sigval value = {.sival_int = (int)n_rounds + 77};

	pthread_sigqueue(blocker.thread, SIGUSR2, value);
}

static void verify_sigwait(void)
{
	EXPECT(blocker.result == SIGUSR2 && info.si_code == SI_QUEUE && info.si_pid == getpid() &&
	       info.si_value.sival_int == (int)n_rounds + 77, "returned %ld, code %d, pid %d, value %d",
	       blocker.result, info.si_code, info.si_pid, info.si_value.sival_int);
}

static void verify_again(void)
{
	EXPECT(blocker.result == -EAGAIN, "returned %ld, not EAGAIN", blocker.result);
}

static long block_wait4(void)
{
	pid_t parent = getpid();

	child = fork();
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		while (getppid() == parent)	/* it may have ended before the line above */
			pause();
		_exit(0);
	}
	return raw_syscall(SYS_wait4, child, (long)&status, 0, 0, 0, 0);
}

static void release_wait4(void)
{
	kill(child, SIGKILL);
}

static void verify_wait4(void)
{
	EXPECT(blocker.result == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL,
	       "wait4 returned %ld, status %x", blocker.result, (unsigned)status);
	if (blocker.result != child) {		/* leave no child behind */
		kill(child, SIGKILL);
		waitpid(child, NULL, 0);
	}
}

static void open_listener(void)
{
	socklen_t len = sizeof address;

	address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(listener, (struct sockaddr *)&address, len) || listen(listener, 5) ||
	    getsockname(listener, (struct sockaddr *)&address, &len))
		die("listen");
}

static long block_accept(void)
{
	return raw_syscall(SYS_accept4, listener, 0, 0, SOCK_CLOEXEC, 0, 0);
}

static void release_accept(void)
{
	caller = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	EXPECT(!connect(caller, (struct sockaddr *)&address, sizeof address), "cannot connect: %s",
	       strerror(errno));
}

static void verify_accept(void)
{
	char text[8];

	EXPECT(blocker.result > 2, "accept returned %ld", blocker.result);
	if (blocker.result > 2) {
		write_all((int)blocker.result, "hello", 5);
		EXPECT(read(caller, text, sizeof text) == 5, "the connection does not carry data");
		close((int)blocker.result);
	}
	if (caller > 2)
		close(caller);
	caller = 0;
}

/* ---- the cases -------------------------------------------------------------------------------- */

static const struct blocking_case {
	const char *name;
	long number;
	void (*prepare)(void);		/* may be null */
	long (*block)(void);
	void (*release)(void);		/* null: it ends by its timeout, or not at all */
	void (*verify)(void);		/* null: it must never end */
} CASES[] = {
	{"nanosleep_long", SYS_nanosleep, NULL, block_for_an_hour, NULL, NULL},
	{"nanosleep", SYS_nanosleep, NULL, block_nanosleep, NULL, verify_zero},
	{"clock_nanosleep", SYS_clock_nanosleep, NULL, block_clock_nanosleep, NULL, verify_zero},
	{"clock_nanosleep_abs", SYS_clock_nanosleep, NULL, block_clock_nanosleep_abs, NULL,
	 verify_zero},
	{"poll", SYS_poll, open_pipe, block_poll, feed_pipe, verify_poll},
	{"poll_timed", SYS_poll, open_pipe, block_poll_timed, NULL, verify_zero},
	{"select_timed", SYS_select, open_pipe, block_select_timed, NULL, verify_zero},
	{"futex", SYS_futex, NULL, block_futex, release_futex, verify_zero},
	{"futex_timed", SYS_futex, NULL, block_futex_timed, NULL, verify_timeout},
	{"futex_abs", SYS_futex, NULL, block_futex_abs, NULL, verify_timeout},
	{"read", SYS_read, open_pipe, block_read, feed_pipe, verify_read},
	{"epoll", SYS_epoll_wait, open_epoll, block_epoll, feed_pipe, verify_epoll},
	{"epoll_timed", SYS_epoll_wait, open_epoll, block_epoll_timed, NULL, verify_zero},
	{"sigwait", SYS_rt_sigtimedwait, block_signal, block_sigwait, release_sigwait, verify_sigwait},
	{"sigtimedwait", SYS_rt_sigtimedwait, block_signal, block_sigtimedwait, NULL, verify_again},
	{"wait4", SYS_wait4, NULL, block_wait4, release_wait4, verify_wait4},
	{"accept", SYS_accept4, open_listener, block_accept, release_accept, verify_accept},
};
static const struct blocking_case *this_case;

static void *block_forever(void *argument)
{
	blocker.tid = (pid_t)syscall(SYS_gettid);
	for (;;) {
		blocker.called_at = now_ns(CLOCK_MONOTONIC);
		atomic_store(&blocker.phase, CALLING);
		blocker.result = this_case->block();
		blocker.returned_at = now_ns(CLOCK_MONOTONIC);
		atomic_store(&blocker.phase, RETURNED);
		futex_wake_all(&blocker.phase);
		while (atomic_load(&blocker.phase) == RETURNED)
			futex_wait(&blocker.phase, RETURNED, -1);
	}
	return argument;
}

/* The number of the call that the thread sleeps in, as the kernel sees it; -1 while it runs. */
static long sleeps_in(void)
{
	char path[64], text[128] = "";
	int fd;
	ssize_t n;

	snprintf(path, sizeof path, "/proc/self/task/%d/syscall", (int)blocker.tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	n = read(fd, text, sizeof text - 1);
	close(fd);
	return n > 0 && text[0] >= '0' && text[0] <= '9' ? atol(text) : -1;
}

/* Return once the thread sleeps in its call (which may be continuing by restart_syscall) or is back. */
static void settle(void)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 20 * NS_PER_S;

	while (atomic_load(&blocker.phase) != RETURNED) {
		long number = sleeps_in();

		if (atomic_load(&blocker.phase) == CALLING &&
		    (number == this_case->number || number == SYS_restart_syscall))
			return;
		if (now_ns(CLOCK_MONOTONIC) > give_up) {
			fail("the thread is in system call %ld, not in %ld", number, this_case->number);
			return;
		}
		sched_yield();
	}
}

static void await_return(int64_t timeout_ns)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + timeout_ns;
	int phase;

	while ((phase = atomic_load(&blocker.phase)) != RETURNED) {
		if (now_ns(CLOCK_MONOTONIC) > give_up) {
			fail("the call has not returned");
			return;
		}
		futex_wait(&blocker.phase, phase, NS_PER_S);
	}
}

static void round_trip(void)
{
	settle();
	if (!this_case->verify) {
		EXPECT(atomic_load(&blocker.phase) != RETURNED, "returned %ld", blocker.result);
		return;
	}
	n_rounds++;
	if (this_case->release && atomic_load(&blocker.phase) != RETURNED)
		this_case->release();
	await_return(this_case->release ? 20 * NS_PER_S : duration_ns + 60 * NS_PER_S);
	if (atomic_load(&blocker.phase) != RETURNED)
		return;
	this_case->verify();
	late_ns = blocker.returned_at - blocker.called_at - duration_ns;
	EXPECT(this_case->release || late_ns >= 0, "returned %ld ns before its deadline", (long)-late_ns);
	atomic_store(&blocker.phase, IDLE);
	futex_wake_all(&blocker.phase);
	settle();
}

static void do_nothing(int number)
{
	(void)number;
}

static void corrupt(void)
{
	struct sigaction action = {.sa_handler = do_nothing};	/* no SA_RESTART */

	settle();
	sigaction(SIGUSR1, &action, NULL);
	syscall(SYS_tgkill, getpid(), blocker.tid, SIGUSR1);
	await_return(20 * NS_PER_S);
}

static void peek(char *argument)
{
	(void)argument;
	settle();
	if (atomic_load(&blocker.phase) != RETURNED)
		say("blocked");
	else
		say("returned %ld %ld", blocker.result < 0 ? -1 : blocker.result,
		    blocker.result < 0 ? -blocker.result : 0);
}

static void late(char *argument)
{
	(void)argument;
	say("late %ld", (long)late_ns);
}

int main(int argc, char **argv)
{
	static const struct command others[] = {{"peek", peek}, {"late", late}, {NULL, NULL}};
	static const struct named steps[] = {{"round", round_trip}, {NULL, NULL}};
	static const struct named damages[] = {{"interrupt", corrupt}, {NULL, NULL}};
	static const struct program program = {round_trip, steps, damages, others};

	for (size_t i = 0; argc > 1 && i < LEN(CASES); i++)
		if (!strcmp(CASES[i].name, argv[1]))
			this_case = &CASES[i];
	if (!this_case)
		die("usage: blocking CASE [SECONDS]");
	if (argc > 2)
		duration_ns = (int64_t)(atof(argv[2]) * 1000) * 1000000;
	if (this_case->prepare)
		this_case->prepare();
	start_thread(&blocker.thread, block_forever, NULL);
	settle();
	return serve(&program);
}
