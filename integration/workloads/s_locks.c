/*
 * s_locks: locks on files, leases, and who is told when a descriptor becomes ready.
 *
 * Files, each with a witness (a description of its own, by which F_OFD_GETLK shows the locks of all others): POSIX locks on ranges,
 * shared and exclusive; the same of a description (OFD); one of a child, whose number the kernel tells; flock, shared by two descriptors. A lease for writing with
 * a signal of its own. A terminal and a pipe that tell us by signals, with the number of the descriptor. `check` asks for
 * all of them and counts signals; `step` changes ranges, breaks the lease, makes descriptors ready.
 */
#include "workload.h"

#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>

#define N_BYTES 200
#define OF_CHILD 150

static int posix, of_description, witness[2], flocked, flock_witness, leased, pipes[2], terminal, slave;
static char lease_path[64];
static pid_t child;
static char expected[2][N_BYTES];		/* 0, 'r' or 'w' for each byte of the files */
static int sig_lease, sig_pipe, sig_terminal;
static volatile sig_atomic_t n_came[3];
static volatile sig_atomic_t last_fd[3];
static int n_caused[3];

static void heard(int number, siginfo_t *info, void *context)
{
	int which = number == sig_lease ? 0 : number == sig_pipe ? 1 : 2;

	(void)context;
	n_came[which]++;
	last_fd[which] = info->si_fd;
}

static int open_file(const char *what, int flags, char path[64])
{
	int fd;

	snprintf(path, 64, "s_locks-%d.%s", (int)getpid(), what);
	fd = open(path, flags | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || (flags != O_RDONLY && ftruncate(fd, N_BYTES)))
		die("open %s", path);
	return fd;
}

static void lock(int which, short type, int from, int n)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = from, .l_len = n};

	if (fcntl(which ? of_description : posix, which ? F_OFD_SETLK : F_SETLK, &lock))
		die("lock %d bytes at %d", n, from);
	memset(expected[which] + from, type == F_RDLCK ? 'r' : type == F_WRLCK ? 'w' : 0, (size_t)n);
}

static void own(int fd, int number)
{
	struct f_owner_ex owner = {.type = F_OWNER_PID, .pid = getpid()};

	if (fcntl(fd, F_SETOWN_EX, &owner) || fcntl(fd, F_SETSIG, number) ||
	    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_ASYNC | O_NONBLOCK))
		die("owner");
}

static void open_terminal(void)
{
	int lower[300], n = 0, unlocked = 0;
	unsigned number, least = 30 + (unsigned)getpid() % 200;
	char path[64];

	for (;;) {
		terminal = open("/dev/ptmx", O_RDWR | O_NOCTTY);
		if (terminal < 0 || ioctl(terminal, TIOCGPTN, &number))
			die("ptmx");
		if (number >= least)
			break;
		lower[n++] = terminal;
	}
	while (n)
		close(lower[--n]);
	snprintf(path, sizeof path, "/dev/pts/%u", number);
	if (ioctl(terminal, TIOCSPTLCK, &unlocked) || (slave = open(path, O_RDWR | O_NOCTTY)) < 0)
		die("open %s", path);
}

/* A child that holds a lock by the descriptor that it shares with us, and nothing else ever. */
static void bear(void)
{
	int told[2];
	char byte;

	if (pipe(told) || (child = fork()) < 0)
		die("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		lock(0, F_WRLCK, OF_CHILD, 10);
		write_all(told[1], "x", 1);
		close(told[0]);
		close(told[1]);
		for (;;)
			pause();
	}
	if (read(told[0], &byte, 1) != 1)
		die("child");
	close(told[0]);
	close(told[1]);
	memset(expected[0] + OF_CHILD, 'w', 10);
}

static void prepare(void)
{
	struct sigaction action = {.sa_sigaction = heard, .sa_flags = SA_SIGINFO | SA_RESTART};
	char path[64];

	sig_lease = SIGRTMIN + 1;
	sig_pipe = SIGRTMIN + 2;
	sig_terminal = SIGIO;
	sigaction(sig_lease, &action, NULL);
	sigaction(sig_pipe, &action, NULL);
	sigaction(sig_terminal, &action, NULL);
	posix = open_file("posix", O_RDWR, path);
	witness[0] = open(path, O_RDWR | O_CLOEXEC);
	bear();
	of_description = open_file("description", O_RDWR, path);
	witness[1] = open(path, O_RDWR | O_CLOEXEC);
	flocked = open_file("flock", O_RDWR, path);
	flock_witness = open(path, O_RDONLY);
	for (int which = 0; which < 2; which++) {
		lock(which, F_WRLCK, 10, 20);
		lock(which, F_RDLCK, 50, 5);
		lock(which, F_WRLCK, 100, 1);
	}
	leased = open_file("lease", O_RDWR, lease_path);
	if (flock(flocked, LOCK_EX) || dup(flocked) < 0 || fcntl(leased, F_SETSIG, sig_lease) ||
	    fcntl(leased, F_SETLEASE, F_WRLCK))
		die("flock, lease");
	if (pipe2(pipes, O_CLOEXEC))
		die("pipe2");
	own(pipes[0], sig_pipe);
	open_terminal();
	own(terminal, 0);
}

/* ---- judging ---------------------------------------------------------------------------------- */

static char kind_at(int which, int at)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};

	if (fcntl(witness[which], F_OFD_GETLK, &lock))
		return '?';
	return lock.l_type == F_UNLCK ? 0 : lock.l_type == F_RDLCK ? 'r' : 'w';
}

static void check_child(void)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = OF_CHILD, .l_len = 1};

	EXPECT(!fcntl(posix, F_GETLK, &lock) && lock.l_type == F_WRLCK && lock.l_pid == child,
	       "the child's lock is held by %d", (int)lock.l_pid);
}

static void check_owner(const char *name, int fd, int number)
{
	struct f_owner_ex owner = {0};

	EXPECT(!fcntl(fd, F_GETOWN_EX, &owner) && owner.type == F_OWNER_PID && owner.pid == getpid(),
	       "%s: its owner is %d", name, (int)owner.pid);
	EXPECT(fcntl(fd, F_GETSIG) == number, "%s: its signal is %d", name, fcntl(fd, F_GETSIG));
	EXPECT(fcntl(fd, F_GETFL) & O_ASYNC, "%s: it tells nobody", name);
}

static void check(void)
{
	for (int which = 0; which < 2; which++)
		for (int at = 0; at < N_BYTES; at++) {
			char is = kind_at(which, at);

			if (is != expected[which][at])
				return fail("byte %d of file %d: lock %d, not %d", at, which, is, expected[which][at]);
		}
	check_child();
	EXPECT(flock(flock_witness, LOCK_SH | LOCK_NB) && errno == EWOULDBLOCK, "flock is gone");
	EXPECT(fcntl(leased, F_GETLEASE) == F_WRLCK, "the lease is %d", fcntl(leased, F_GETLEASE));
	EXPECT(fcntl(leased, F_GETSIG) == sig_lease, "the lease's signal is %d", fcntl(leased, F_GETSIG));
	check_owner("pipe", pipes[0], sig_pipe);
	check_owner("terminal", terminal, 0);
	for (int i = 0; i < 3; i++)
		EXPECT(n_came[i] == n_caused[i], "signal %d came %d times, not %d", i, (int)n_came[i], n_caused[i]);
}

/* ---- protocol --------------------------------------------------------------------------------- */

static void wait_for(int which, int fd)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 10 * NS_PER_S;

	n_caused[which]++;
	while (n_came[which] < n_caused[which])
		if (now_ns(CLOCK_MONOTONIC) > give_up)
			return fail("no signal %d", which);
	/* SIGIO without F_SETSIG does not tell which descriptor. */
	EXPECT(which == 2 || last_fd[which] == fd, "signal %d is for descriptor %d", which, (int)last_fd[which]);
}

static void change_ranges(void)
{
	static int turn;

	for (int which = 0; which < 2; which++) {
		lock(which, turn % 2 ? F_WRLCK : F_UNLCK, 15, 5);
		lock(which, turn % 2 ? F_RDLCK : F_WRLCK, 60 + turn % 30, 3);
	}
	turn++;
}

static void break_lease(void)
{
	EXPECT(open(lease_path, O_RDONLY | O_NONBLOCK) == -1 && errno == EWOULDBLOCK, "the lease excludes nobody");
	wait_for(0, leased);
	/* Giving it up resets the signal. */
	if (fcntl(leased, F_SETLEASE, F_UNLCK) || fcntl(leased, F_SETSIG, sig_lease) ||
	    fcntl(leased, F_SETLEASE, F_WRLCK))
		die("lease again");
}

static void fill_pipe(void)
{
	char byte;

	write_all(pipes[1], "x", 1);
	wait_for(1, pipes[0]);
	EXPECT(read(pipes[0], &byte, 1) == 1 && byte == 'x', "the pipe is empty");
	n_caused[1] = n_came[1];	/* a read may tell again */
}

static void show(void)
{
	char bytes[4];

	write_all(slave, "y", 1);
	wait_for(2, terminal);
	EXPECT(read(terminal, bytes, 4) == 1 && bytes[0] == 'y', "the terminal shows nothing");
	n_caused[2] = n_came[2];
}

static const struct named steps[] = {
	{"ranges", change_ranges}, {"lease", break_lease}, {"pipe", fill_pipe}, {"terminal", show}, {NULL, NULL},
};

static void unlock_range(void)
{
	struct flock lock = {.l_type = F_UNLCK, .l_whence = SEEK_SET, .l_start = 12, .l_len = 1};

	fcntl(posix, F_SETLK, &lock);
}

static void unlock_description(void)
{
	struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 12, .l_len = 1};

	fcntl(of_description, F_OFD_SETLK, &lock);
}

static void unlock_flock(void)
{
	flock(flocked, LOCK_UN);
}

static void end_lease(void)
{
	fcntl(leased, F_SETLEASE, F_UNLCK);
}

static void lose_signal(void)
{
	fcntl(pipes[0], F_SETSIG, 0);
}

static void lose_owner(void)
{
	fcntl(terminal, F_SETOWN, 1);
}

static void lose_async(void)
{
	fcntl(pipes[0], F_SETFL, O_NONBLOCK);
}

static void end_child(void)
{
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

static const struct named damages[] = {
	{"child", end_child}, {"range", unlock_range}, {"description", unlock_description}, {"flock", unlock_flock}, {"lease", end_lease},
	{"signal", lose_signal}, {"owner", lose_owner}, {"async", lose_async}, {NULL, NULL},
};

int main(void)
{
	static const struct program program = {.check = check, .steps = steps, .damages = damages};

	prepare();
	return serve(&program);
}
