/*
 * s_inotify: what is watched, under which numbers, and that events come by them.
 *
 * Watched: two directories, a file, a symbolic link itself, one of them only until it is unlinked, one for one event only;
 * numbers with gaps, since watches were removed; a second instance that blocks; an epoll instance that watches both. `check`
 * compares /proc/self/fdinfo with the table, wants nothing to be queued, makes one event happen at each watch and reads it.
 */
#include "workload.h"

#include <sys/epoll.h>
#include <sys/inotify.h>

#define MAX_WATCHES 8

static struct watch {
	const char *name;
	int fd, number;
	uint32_t mask;
	void (*provoke)(const char *path);
	char path[128];
} watches[MAX_WATCHES];
static int n_watches, quick, slow, epoll;
static char folder[64];

static void in_folder(char path[128], const char *name)
{
	snprintf(path, 128, "%s/%s", folder, name);
}

static void touch(const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	if (fd < 0 || close(fd))
		die("create %s", path);
}

static void create_inside(const char *path)
{
	char inside[256];

	snprintf(inside, sizeof inside, "%s/new", path);
	touch(inside);
	if (unlink(inside))
		die("unlink");
}

static void write_to(const char *path)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, "x", 1) != 1 || close(fd))
		die("write to %s", path);
}

static void change_link(const char *path)
{
	if (lchown(path, getuid(), getgid()))
		die("lchown");
}

/* Add and remove watches until the next one gets this number. */
static void skip_to(int fd, int number)
{
	char path[128], events[4096];

	in_folder(path, "other");
	for (;;) {
		int got = inotify_add_watch(fd, path, IN_DELETE_SELF);

		if (got < 0 || inotify_rm_watch(fd, got) || read(fd, events, sizeof events) <= 0)
			die("a watch for nothing");
		if (got == number - 1)
			return;
	}
}

static void watch(const char *name, int fd, int number, uint32_t mask, void (*provoke)(const char *), const char *file)
{
	struct watch *w = &watches[n_watches++];

	*w = (struct watch){.name = name, .fd = fd, .number = number, .mask = mask, .provoke = provoke};
	in_folder(w->path, file);
	if (inotify_add_watch(fd, w->path, mask) != number)
		die("watch number %d", number);
}

static void add_to_epoll(int fd)
{
	struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

static void prepare(void)
{
	static const char *const folders[] = {"", "one", "two", "other"};
	char path[128];

	snprintf(folder, sizeof folder, "s_inotify-%d.d", getpid());
	for (size_t i = 0; i < LEN(folders); i++) {
		in_folder(path, folders[i]);
		if (mkdir(path, 0700))
			die("mkdir %s", path);
	}
	in_folder(path, "file");
	touch(path);
	in_folder(path, "link");
	if (symlink("file", path))
		die("symlink");
	quick = fcntl(inotify_init1(IN_NONBLOCK), F_DUPFD_CLOEXEC, 30);
	slow = inotify_init1(IN_CLOEXEC);
	epoll = epoll_create1(EPOLL_CLOEXEC);
	watch("directory", quick, 1, IN_CREATE, create_inside, "one");
	skip_to(quick, 4);
	watch("other directory", quick, 4, IN_CREATE | IN_EXCL_UNLINK | IN_ONLYDIR, create_inside, "two");
	watch("file", quick, 5, IN_MODIFY, write_to, "file");
	skip_to(slow, 300);
	watch("symbolic link", slow, 300, IN_ATTRIB | IN_DONT_FOLLOW, change_link, "link");
	add_to_epoll(quick);
	add_to_epoll(slow);
	watches[1].mask &= ~IN_ONLYDIR;		/* only said when it is added */
	watches[3].mask &= ~IN_DONT_FOLLOW;
}

static void check_listing(int fd)
{
	char path[64], line[512];
	int n = 0, must = 0;
	FILE *info;

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	info = fopen(path, "re");
	while (info && fgets(line, sizeof line, info)) {
		unsigned number, mask;
		unsigned long inode;

		if (sscanf(line, "inotify wd:%x ino:%lx sdev:%*x mask:%x", &number, &inode, &mask) != 3)
			continue;
		n++;
		for (struct watch *w = watches; w < watches + n_watches; w++) {
			struct stat status;

			if (w->fd != fd || w->number != (int)number)
				continue;
			EXPECT(!lstat(w->path, &status) && status.st_ino == inode, "%s: watches another inode", w->name);
			EXPECT(mask == w->mask, "%s: mask %x, not %x", w->name, mask, w->mask);
		}
	}
	if (info)
		fclose(info);
	for (struct watch *w = watches; w < watches + n_watches; w++)
		must += w->fd == fd;
	EXPECT(n == must, "%d watches, not %d", n, must);
}

static void check_event(struct watch *w)
{
	char room[4096] __attribute__((aligned(8)));
	struct inotify_event *event = (struct inotify_event *)room;
	struct epoll_event ready[4];
	ssize_t len;

	w->provoke(w->path);
	EXPECT(epoll_wait(epoll, ready, 4, 0) == 1 && ready[0].data.fd == w->fd, "%s: epoll does not tell", w->name);
	len = read(w->fd, room, sizeof room);
	EXPECT(len >= (ssize_t)sizeof *event, "%s: no event", w->name);
	EXPECT(event->wd == w->number && event->mask == (w->mask & IN_ALL_EVENTS), "%s: event %x of watch %d", w->name,
	       event->mask, event->wd);
	EXPECT(len == (ssize_t)(sizeof *event + event->len), "%s: %zd bytes of events", w->name, len);
}

static void check(void)
{
	struct epoll_event ready[4];

	check_listing(quick);
	check_listing(slow);
	EXPECT(!epoll_wait(epoll, ready, 4, 0), "events are queued that were not there");
	for (int i = 0; i < n_watches; i++)
		check_event(&watches[i]);
}

/* A watch is removed, and comes back under the next number. */
static void renew(void)
{
	struct watch *w = &watches[2];
	char events[4096];

	EXPECT(!inotify_rm_watch(quick, w->number), "cannot remove a watch");
	EXPECT(read(quick, events, sizeof events) == sizeof(struct inotify_event), "the end of a watch is not told");
	w->number++;
	EXPECT(inotify_add_watch(quick, w->path, w->mask) == w->number, "another number");
}

static void damage_mask(void) { inotify_add_watch(quick, watches[0].path, IN_CREATE | IN_ATTRIB); }
static void damage_removed(void) { inotify_rm_watch(slow, watches[3].number); }
static void damage_unread(void) { create_inside(watches[0].path); }
static void damage_added(void) { inotify_add_watch(slow, "/", IN_ATTRIB); }
static void damage_epoll(void) { epoll_ctl(epoll, EPOLL_CTL_DEL, slow, NULL); }

int main(void)
{
	static const struct named steps[] = {{"renew", renew}, {NULL, NULL}};
	static const struct named damages[] = {
		{"mask", damage_mask}, {"removed", damage_removed}, {"unread", damage_unread},
		{"added", damage_added}, {"epoll", damage_epoll}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
