/*
 * s_signalfd: signals that are read, each descriptor by its own mask, and an epoll instance that watches them.
 *
 * Signals are pending while the state is captured: for the process with a value, a real-time signal twice, one for this
 * thread. `check` compares the masks in /proc/self/fdinfo, reads every signal that is due by the descriptor that must
 * tell of it, and sends them again.
 */
#include "workload.h"

#include <sys/epoll.h>
#include <sys/signalfd.h>

static int users, realtime, nothing, shared, epoll;
static int value;			/* what the next signals bring */

static uint64_t bit(int signo) { return 1ul << (signo - 1); }

static int make(uint64_t mask, int flags)
{
	sigset_t set;
	int fd;

	sigemptyset(&set);
	for (int signo = 1; signo <= 64; signo++)
		if (mask & bit(signo))
			sigaddset(&set, signo);
	fd = signalfd(-1, &set, flags);
	if (fd < 0)
		die("signalfd");
	return fd;
}

static void send(int signo, int word)
{
	union sigval sent = {.sival_int = word};

	if (sigqueue(getpid(), signo, sent))
		die("sigqueue");
}

static void send_all(void)
{
	value++;
	send(SIGUSR1, value);
	send(SIGRTMIN, value);
	send(SIGRTMIN, value + 1);
	errno = pthread_kill(pthread_self(), SIGUSR2);
	if (errno)
		die("pthread_kill");
}

static void watch(int fd, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.fd = fd};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

static void prepare(void)
{
	sigset_t blocked;

	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigaddset(&blocked, SIGUSR2);
	sigaddset(&blocked, SIGRTMIN);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	epoll = epoll_create1(EPOLL_CLOEXEC);
	users = make(bit(SIGUSR1) | bit(SIGUSR2), SFD_CLOEXEC | SFD_NONBLOCK);
	realtime = make(bit(SIGRTMIN), SFD_NONBLOCK);
	nothing = make(0, SFD_CLOEXEC | SFD_NONBLOCK);
	shared = fcntl(realtime, F_DUPFD_CLOEXEC, 40);
	watch(users, EPOLLIN);
	watch(realtime, EPOLLIN);
	watch(nothing, EPOLLIN);
	send_all();
}

static void check_mask(int fd, uint64_t mask)
{
	char path[64], line[256];
	unsigned long is = ~0ul;
	FILE *file;

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	file = fopen(path, "re");
	while (file && fgets(line, sizeof line, file))
		sscanf(line, "sigmask: %lx", &is);
	if (file)
		fclose(file);
	EXPECT(is == mask, "fd %d has mask %lx, not %lx", fd, is, (unsigned long)mask);
}

static void expect_signal(int fd, int signo, int code, int word)
{
	struct signalfd_siginfo got = {0};

	if (read(fd, &got, sizeof got) != sizeof got)
		return fail("signal %d cannot be read", signo);
	EXPECT((int)got.ssi_signo == signo && got.ssi_code == code, "signal %d (code %d) instead of %d",
	       (int)got.ssi_signo, got.ssi_code, signo);
	EXPECT(got.ssi_int == word, "signal %d brings %d, not %d", signo, got.ssi_int, word);
	EXPECT(got.ssi_pid == (uint32_t)getpid(), "signal %d is from %u", signo, got.ssi_pid);
}

static void expect_none(int fd)
{
	struct signalfd_siginfo got;

	EXPECT(read(fd, &got, sizeof got) < 0 && errno == EAGAIN, "one signal too many at fd %d", fd);
}

static void check(void)
{
	struct epoll_event events[4];
	int n;

	check_mask(users, bit(SIGUSR1) | bit(SIGUSR2));
	check_mask(realtime, bit(SIGRTMIN));
	check_mask(nothing, 0);
	n = epoll_wait(epoll, events, 4, 0);
	EXPECT(n == 2, "%d descriptors have signals, not 2", n);
	/* Those of the thread come first. */
	expect_signal(users, SIGUSR2, SI_TKILL, 0);
	expect_signal(users, SIGUSR1, SI_QUEUE, value);
	expect_signal(realtime, SIGRTMIN, SI_QUEUE, value);
	expect_signal(shared, SIGRTMIN, SI_QUEUE, value + 1);
	expect_none(users);
	expect_none(realtime);
	expect_none(nothing);
	EXPECT(!epoll_wait(epoll, events, 4, 0), "signals although all were read");
	send_all();
}

/* Another mask for a descriptor that there is, and back. */
static void change(void)
{
	sigset_t set;

	sigfillset(&set);
	EXPECT(signalfd(nothing, &set, 0) == nothing, "cannot change a mask");
	check_mask(nothing, ~(bit(SIGKILL) | bit(SIGSTOP) | bit(32) | bit(33)));
	sigemptyset(&set);
	EXPECT(signalfd(nothing, &set, 0) == nothing, "cannot change a mask");
}

static void damage_mask(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	signalfd(nothing, &set, 0);
}
static void damage_signal(void) { struct signalfd_siginfo got; EXPECT(read(users, &got, sizeof got) > 0, "read"); }
static void damage_order(void) { send(SIGRTMIN, value); }
static void damage_epoll(void) { epoll_ctl(epoll, EPOLL_CTL_DEL, realtime, NULL); }
static void damage_sharing(void) { fcntl(shared, F_SETFL, 0); dup3(nothing, shared, O_CLOEXEC); }

int main(void)
{
	static const struct named steps[] = {{"change", change}, {NULL, NULL}};
	static const struct named damages[] = {
		{"mask", damage_mask}, {"signal", damage_signal}, {"order", damage_order},
		{"epoll", damage_epoll}, {"sharing", damage_sharing}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
