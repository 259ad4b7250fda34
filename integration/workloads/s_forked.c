/*
 * s_forked: private memory that a parent shares with its descendants until somebody writes.
 *
 * A parent, two children and a grandchild (of the second). All pages were written before the forks; what each process has done
 * to its own since then is noted in its own ledger, which is such memory too:
 *
 *	one mapping   [same][child][parent][hole][readonly][dropped][anew][moved][shared][file ...]
 *
 * `same` nobody touches any more; of the others each process writes, unmaps, protects, drops, maps anew, moves or replaces
 * some. Behind them lie a private file mapping, memory that is locked, wiped on fork, or not inherited, and a break that
 * children have grown. Each process obeys a pipe and answers with what is wrong, as it sees it.
 */
#include "pages.h"

enum { AREA = 12, N_OTHERS = 3, ANSWER = 400 };
enum area { SAME, CHILD, PARENT, HOLE, READONLY, DROPPED, ANEW, MOVED, SHARED, FILED, LOCKED, WIPED, LEFT, BREAK, N_AREAS };

static const char *const names[N_AREAS] = {"same", "child", "parent", "hole", "readonly", "dropped", "anew", "moved", "shared",
	"file", "locked", "wiped", "left", "break"};
static struct book books[N_AREAS];
static bool gone[N_AREAS];	/* `gone`: AREA/3 pages from the second third on are not mapped */
static int asks[N_OTHERS][2], answers[N_OTHERS][2], who = -1;
static uint32_t version = 1;

static unsigned char *page_of(enum area area, size_t page) { return book_page(&books[area], page); }

static void write_pages(enum area area, size_t first, size_t step)
{
	for (size_t page = first; page < books[area].end; page += step)
		book_write_page(&books[area], page, ++version);
}

/* ---- what is as it must be ---------------------------------------------------------------------- */

static bool is_mapped(unsigned char *page)
{
	unsigned char found;

	return mincore(page, PAGE, &found) == 0;
}

static void check_own(void)
{
	for (enum area area = 0; area < N_AREAS; area++) {
		for (size_t page = 0; page < books[area].end; page++) {
			bool absent = gone[area] && page >= AREA / 3 && page < 2 * AREA / 3;

			EXPECT(is_mapped(page_of(area, page)) != absent, "process %d: page %zu of %s", who, page, names[area]);
			if (!absent)
				book_check_page(&books[area], page);
		}
	}
	/* Each of them writes to its own, which nobody else may see. */
	write_pages(CHILD, (size_t)(who + 1), 5);
	if (books[BREAK].end)
		EXPECT(sbrk(0) == page_of(BREAK, books[BREAK].end), "process %d has another break", who);
}

static void step_own(void)
{
	write_pages(who < 0 ? PARENT : CHILD, (size_t)(who + 1), 4);
	write_pages(FILED, 7, 4);
	write_pages(SHARED, 2, 3);
}

/* Other pages are dropped, and written, than before; both in the same process. */
static void drop_own(void)
{
	size_t page = 1 + version % (AREA - 2);

	madvise(page_of(DROPPED, page), PAGE, MADV_DONTNEED);
	book_wipe(&books[DROPPED], page, 1);
	book_write_page(&books[DROPPED], page + 1, ++version);
	version++;
}

/* ---- the descendants ---------------------------------------------------------------------------- */

static void serve_parent(void)
{
	char order, said[ANSWER];

	while (read(asks[who][0], &order, 1) == 1) {
		memset(said, 0, sizeof said);
		if (order == 'c') {
			check_own();
			if (atomic_load(&verdict.state) == 2)
				memcpy(said, verdict.why, sizeof said - 1);
		} else if (order == 's') {
			step_own();
		} else if (order == 'd') {
			drop_own();
		} else {
			*page_of(SAME, AREA / 2) ^= 1;
		}
		write_all(answers[who][1], said, sizeof said);
	}
	_exit(0);
}

static void unmap_part(enum area area)
{
	munmap(page_of(area, AREA / 3), AREA / 3 * PAGE);
	gone[area] = true;
}

static void grow_break(void)
{
	books[BREAK].addr = sbrk(AREA * PAGE);
	books[BREAK].end = AREA;
	write_pages(BREAK, 1, 2);
}

static void wipe(enum area area) { book_wipe(&books[area], 0, AREA); }

static void be_first(void)
{
	write_pages(CHILD, 0, 3);
	unmap_part(HOLE);
	mprotect(page_of(READONLY, 2), 4 * PAGE, PROT_READ);
	mprotect(page_of(READONLY, 7), 2 * PAGE, PROT_NONE);
	mprotect(page_of(READONLY, 7), 2 * PAGE, PROT_READ);
	madvise(page_of(DROPPED, 0), AREA / 2 * PAGE, MADV_DONTNEED);
	book_wipe(&books[DROPPED], 0, AREA / 2);
	write_pages(FILED, 1, 4);
	grow_break();
	madvise(page_of(LOCKED, 0), PAGE, MADV_DONTNEED);
	book_wipe(&books[LOCKED], 0, 1);
}

static void be_second(void)
{
	map_or_die(page_of(ANEW, 0), AREA * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	wipe(ANEW);
	write_pages(ANEW, 3, 4);
	books[MOVED].addr = mremap(page_of(MOVED, 0), AREA * PAGE, 2 * AREA * PAGE, MREMAP_MAYMOVE);
	if (page_of(MOVED, 0) == MAP_FAILED)
		die("mremap");
	munmap(page_of(MOVED, AREA), AREA * PAGE);
	map_or_die(page_of(SHARED, 0), AREA * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	wipe(SHARED);
	write_pages(SHARED, 0, 2);
	/* What the parent wrote is the file's again. */
	madvise(page_of(FILED, 4), 4 * PAGE, MADV_DONTNEED);
	book_wipe(&books[FILED], 4, 4);
	for (size_t cell = 4 * CELLS; cell < 8 * CELLS; cell++)
		book_note(&books[FILED], cell, FROM_FILE | (uint32_t)cell);
	unmap_part(READONLY);
}

static void become(int n)
{
	who = n;
	wipe(WIPED);
	books[LEFT].end = 0;
	if (n == 0)
		be_first();
	if (n == 1)
		be_second();
	if (n == 2) {
		/* It is the second's child: what that shares is written here too. */
		map_or_die(page_of(SHARED, 0), AREA * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		wipe(SHARED);
		write_pages(CHILD, 1, 3);
		grow_break();
	}
}

static void ask_all(char order)
{
	for (int n = 0; n < N_OTHERS; n++) {
		char said[ANSWER] = "";

		write_all(asks[n][1], &order, 1);
		if (read(answers[n][0], said, sizeof said) != (ssize_t)sizeof said)
			fail("process %d does not answer", n);
		else if (*said)
			fail("%s", said);
	}
}

/* ---- preparation ---------------------------------------------------------------------------------- */

static void map_file(void)
{
	unsigned char cell[CELL];
	char path[64];
	int fd;

	snprintf(path, sizeof path, "s_forked-%d.file", (int)getpid());
	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	for (size_t n = 0; n < AREA * CELLS; n++) {
		content_fill(cell, FILE_ID + n, 1);
		write_all(fd, cell, CELL);
	}
	books[FILED] = book_make("file", map_or_die(NULL, AREA * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0), AREA, 50 << 20, 0);
	for (size_t n = 0; n < AREA * CELLS; n++)
		book_note(&books[FILED], n, FROM_FILE | (uint32_t)n);
	write_pages(FILED, 0, 3);
	close(fd);
}

static void prepare(void)
{
	unsigned char *whole = map_anonymous(AREA * FILED);

	for (enum area area = 0; area < BREAK; area++) {
		unsigned char *at = area < FILED ? whole + area * AREA * PAGE : map_anonymous(AREA);

		if (area == FILED)
			map_file();
		else
			books[area] = book_make(names[area], at, AREA, (uint64_t)(area + 1) << 20, 0);
		write_pages(area, area == FILED, 1 + (area == FILED));
	}
	books[BREAK] = book_make("break", NULL, AREA, 99 << 20, 0);
	books[BREAK].end = 0;
	madvise(page_of(WIPED, 0), AREA * PAGE, MADV_WIPEONFORK);
	madvise(page_of(LEFT, 0), AREA * PAGE, MADV_DONTFORK);
	if (mlock(page_of(LOCKED, 0), AREA * PAGE))
		die("mlock");
	for (int n = 0; n < N_OTHERS; n++)
		if (pipe2(asks[n], O_CLOEXEC) || pipe2(answers[n], O_CLOEXEC))
			die("pipe2");
	for (int n = 0; n < 2; n++)
		if (fork() == 0) {
			for (int end = 0; end < N_OTHERS; end++)
				close(asks[end][1]);
			become(n);
			if (n == 1 && fork() == 0)
				become(2);
			serve_parent();
		}
	for (int n = 0; n < N_OTHERS; n++) {
		close(asks[n][0]);
		close(answers[n][1]);
	}
	write_pages(PARENT, 0, 2);
	unmap_part(DROPPED);
	mprotect(page_of(SHARED, 0), 3 * PAGE, PROT_READ);
	mprotect(page_of(SHARED, 0), 3 * PAGE, PROT_READ | PROT_WRITE);
	/* Ready when all the others are what they become. */
	ask_all('c');
}

static void check(void)
{
	check_own();
	ask_all('c');
}

static void step_write(void)
{
	step_own();
	ask_all('s');
}

static void step_drop(void) { ask_all('d'); }
static void damage_parent(void) { book_damage(&books[SAME], 3); }
static void damage_child(void) { ask_all('x'); }
static void damage_hole(void)
{
	map_or_die(page_of(DROPPED, AREA / 3), PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

int main(void)
{
	static const struct named steps[] = {{"write", step_write}, {"drop", step_drop}, {NULL, NULL}};
	static const struct named damages[] = {
		{"parent", damage_parent}, {"child", damage_child}, {"hole", damage_hole}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
