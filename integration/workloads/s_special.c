/*
 * s_special: files that are more than a name and an offset: named pipes, a pidfd of the process itself and one of a
 * child that is gone, files of /proc/self, namespaces, a symbolic link that is open by itself.
 *
 * `check` reads what waits in the pipes and puts it back, asks whether the pidfds tell of ends (an epoll instance watches them),
 * compares what the files of /proc say with the process, and namespaces with those it is in.
 */
#include "workload.h"

#include <sys/epoll.h>

static const char text[] = "what waits in the pipe";
static const char *const spaces[] = {"ipc", "mnt", "net", "user", "uts"};
static char both[64], mute[64], link_path[64];
static int reader, writer, again, orphan, self_fd, shared_self, ended, epoll, limits, folder, memory, link_fd;
static int space_fds[LEN(spaces)];
static off_t limits_at;
static size_t n_rounds;
static volatile uint64_t in_memory;

static void watch(int fd, uint64_t data)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = data};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

static int open_or_die(const char *path, int flags)
{
	int fd = open(path, flags);

	if (fd < 0)
		die("open %s", path);
	return fd;
}

static void prepare_pipes(void)
{
	snprintf(both, sizeof both, "s_special-%d.both", getpid());
	snprintf(mute, sizeof mute, "s_special-%d.mute", getpid());
	if (mkfifo(both, 0600) || mkfifo(mute, 0600))
		die("mkfifo");
	reader = open_or_die(both, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	writer = fcntl(open_or_die(both, O_WRONLY | O_CLOEXEC), F_DUPFD, 40);
	again = open_or_die(both, O_RDWR | O_NONBLOCK);
	orphan = open_or_die(mute, O_RDONLY | O_NONBLOCK);
	if (fcntl(writer, F_SETPIPE_SZ, 8192) != 8192)
		die("F_SETPIPE_SZ");
	write_all(writer, text, sizeof text);
}

static void prepare_pidfds(void)
{
	pid_t child = fork();

	if (child == 0)
		_exit(0);
	self_fd = (int)syscall(SYS_pidfd_open, getpid(), 0);
	ended = (int)syscall(SYS_pidfd_open, child, O_NONBLOCK);
	shared_self = fcntl(self_fd, F_DUPFD, 30);
	if (self_fd < 0 || ended < 0 || waitpid(child, NULL, 0) != child)
		die("pidfd_open");
	epoll = epoll_create1(EPOLL_CLOEXEC);
	watch(self_fd, 1);
	watch(ended, 2);
	watch(reader, 3);
}

static void prepare(void)
{
	char path[64], byte[30];

	prepare_pipes();
	prepare_pidfds();
	limits = open_or_die("/proc/self/limits", O_RDONLY);
	folder = open_or_die("/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	memory = open_or_die("/proc/self/mem", O_RDWR);
	if (read(limits, byte, sizeof byte) != sizeof byte)
		die("read limits");
	limits_at = sizeof byte;
	for (size_t i = 0; i < LEN(spaces); i++) {
		snprintf(path, sizeof path, "/proc/self/ns/%s", spaces[i]);
		space_fds[i] = open_or_die(path, O_RDONLY | O_CLOEXEC);
	}
	snprintf(link_path, sizeof link_path, "s_special-%d.link", getpid());
	if (symlink("nowhere", link_path))
		die("symlink");
	link_fd = open_or_die(link_path, O_PATH | O_NOFOLLOW);
}

static void check_pipes(void)
{
	struct pollfd polled[] = {{.fd = orphan, .events = POLLIN}, {.fd = reader, .events = POLLIN}};
	char got[64] = "";

	EXPECT(poll(polled, 2, 0) >= 0, "poll");
	EXPECT(!polled[0].revents, "a pipe without writers tells %x", polled[0].revents);
	EXPECT(polled[1].revents == POLLIN, "the pipe tells %x", polled[1].revents);
	EXPECT(fcntl(reader, F_GETPIPE_SZ) == 8192, "the pipe holds %d bytes", fcntl(reader, F_GETPIPE_SZ));
	EXPECT(read(n_rounds++ % 2 ? reader : again, got, sizeof got) == sizeof text && !strcmp(got, text),
	       "the pipe gives '%s'", got);
	EXPECT(read(reader, got, sizeof got) < 0 && errno == EAGAIN, "the pipe gives more");
	EXPECT(read(orphan, got, sizeof got) == 0, "a pipe without writers gives something");
	write_all(writer, text, sizeof text);
}

static void check_pidfds(void)
{
	struct epoll_event events[4];
	int n = epoll_wait(epoll, events, 4, 0);
	bool told[4] = {false};

	for (int i = 0; i < n; i++)
		told[events[i].data.u64 & 3] = true;
	EXPECT(n == 2 && told[2] && told[3], "epoll tells of %d files", n);
	EXPECT(!syscall(SYS_pidfd_send_signal, self_fd, 0, NULL, 0), "the pidfd is not our own");
	EXPECT(!syscall(SYS_pidfd_send_signal, shared_self, 0, NULL, 0), "its copy is not our own");
	EXPECT(syscall(SYS_pidfd_send_signal, ended, 0, NULL, 0) < 0 && errno == ESRCH, "the child is back");
}

static void check_processes(void)
{
	char is[64], must[64], path[64];
	uint64_t got = 0;
	ssize_t n;

	EXPECT(lseek(limits, 0, SEEK_CUR) == limits_at, "limits are at %ld", (long)lseek(limits, 0, SEEK_CUR));
	EXPECT(pread(limits, is, 5, 0) == 5 && !memcmp(is, "Limit", 5), "limits cannot be read");
	snprintf(path, sizeof path, "%d/comm", getpid());
	EXPECT(!faccessat(folder, path, R_OK, 0), "our thread is not in the folder");
	in_memory = n_rounds * 0x9e3779b97f4a7c15ul;
	EXPECT(pread(memory, &got, sizeof got, (off_t)(uintptr_t)&in_memory) == sizeof got && got == in_memory,
	       "the memory is another");
	for (size_t i = 0; i < LEN(spaces); i++) {
		struct stat mine, open_one;

		snprintf(path, sizeof path, "/proc/self/ns/%s", spaces[i]);
		EXPECT(!stat(path, &mine) && !fstat(space_fds[i], &open_one) && mine.st_ino == open_one.st_ino,
		       "another %s namespace", spaces[i]);
	}
	n = readlinkat(link_fd, "", is, sizeof is - 1);
	EXPECT(n == 7 && !memcmp(is, "nowhere", 7), "the link leads elsewhere");
	snprintf(path, sizeof path, "/proc/self/fd/%d", limits);
	n = readlink(path, is, sizeof is - 1);
	is[n > 0 ? n : 0] = 0;
	snprintf(must, sizeof must, "/proc/%d/limits", getpid());
	EXPECT(!strcmp(is, must), "'%s' is open, not '%s'", is, must);
}

static void check(void)
{
	check_pipes();
	check_pidfds();
	check_processes();
}

static void move(void)
{
	limits_at += 7;
	lseek(limits, limits_at, SEEK_SET);
}

/* Through the pipe without writers, which has none again afterwards, and tells so. */
static void pass(void)
{
	int speaker = open_or_die(mute, O_WRONLY | O_CLOEXEC);
	char got[8] = "";
	int fresh;

	write_all(speaker, "word", 5);
	close(speaker);
	EXPECT(read(orphan, got, sizeof got) == 5 && !strcmp(got, "word"), "'%s' came through", got);
	/* Opened anew, it has seen no writer yet. */
	fresh = open_or_die(mute, O_RDONLY | O_NONBLOCK);
	dup3(fresh, orphan, 0);
	close(fresh);
}

static void damage_content(void) { char byte; EXPECT(read(reader, &byte, 1) == 1, "read"); }
static void damage_size(void) { fcntl(writer, F_SETPIPE_SZ, 65536); }
static void damage_offset(void) { lseek(limits, 3, SEEK_SET); }
static void damage_pidfd(void) { dup3(ended, shared_self, 0); }
static void damage_epoll(void) { epoll_ctl(epoll, EPOLL_CTL_DEL, ended, NULL); }
static void damage_namespace(void) { dup3(space_fds[0], space_fds[1], O_CLOEXEC); }
static void damage_memory(void) { dup3(limits, memory, 0); }

int main(void)
{
	static const struct named steps[] = {{"move", move}, {"pass", pass}, {NULL, NULL}};
	static const struct named damages[] = {
		{"content", damage_content}, {"size", damage_size}, {"offset", damage_offset},
		{"pidfd", damage_pidfd}, {"epoll", damage_epoll}, {"namespace", damage_namespace},
		{"memory", damage_memory}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
