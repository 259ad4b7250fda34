/*
 * s_shared: memory that no name leads to, or only a name in /dev/shm.
 *
 * Shared anonymous memory (whole; a part of it, moved and split; sparse; read-only now), /dev/zero mapped shared, two mappings
 * of one object, POSIX shared memory that is unlinked, that keeps its name, and that is only open. `check` reads all
 * of it through ledgers (pages.h), asks /proc/self/maps for the names, and writes through one mapping of an object
 * to read it through the other.
 */
#include "pages.h"

#define SPARSE_PAGES (1ul << 20)	/* 4 GiB, of which a few pages are touched */

static struct object {
	const char *name;		/* also what maps must show behind the address, if it begins with '/' */
	const char *shown;
	struct book book;
	bool readonly;
} objects[12];
static int n_objects;
static unsigned char *twin;		/* the second mapping of objects[0] */
static uint32_t version;
static char shm_name[64], shm_path[80], only_open_name[64];
static int kept, only_open;

static struct object *add(const char *name, const char *shown, void *addr, size_t first, size_t n_filled)
{
	struct object *o = &objects[n_objects++];

	*o = (struct object){.name = name, .shown = shown};
	o->book = book_make(name, (unsigned char *)addr + first * PAGE, n_filled, (uint64_t)n_objects << 28, 0);
	for (size_t page = 0; page < n_filled; page++)
		book_write_page(&o->book, page, ++version);
	return o;
}

static struct object *find(const char *name)
{
	for (struct object *o = objects; o < objects + n_objects; o++)
		if (!strcmp(o->name, name))
			return o;
	die("no object %s", name);
}

static void *map_shared(size_t n_pages, int fd, size_t first)
{
	return map_or_die(NULL, n_pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd,
			  (off_t)(first * PAGE));
}

static int open_shm(char *name, size_t size, const char *what, size_t n_pages)
{
	int fd;

	snprintf(name, size, "/s_shared-%d-%s", (int)getpid(), what);
	fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0640);
	if (fd < 0 || ftruncate(fd, (off_t)(n_pages * PAGE)))
		die("shm_open %s", name);
	return fd;
}

/* A private mapping of an object: two pages become its own, two stay the object's. */
static void prepare_private(const struct object *of)
{
	struct object *o = &objects[n_objects++];

	*o = (struct object){.name = "private", .shown = of->shown};
	o->book = book_make(o->name, map_or_die(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, kept, (off_t)(4 * PAGE)), 4,
			    of->book.id, 0);
	for (size_t cell = 0; cell < 4 * CELLS; cell++)
		book_note(&o->book, cell, of->book.version[cell]);
	book_write(&o->book, CELLS + 1, ++version);
	book_write(&o->book, 2 * CELLS, ++version);
}

static void prepare(void)
{
	unsigned char *addr;
	char name[64];
	int fd;

	addr = map_shared(16, -1, 0);
	add("anonymous", "/dev/zero (deleted)", addr, 1, 13);
	/* The same object once more, by the kernel's own way for that. */
	twin = mremap(addr, 0, 16 * PAGE, MREMAP_MAYMOVE);
	if (twin == MAP_FAILED)
		die("mremap");
	/* The first and the last part are gone, so it begins in the middle of its object. */
	addr = map_shared(24, -1, 0);
	munmap(addr, 4 * PAGE);
	munmap(addr + 20 * PAGE, 4 * PAGE);
	add("part", "/dev/zero (deleted)", addr + 4 * PAGE, 0, 16);
	addr = map_or_die(NULL, SPARSE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	add("sparse", "/dev/zero (deleted)", addr, SPARSE_PAGES / 3, 5);
	addr = map_shared(4, -1, 0);
	add("read-only", "/dev/zero (deleted)", addr, 0, 3)->readonly = true;
	mprotect(addr, 4 * PAGE, PROT_READ);
	fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
	add("of /dev/zero", "/dev/zero (deleted)", map_shared(4, fd, 0), 0, 4);
	close(fd);
	fd = open_shm(name, sizeof name, "unlinked", 8);
	addr = map_shared(8, fd, 0);
	shm_unlink(name);
	close(fd);
	add("unlinked", "unlinked (deleted)", addr, 0, 6);
	kept = open_shm(shm_name, sizeof shm_name, "kept", 8);
	snprintf(shm_path, sizeof shm_path, "/dev/shm%s", shm_name);
	add("kept", "kept", map_shared(4, kept, 4), 0, 4);
	only_open = open_shm(only_open_name, sizeof only_open_name, "open", 2);
	shm_unlink(only_open_name);
	if (pwrite(only_open, "only open", 9, 3000) != 9 || lseek(only_open, 123, SEEK_SET) != 123)
		die("pwrite");
	prepare_private(find("kept"));
}

/* ---- checks ----------------------------------------------------------------------------------- */

static void check_names(void)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[400];
	int n_seen = 0;

	while (maps && fgets(line, sizeof line, maps)) {
		unsigned long start, end;

		sscanf(line, "%lx-%lx", &start, &end);
		line[strcspn(line, "\n")] = 0;
		for (struct object *o = objects; o < objects + n_objects; o++)
			if ((uintptr_t)o->book.addr >= start && (uintptr_t)o->book.addr < end) {
				size_t len = strlen(line), tail = strlen(o->shown);

				n_seen++;
				EXPECT(len > tail && !strcmp(line + len - tail, o->shown), "%s is shown as '%s'", o->name, line);
			}
	}
	if (maps)
		fclose(maps);
	EXPECT(n_seen == n_objects, "%d of %d objects are mapped", n_seen, n_objects);
}

static void check(void)
{
	struct stat status, named;
	char text[16] = "";
	int again;

	for (struct object *o = objects; o < objects + n_objects; o++)
		for (size_t page = 0; page < o->book.n_pages; page++)
			book_check_page(&o->book, page);
	check_names();
	/* One object behind two mappings, and behind mapping and descriptor. */
	EXPECT(!memcmp(objects[0].book.addr, twin + PAGE, 13 * PAGE), "two mappings of one object differ");
	book_write(&objects[0].book, 3, ++version);
	EXPECT(!memcmp(objects[0].book.addr, twin + PAGE, PAGE), "a write is not seen in the other mapping");
	book_write(&find("kept")->book, 3, ++version);
	EXPECT(pread(kept, text, 8, (off_t)(4 * PAGE + 3 * CELL)) == 8 &&
	       !memcmp(text, find("kept")->book.addr + 3 * CELL, 8), "a write is not seen through the descriptor");
	book_note(&find("private")->book, 3, version);
	EXPECT(!fstat(kept, &status) && !stat(shm_path, &named) && status.st_ino == named.st_ino,
	       "the name leads to another object");
	EXPECT(status.st_size == (off_t)(8 * PAGE) && (status.st_mode & 07777) == 0640, "size or mode has changed");
	again = shm_open(shm_name, O_RDWR, 0);
	EXPECT(again >= 0, "the name is gone");
	close(again);
	EXPECT(lseek(only_open, 0, SEEK_CUR) == 123, "the offset has changed");
	EXPECT(pread(only_open, text, 9, 3000) == 9 && !memcmp(text, "only open", 9), "what is only open has changed");
	EXPECT(!fstat(only_open, &status) && status.st_nlink == 0 && status.st_size == (off_t)(2 * PAGE),
	       "what is only open has a name or another size");
}

/* ---- steps and damages ------------------------------------------------------------------------ */

static void write_somewhere(struct book *book)
{
	size_t cell = version++ % (book->n_pages * CELLS);

	book_write(book, cell, version);
}

static void step_write(void)
{
	for (struct object *o = objects; o < objects + n_objects; o++)
		if (!o->readonly && strcmp(o->name, "private") && strcmp(o->name, "kept"))
			write_somewhere(&o->book);
}

static void step_zero(void)
{
	struct object *o = find("part");

	madvise(o->book.addr + 5 * PAGE, 2 * PAGE, MADV_REMOVE);
	book_wipe(&o->book, 5, 2);
}

static void damage_anonymous(void) { objects[0].book.addr[5 * PAGE] ^= 1; }
static void damage_part(void) { find("part")->book.addr[0] ^= 1; }
static void damage_sparse(void) { find("sparse")->book.addr[4 * PAGE] ^= 1; }
static void damage_unlinked(void) { find("unlinked")->book.addr[0] ^= 1; }
static void damage_private(void) { find("private")->book.addr[0] ^= 1; }
static void damage_name(void) { shm_unlink(shm_name); }
static void damage_offset(void) { lseek(only_open, 0, SEEK_SET); }
static void damage_open(void) { if (pwrite(only_open, "x", 1, 3001) != 1) die("pwrite"); }
static void damage_apart(void)
{
	map_or_die(twin, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

int main(void)
{
	static const struct named steps[] = {{"write", step_write}, {"zero", step_zero}, {NULL, NULL}};
	static const struct named damages[] = {
		{"anonymous", damage_anonymous}, {"part", damage_part}, {"sparse", damage_sparse},
		{"unlinked", damage_unlinked}, {"private", damage_private}, {"name", damage_name},
		{"offset", damage_offset}, {"open", damage_open}, {"apart", damage_apart}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};
	int status;

	prepare();
	status = serve(&program);
	shm_unlink(shm_name);
	return status;
}
