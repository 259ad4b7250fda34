/*
 * s_family: two processes that have the same files open, one description each: a file of /proc, pidfds of both, a timer, an
 * inotify, a signalfd, an epoll instance; and a named pipe between them.
 *
 * What one of them does to a shared description the other must see: offset, flags, ticks and events that were read. The
 * child obeys by a pipe: it checks what is its own part, and says what is wrong in a line.
 */
#include "workload.h"

#include <sys/epoll.h>
#include <sys/inotify.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

static pid_t parent, child;
static int limits, of_parent, of_child, comm_of_child, timer, inotify, signals, watching, fifo_end;
static int to_child[2], from_child[2];
static char folder[64], fifo[64];
static off_t limits_at;

static int open_or_die(const char *path, int flags)
{
	int fd = open(path, flags);

	if (fd < 0)
		die("open %s", path);
	return fd;
}

static void watch(int epoll, int fd, uint64_t data)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = data};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

/* ---- what each of them does with what they share -------------------------------------------------- */

static void check_limits(void)
{
	char is[16], must[16];

	EXPECT(lseek(limits, 0, SEEK_CUR) == limits_at, "%d: limits are at %ld, not %ld", getpid(),
	       (long)lseek(limits, 0, SEEK_CUR), (long)limits_at);
	EXPECT(pread(limits, must, sizeof must, limits_at) == sizeof must && read(limits, is, sizeof is) == sizeof is &&
	       !memcmp(is, must, sizeof is), "%d: limits are others", getpid());
}

static void check_pidfds(void)
{
	char path[64], line[128];
	int told[2] = {0, 0}, fds[2] = {of_parent, of_child};

	for (int i = 0; i < 2; i++) {
		FILE *info;

		snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fds[i]);
		info = fopen(path, "re");
		while (info && fgets(line, sizeof line, info))
			sscanf(line, "Pid: %d", &told[i]);
		if (info)
			fclose(info);
	}
	EXPECT(told[0] == parent && told[1] == child, "%d: pidfds of %d and %d", getpid(), told[0], told[1]);
}

static void check_flag(bool on)
{
	EXPECT(!!(fcntl(of_parent, F_GETFL) & O_NONBLOCK) == on, "%d: the flag of the other is not seen", getpid());
}

/* One tick of the timer and one event of the inotify, which the other has provoked. */
static void take_what_came(void)
{
	char events[512] __attribute__((aligned(8)));
	struct epoll_event ready[4];
	uint64_t n = 0;

	EXPECT(epoll_wait(watching, ready, 4, 20000) == 2, "%d: epoll does not tell of both", getpid());
	EXPECT(read(timer, &n, sizeof n) == sizeof n && n == 1, "%d: %lu ticks", getpid(), (unsigned long)n);
	EXPECT(read(inotify, events, sizeof events) > 0 && ((struct inotify_event *)events)->wd == 1,
	       "%d: no event", getpid());
	EXPECT(!epoll_wait(watching, ready, 4, 0), "%d: more than was provoked", getpid());
}

static void provoke_event(void)
{
	char path[128];
	int fd;

	snprintf(path, sizeof path, "%s/new", folder);
	fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
	if (fd < 0 || close(fd) || unlink(path))
		die("create %s", path);
}

static void provoke_tick(void)
{
	struct itimerspec soon = {.it_value.tv_nsec = 1};
	struct pollfd polled = {.fd = timer, .events = POLLIN};

	if (timerfd_settime(timer, 0, &soon, NULL))
		die("timerfd_settime");
	while (poll(&polled, 1, 20000) < 0 && errno == EINTR)
		;
}

static void check_signal(int sender)
{
	struct signalfd_siginfo got = {0};

	EXPECT(read(signals, &got, sizeof got) == sizeof got && (int)got.ssi_signo == SIGUSR1, "%d: no signal", getpid());
	EXPECT((int)got.ssi_pid == sender, "%d: a signal of %d", getpid(), (int)got.ssi_pid);
}

/* ---- the child ------------------------------------------------------------------------------------ */

static void be_child(void)
{
	char order, text[64];
	ssize_t n;

	while (read(to_child[0], &order, 1) == 1) {
		switch (order) {
		case 'c':
			check_limits();
			check_pidfds();
			check_flag(true);
			take_what_came();
			check_signal(parent);
			n = read(fifo_end, text, sizeof text);
			EXPECT(n == 5 && !memcmp(text, "tells", 5), "the child reads %zd bytes", n);
			provoke_event();
			provoke_tick();
			break;
		case 'd':
			lseek(limits, 1, SEEK_CUR);
			break;
		}
		/* The reason, or nothing, and a line end. */
		write_all(from_child[1], verdict.why, strlen(verdict.why));
		write_all(from_child[1], "\n", 1);
		verdict.why[0] = 0;
		atomic_store(&verdict.state, 0);
	}
	_exit(0);
}

static void order(char what)
{
	char answer[500];
	size_t len = 0;

	write_all(to_child[1], &what, 1);
	while (len < sizeof answer - 1 && read(from_child[0], answer + len, 1) == 1 && answer[len] != '\n')
		len++;
	answer[len] = 0;
	EXPECT(!len, "%s", answer);
}

/* ---- the parent ----------------------------------------------------------------------------------- */

static void speak(void)
{
	write_all(fifo_end, "tells", 5);
	if (kill(child, SIGUSR1))
		die("kill");
}

static void prepare(void)
{
	char path[64];
	sigset_t blocked;

	parent = getpid();
	snprintf(folder, sizeof folder, "s_family-%d.d", parent);
	snprintf(fifo, sizeof fifo, "s_family-%d.fifo", parent);
	if (mkdir(folder, 0700) || mkfifo(fifo, 0600) || pipe2(to_child, O_CLOEXEC) || pipe2(from_child, O_CLOEXEC))
		die("prepare");
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	signals = signalfd(-1, &blocked, SFD_NONBLOCK);
	limits = open_or_die("/proc/self/limits", O_RDONLY);
	of_parent = (int)syscall(SYS_pidfd_open, parent, 0);
	timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	inotify = inotify_init1(IN_NONBLOCK);
	watching = epoll_create1(0);
	if (inotify_add_watch(inotify, folder, IN_CREATE) != 1)
		die("inotify_add_watch");
	watch(watching, timer, 1);
	watch(watching, inotify, 2);
	fifo_end = open_or_die(fifo, O_RDWR);
	child = fork();
	if (child == 0) {
		int mine = open_or_die(fifo, O_RDONLY);

		child = getpid();
		/* So that it reads the end of orders when the parent is gone. */
		close(to_child[1]);
		close(from_child[0]);
		dup2(mine, fifo_end);
		close(mine);
		/* Its own pidfd, under the number that the parent's will have. */
		of_child = (int)syscall(SYS_pidfd_open, child, 0);
		be_child();
	}
	of_child = (int)syscall(SYS_pidfd_open, child, 0);
	snprintf(path, sizeof path, "/proc/%d/comm", child);
	comm_of_child = open_or_die(path, O_RDONLY | O_CLOEXEC);
	fcntl(of_parent, F_SETFL, O_NONBLOCK);
	provoke_tick();
	speak();
}

static void check(void)
{
	char is[32] = "", must[32] = "";

	provoke_event();
	order('c');
	limits_at = 16;			/* as far as the child has read */
	check_limits();
	check_pidfds();
	check_flag(true);
	take_what_came();
	prctl(PR_GET_NAME, must);
	EXPECT(pread(comm_of_child, is, sizeof is - 1, 0) > 0 && !strncmp(is, must, strlen(must)), "the child is %s", is);
	EXPECT(kill(parent, SIGUSR1) == 0, "kill");
	check_signal(parent);
	limits_at = lseek(limits, 0, SEEK_SET);
	provoke_tick();
	speak();
}

/* Both flags are one. */
static void toggle(void)
{
	fcntl(of_parent, F_SETFL, 0);
	check_flag(false);
	fcntl(of_parent, F_SETFL, O_NONBLOCK);
}

static void damage_offset(void) { order('d'); }
static void damage_flag(void) { fcntl(of_parent, F_SETFL, 0); }
static void damage_pidfd(void) { dup2(of_parent, of_child); }
static void damage_ticks(void) { uint64_t n; EXPECT(read(timer, &n, sizeof n) == sizeof n, "read"); }

int main(void)
{
	static const struct named steps[] = {{"toggle", toggle}, {NULL, NULL}};
	static const struct named damages[] = {
		{"offset", damage_offset}, {"flag", damage_flag}, {"pidfd", damage_pidfd},
		{"ticks", damage_ticks}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
