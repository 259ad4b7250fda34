/*
 * s_memfd: memfds, open and mapped, sealed and not.
 *
 * Open only (a size that is no whole page, an offset, another mode), mapped only, both, mapped privately, sparse, one
 * description with two numbers beside a second description, with every seal (those that forbid writing with the
 * mappings that they allow), without leave to be sealed, and with bytes behind the end of the file, which only a mapping
 * shows. `check` asks for content, size, mode, seals, offsets and names, and tries what the seals forbid.
 */
#include "pages.h"

#ifndef F_ADD_SEALS
#define F_ADD_SEALS 1033
#define F_GET_SEALS 1034
#endif
#define SEAL 1
#define SHRINK 2
#define GROW 4
#define WRITE 8
#define FUTURE_WRITE 16
#define EXEC 32
#define NOEXEC_SEAL 8u			/* a flag of memfd_create; Linux 6.3 */
#define SPARSE_BYTES (1l << 32)

static struct memory {
	const char *name;		/* that it was given */
	int fd;				/* -1: only mapped */
	off_t size, offset;
	mode_t mode;
	int seals;
	struct book book;		/* no pages: not mapped, and holds `text` at `at` */
	bool readonly, private;
	off_t at;
} memories[16];
static int n_memories, other_number, other_file;
static uint32_t version;
static const char text[] = "what a memfd holds";

static struct memory *find(const char *name)
{
	for (struct memory *m = memories; m < memories + n_memories; m++)
		if (!strcmp(m->name, name))
			return m;
	die("no memory %s", name);
}

static struct memory *make(const char *name, unsigned flags, off_t size)
{
	struct memory *m = &memories[n_memories];
	struct stat status;

	m->fd = memfd_create(name, MFD_CLOEXEC | flags);
	if (m->fd < 0 && flags & NOEXEC_SEAL)
		return NULL;		/* an older kernel */
	if (m->fd < 0 || ftruncate(m->fd, size) || fstat(m->fd, &status))
		die("memfd_create %s", name);
	n_memories++;
	m->name = name;
	m->size = size;
	m->mode = status.st_mode & 07777;
	m->seals = fcntl(m->fd, F_GET_SEALS);
	return m;
}

static struct memory *make_open(const char *name, unsigned flags, off_t size, off_t at)
{
	struct memory *m = make(name, flags, size);

	m->at = at;
	if (pwrite(m->fd, text, sizeof text, at) != sizeof text)
		die("pwrite");
	return m;
}

static struct memory *make_mapped(const char *name, unsigned flags, size_t n_pages, int kind)
{
	struct memory *m = make(name, flags, (off_t)(n_pages * PAGE));
	void *addr = map_or_die(NULL, n_pages * PAGE, PROT_READ | PROT_WRITE, kind, m->fd, 0);

	m->book = book_make(name, addr, n_pages - 1, (uint64_t)n_memories << 24, 0);
	m->private = kind == MAP_PRIVATE;
	for (size_t page = 0; page < m->book.n_pages; page++)
		book_write_page(&m->book, page, ++version);
	return m;
}

static void seal(struct memory *m, int seals)
{
	if (fcntl(m->fd, F_ADD_SEALS, seals))
		die("F_ADD_SEALS %s", m->name);
	m->seals = fcntl(m->fd, F_GET_SEALS);
}

static void prepare(void)
{
	struct memory *m;
	char path[40];

	m = make_open("open", MFD_ALLOW_SEALING, 3 * PAGE + 77, 2 * PAGE + 1000);
	m->offset = lseek(m->fd, 321, SEEK_SET);
	fchmod(m->fd, m->mode = 0640);
	other_number = fcntl(m->fd, F_DUPFD, 50);
	snprintf(path, sizeof path, "/proc/self/fd/%d", m->fd);
	other_file = open(path, O_RDONLY | O_CLOEXEC);
	if (other_file < 0 || lseek(other_file, 5, SEEK_SET) != 5)
		die("open %s", path);
	make_open("never to be sealed", 0, 100, 50);
	make_open("", 0, PAGE, 0);
	make_open("odd (deleted)\n\\name", 0, PAGE, 4000);
	make_open("sparse", 0, SPARSE_BYTES, SPARSE_BYTES / 2 + 17);
	m = make("empty", 0, 0);
	m->at = -1;
	m = make_mapped("mapped only", 0, 9, MAP_SHARED);
	close(m->fd);
	m->fd = -1;
	make_mapped("mapped and open", 0, 5, MAP_SHARED);
	m = make_mapped("mapped privately", 0, 5, MAP_PRIVATE);
	if (pwrite(m->fd, text, sizeof text, 4 * PAGE) != sizeof text)	/* the page that is the file's still */
		die("pwrite");
	m->at = 4 * PAGE;
	m = make_mapped("behind the end", 0, 2, MAP_SHARED);
	if (ftruncate(m->fd, m->size = 2 * PAGE - 100))
		die("ftruncate");
	memcpy(m->book.addr + 2 * PAGE - 50, text, sizeof text);
	m = make_open("sealed in size", MFD_ALLOW_SEALING, PAGE, 10);
	seal(m, SHRINK | GROW | SEAL);
	m = make_open("sealed for good", MFD_ALLOW_SEALING, 2 * PAGE, 10);
	seal(m, SHRINK | GROW | WRITE | SEAL);
	m->book = book_make(m->name, map_or_die(NULL, 2 * PAGE, PROT_READ, MAP_PRIVATE, m->fd, 0), 0, 0, 0);
	m->readonly = true;
	m = make_mapped("sealed later", MFD_ALLOW_SEALING, 4, MAP_SHARED);
	seal(m, SHRINK | FUTURE_WRITE | SEAL);
	m->readonly = true;
	m = make("not to run", NOEXEC_SEAL, PAGE);
	if (m)
		m->at = -1;
}

/* ---- checks ----------------------------------------------------------------------------------- */

static void check_open(const struct memory *m)
{
	char shown[128], path[40], must[128], found[sizeof text] = "";
	struct stat status;
	ssize_t n;

	snprintf(path, sizeof path, "/proc/self/fd/%d", m->fd);
	snprintf(must, sizeof must, "/memfd:%s (deleted)", m->name);
	n = readlink(path, shown, sizeof shown - 1);
	shown[n > 0 ? n : 0] = 0;
	EXPECT(!strcmp(shown, must), "'%s' is shown as '%s'", m->name, shown);
	EXPECT(!fstat(m->fd, &status) && status.st_size == m->size, "'%s' has %ld bytes, not %ld", m->name,
	       (long)status.st_size, (long)m->size);
	EXPECT((status.st_mode & 07777) == m->mode, "'%s' has mode %o, not %o", m->name, status.st_mode & 07777, m->mode);
	EXPECT(status.st_blocks < 200, "'%s' takes %ld blocks", m->name, (long)status.st_blocks);
	EXPECT(fcntl(m->fd, F_GET_SEALS) == m->seals, "'%s' has seals %x, not %x", m->name, fcntl(m->fd, F_GET_SEALS),
	       m->seals);
	EXPECT(lseek(m->fd, 0, SEEK_CUR) == m->offset, "'%s' is at byte %ld, not %ld", m->name,
	       (long)lseek(m->fd, 0, SEEK_CUR), (long)m->offset);
	if (!m->book.n_pages && m->at >= 0)
		EXPECT(pread(m->fd, found, sizeof text, m->at) == sizeof text && !memcmp(found, text, sizeof text),
		       "'%s' holds '%.18s'", m->name, found);
	EXPECT(m->size == 0 || m->at == 0 || m->book.n_pages || (pread(m->fd, found, 1, 0) == 1 && !found[0]),
	       "'%s' does not begin with zeroes", m->name);
	if (m->readonly)
		EXPECT(pwrite(m->fd, "", 1, 0) < 0 && errno == EPERM, "'%s' can be written", m->name);
	if (m->readonly)
		EXPECT(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0) == MAP_FAILED && errno == EPERM,
		       "'%s' can be mapped to be written", m->name);
}

static void check(void)
{
	for (struct memory *m = memories; m < memories + n_memories; m++) {
		for (size_t page = 0; page < m->book.n_pages; page++)
			book_check_page(&m->book, page);
		if (m->fd >= 0)
			check_open(m);
	}
	EXPECT(!memcmp(find("behind the end")->book.addr + 2 * PAGE - 50, text, sizeof text),
	       "what is behind the end of the file has changed");
	EXPECT(!memcmp(find("mapped privately")->book.addr + 4 * PAGE, text, sizeof text),
	       "a private mapping does not show what the file holds");
	EXPECT(lseek(find("open")->fd, 7, SEEK_SET) == 7 && lseek(other_number, 0, SEEK_CUR) == 7,
	       "two numbers of one description have two offsets");
	EXPECT(lseek(other_file, 0, SEEK_CUR) == 5, "two descriptions have one offset");
	EXPECT(write(other_file, "", 1) < 0 && errno == EBADF, "what was opened for reading can be written");
	lseek(other_number, find("open")->offset, SEEK_SET);
	book_write(&find("mapped and open")->book, 2, ++version);
	EXPECT(pread(find("mapped and open")->fd, (char[8]){0}, 8, 2 * CELL) == 8, "pread");
}

/* ---- steps and damages ------------------------------------------------------------------------ */

static void step_write(void)
{
	for (struct memory *m = memories; m < memories + n_memories; m++)
		if (m->book.n_pages) {
			size_t cell = version++ % (m->book.n_pages * CELLS);

			book_write(&m->book, cell, version);
		}
}

static void step_grow(void)
{
	struct memory *m = find("open");

	m->size += 1000;
	if (ftruncate(m->fd, m->size))
		die("ftruncate");
}

static void step_seal(void)
{
	seal(find("open"), SHRINK);
}

static void damage_content(void) { if (pwrite(find("sparse")->fd, "x", 1, find("sparse")->at + 3) != 1) die("pwrite"); }
static void damage_mapped(void) { find("mapped only")->book.addr[7 * PAGE] ^= 1; }
static void damage_behind(void) { find("behind the end")->book.addr[2 * PAGE - 49] ^= 1; }
static void damage_size(void) { if (ftruncate(find("open")->fd, 3 * PAGE)) die("ftruncate"); }
static void damage_mode(void) { fchmod(find("open")->fd, 0600); }
static void damage_seals(void) { fcntl(find("open")->fd, F_ADD_SEALS, SEAL); }
static void damage_offset(void) { lseek(find("open")->fd, 1, SEEK_CUR); }
static void damage_name(void) { dup3(find("")->fd, find("never to be sealed")->fd, O_CLOEXEC); }
static void damage_sharing(void) { dup3(other_file, other_number, O_CLOEXEC); lseek(other_file, 5, SEEK_SET); }

int main(void)
{
	static const struct named steps[] = {{"write", step_write}, {"grow", step_grow}, {"seal", step_seal}, {NULL, NULL}};
	static const struct named damages[] = {
		{"content", damage_content}, {"mapped", damage_mapped}, {"behind", damage_behind},
		{"size", damage_size}, {"mode", damage_mode}, {"seals", damage_seals},
		{"offset", damage_offset}, {"name", damage_name}, {"sharing", damage_sharing}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
