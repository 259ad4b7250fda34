/*
 * s_ghost: files and directories without a name.
 *
 * Deleted while open (read-only, write-only with O_APPEND, two descriptions of one file, sparse, with a mode and times of
 * its own), while mapped (shared, private), made without a name (O_TMPFILE), deleted with their directory, replaced by
 * another file of the same name; a deleted directory that is open, and one that is the working directory. `check` asks
 * for content, size, blocks, mode, times, offsets and what /proc shows.
 */
#include "pages.h"

#define SPARSE_BYTES (1l << 30)

static struct ghost {
	const char *name;
	int fd;				/* -1: only mapped */
	int flags;
	off_t size, offset, at;		/* `text` is at `at`; -1: nowhere */
	mode_t mode;
	struct timespec modified;
	char shown[256];
	struct book book;
	bool named;			/* its name is another file's now, so it may be shown by another */
} ghosts[16];
static int n_ghosts, folder, second;
static uint32_t version;
static char cwd[256], taken_path[160];
static const char text[] = "nobody finds this";

static struct ghost *find(const char *name)
{
	for (struct ghost *g = ghosts; g < ghosts + n_ghosts; g++)
		if (!strcmp(g->name, name))
			return g;
	die("no ghost %s", name);
}

static void link_of(int fd, char shown[256])
{
	char path[40];
	ssize_t n;

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	n = readlink(path, shown, 255);
	shown[n > 0 ? n : 0] = 0;
}

static struct ghost *keep(const char *name, int fd, off_t size)
{
	struct ghost *g = &ghosts[n_ghosts++];

	if (fd < 0 || (size && ftruncate(fd, size)))
		die("%s", name);
	*g = (struct ghost){.name = name, .fd = fd, .size = size, .at = -1, .mode = 0600, .flags = fcntl(fd, F_GETFL)};
	return g;
}

static void path_of(const char *name, char path[160])
{
	snprintf(path, 160, "s_ghost-%d.%s", (int)getpid(), name);
}

static struct ghost *make(const char *name, off_t size, off_t at)
{
	char path[160];
	struct ghost *g;

	path_of(name, path);
	g = keep(name, open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600), size);
	g->at = at;
	if (at >= 0 && pwrite(g->fd, text, sizeof text, at) != sizeof text)
		die("pwrite");
	return g;
}

static void reopen(struct ghost *g, int flags)
{
	char path[160];
	int fd;

	path_of(g->name, path);
	fd = open(path, flags | O_CLOEXEC);
	if (fd < 0 || dup3(fd, g->fd, O_CLOEXEC) < 0)
		die("open %s", path);
	close(fd);
	g->flags = fcntl(g->fd, F_GETFL);
}

static void forget(struct ghost *g)
{
	char path[160];
	struct stat status;

	path_of(g->name, path);
	if (unlink(path) || fstat(g->fd, &status))
		die("unlink %s", path);
	g->modified = status.st_mtim;
}

static void map_it(struct ghost *g, int kind)
{
	size_t n_pages = (size_t)g->size / PAGE;

	g->book = book_make(g->name, map_or_die(NULL, n_pages * PAGE, PROT_READ | PROT_WRITE, kind, g->fd, 0), n_pages - 1,
			    (uint64_t)n_ghosts << 24, 0);
	for (size_t page = 0; page < g->book.n_pages; page++)
		book_write_page(&g->book, page, ++version);
}

static void prepare_open(void)
{
	static const struct timespec old[2] = {{1000000000, 5}, {1100000000, 123456789}};
	struct ghost *g;
	char path[160];
	int fd;

	g = make("plain", 5000, 4321);
	g->offset = lseek(g->fd, 77, SEEK_SET);
	path_of(g->name, path);
	second = open(path, O_RDONLY | O_CLOEXEC);
	lseek(second, 4000, SEEK_SET);
	g->mode = 0604;
	if (fchmod(g->fd, g->mode) || fchown(g->fd, 12, 34) || futimens(g->fd, old))
		die("fchown");
	forget(g);
	g = make("read-only", 100, 1);
	reopen(g, O_RDONLY);
	forget(g);
	g = make("log", 0, 0);
	g->size = sizeof text;
	reopen(g, O_WRONLY | O_APPEND);
	forget(g);
	g = make("sparse", SPARSE_BYTES, SPARSE_BYTES / 2);
	forget(g);
	g = make("empty", 0, -1);
	forget(g);
	g = make("taken", 2000, 1000);
	forget(g);
	path_of(g->name, taken_path);
	fd = open(taken_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	write_all(fd, "another", 7);
	close(fd);
	g->named = true;
	fd = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd >= 0) {			/* a file system may not have it */
		struct stat status;

		g = keep("never had a name", fd, 3000);
		g->at = 2000;
		g->named = true;
		if (pwrite(fd, text, sizeof text, 2000) != sizeof text || fstat(fd, &status))
			die("pwrite");
		g->modified = status.st_mtim;
	}
}

static void prepare_folders(void)
{
	char path[160], file[180];
	struct ghost *g;

	path_of("folder", path);
	snprintf(file, sizeof file, "%s/inside", path);
	if (mkdir(path, 0700))
		die("mkdir");
	folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	g = keep("in a deleted directory", open(file, O_RDWR | O_CREAT | O_CLOEXEC, 0600), 500);
	g->at = 400;
	if (folder < 0 || pwrite(g->fd, text, sizeof text, 400) != sizeof text || unlink(file) || rmdir(path))
		die("%s", path);
	g->modified.tv_sec = -1;
	path_of("cwd", path);
	if (mkdir(path, 0755) || chdir(path))
		die("%s", path);
	snprintf(file, sizeof file, "../%s", path);
	if (rmdir(file))
		die("rmdir %s", file);
}

static void prepare(void)
{
	struct ghost *g;
	ssize_t n;

	prepare_open();
	g = make("mapped", 6 * PAGE, -1);
	map_it(g, MAP_SHARED);
	forget(g);
	close(g->fd);
	g->fd = -1;
	g = make("mapped privately", 4 * PAGE, 3 * PAGE);
	map_it(g, MAP_PRIVATE);
	forget(g);
	prepare_folders();
	for (g = ghosts; g < ghosts + n_ghosts; g++)
		if (g->fd >= 0)
			link_of(g->fd, g->shown);
	n = readlink("/proc/self/cwd", cwd, sizeof cwd - 1);
	cwd[n > 0 ? n : 0] = 0;
}

/* ---- checks ----------------------------------------------------------------------------------- */

static void check_open(const struct ghost *g)
{
	char shown[256], found[sizeof text] = "";
	struct stat status;

	link_of(g->fd, shown);
	EXPECT(g->named || !strcmp(shown, g->shown), "%s is shown as '%s', not '%s'", g->name, shown, g->shown);
	EXPECT(strstr(shown, " (deleted)") != NULL, "%s is shown as '%s'", g->name, shown);
	EXPECT(!fstat(g->fd, &status) && status.st_nlink == 0, "%s has a name", g->name);
	EXPECT(status.st_size == g->size, "%s has %ld bytes, not %ld", g->name, (long)status.st_size, (long)g->size);
	EXPECT(status.st_blocks <= 64, "%s takes %ld blocks", g->name, (long)status.st_blocks);
	EXPECT((status.st_mode & 07777) == g->mode, "%s has mode %o", g->name, status.st_mode & 07777);
	EXPECT(fcntl(g->fd, F_GETFL) == g->flags, "%s has flags %o, not %o", g->name, fcntl(g->fd, F_GETFL), g->flags);
	if (g->modified.tv_sec >= 0 && !g->book.n_pages)
		EXPECT(!memcmp(&status.st_mtim, &g->modified, sizeof g->modified), "%s was modified at another time", g->name);
	EXPECT(lseek(g->fd, 0, SEEK_CUR) == g->offset, "%s is at byte %ld", g->name, (long)lseek(g->fd, 0, SEEK_CUR));
	if (g->at >= 0 && (g->flags & O_ACCMODE) != O_WRONLY)
		EXPECT(pread(g->fd, found, sizeof text, g->at) == sizeof text && !memcmp(found, text, sizeof text),
		       "%s holds '%s'", g->name, found);
}

static void check_log(const struct ghost *g)
{
	char path[40], found[sizeof text] = "";
	int fd;

	snprintf(path, sizeof path, "/proc/self/fd/%d", g->fd);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	EXPECT(read(fd, found, sizeof text) == sizeof text && !memcmp(found, text, sizeof text), "the log holds '%s'", found);
	close(fd);
}

static void check(void)
{
	const struct ghost *plain = find("plain");
	struct stat one, other;
	char shown[256];
	ssize_t n;

	for (struct ghost *g = ghosts; g < ghosts + n_ghosts; g++) {
		for (size_t page = 0; page < g->book.n_pages; page++)
			book_check_page(&g->book, page);
		if (g->fd >= 0)
			check_open(g);
	}
	check_log(find("log"));
	EXPECT(!memcmp(find("mapped privately")->book.addr + 3 * PAGE, text, sizeof text), "a mapping does not show the file");
	EXPECT(!fstat(plain->fd, &one) && !fstat(second, &other) && one.st_ino == other.st_ino && one.st_dev == other.st_dev,
	       "two descriptions of one file are of two");
	EXPECT(one.st_uid == 12 && one.st_gid == 34, "the owner is %d:%d", (int)one.st_uid, (int)one.st_gid);
	EXPECT(lseek(second, 0, SEEK_CUR) == 4000, "the second description is elsewhere");
	link_of(folder, shown);
	EXPECT(!fstat(folder, &one) && S_ISDIR(one.st_mode) && strstr(shown, " (deleted)"), "the directory is '%s'", shown);
	EXPECT(openat(folder, "new", O_RDWR | O_CREAT, 0600) < 0 && errno == ENOENT, "the directory lives");
	n = readlink("/proc/self/cwd", shown, sizeof shown - 1);
	shown[n > 0 ? n : 0] = 0;
	EXPECT(!strcmp(shown, cwd), "the working directory is '%s', not '%s'", shown, cwd);
	EXPECT(open("new", O_RDWR | O_CREAT, 0600) < 0 && errno == ENOENT, "the working directory lives");
}

/* ---- steps and damages ------------------------------------------------------------------------ */

static void step_write(void)
{
	struct ghost *g = find("plain");
	struct stat status;

	g->offset += write(g->fd, "more", 4) == 4 ? 4 : 0;
	if (fstat(g->fd, &status))
		die("fstat");
	g->modified = status.st_mtim;
	book_write(&find("mapped")->book, version % CELLS, version + 1);
	version++;
}

static void step_append(void)
{
	struct ghost *g = find("log");
	struct stat status;

	write_all(g->fd, "line\n", 5);
	if (fstat(g->fd, &status))
		die("fstat");
	g->modified = status.st_mtim;
	g->offset = g->size = status.st_size;
}

static void damage_content(void) { if (pwrite(find("plain")->fd, "x", 1, 4322) != 1) die("pwrite"); }
static void damage_sparse(void) { if (ftruncate(find("sparse")->fd, 5)) die("ftruncate"); }
static void damage_mapped(void) { find("mapped")->book.addr[4 * PAGE] ^= 1; }
static void damage_private(void) { find("mapped privately")->book.addr[3 * PAGE] ^= 1; }
static void damage_mode(void) { fchmod(find("plain")->fd, 0600); }
static void damage_owner(void) { if (fchown(find("plain")->fd, 0, 0)) die("fchown"); }
static void damage_offset(void) { lseek(second, 0, SEEK_SET); }
static void damage_time(void) { futimens(find("read-only")->fd, NULL); }
static void damage_cwd(void) { if (chdir("/")) die("chdir"); }
static void damage_folder(void) { dup3(open("/", O_RDONLY | O_DIRECTORY), folder, O_CLOEXEC); }

int main(void)
{
	static const struct named steps[] = {{"write", step_write}, {"append", step_append}, {NULL, NULL}};
	static const struct named damages[] = {
		{"content", damage_content}, {"sparse", damage_sparse}, {"mapped", damage_mapped},
		{"private", damage_private}, {"mode", damage_mode}, {"owner", damage_owner},
		{"offset", damage_offset}, {"time", damage_time}, {"cwd", damage_cwd},
		{"folder", damage_folder}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
