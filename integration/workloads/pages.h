/*
 * Pages that can be verified: contents that follow from (identity, version), and a ledger of the
 * version that each cell of a range of pages has now. The ledger is memory of the program as well: after
 * a restore, pages and ledger must be of the same moment. Its sum lives elsewhere than the ledger, so
 * that a ledger page from another moment is seen too.
 */
#ifndef PAGES_H
#define PAGES_H

#include "workload.h"

#define CELL 512ul			/* the unit that has a version; a page is eight of them */
#define CELLS (PAGE / CELL)
#define HUGE_PAGES 512ul		/* of a transparent huge page */

/* ---- contents that can be predicted ------------------------------------------------------------ */

static uint64_t content_seed = 1;

static inline bool content_is_byte(const void *cell, unsigned char byte)
{
	const unsigned char *bytes = cell;

	for (size_t i = 0; i < CELL; i++)
		if (bytes[i] != byte)
			return false;
	return true;
}

/* A version of 0 is all zeroes: the contents of a page that nobody has written. */
static inline uint64_t content_word(uint64_t id, uint32_t version, size_t word)
{
	return version ? mix64(mix64(content_seed ^ id << 20) + ((uint64_t)version << 20) + word) : 0;
}

static inline void content_fill(void *cell, uint64_t id, uint32_t version)
{
	uint64_t *words = cell;

	for (size_t i = 0; i < CELL / 8; i++)
		words[i] = content_word(id, version, i);
}

static inline bool content_is(const void *cell, uint64_t id, uint32_t version)
{
	const uint64_t *words = cell;

	for (size_t i = 0; i < CELL / 8; i++)
		if (words[i] != content_word(id, version, i))
			return false;
	return true;
}

/* ---- the ledger: which version each cell of a range of pages has now --------------------------- */

enum { FREED = 1 };			/* page flag: MADV_FREE, not written since: old or zero */
#define FROM_FILE 0x80000000u		/* version bit: holds cell (version & ~bit) of the data file */
#define FILLED 0x40000000u		/* version bit: every byte is (version & 0xff) */
#define FILE_ID (1ull << 40)		/* content identity of the data file's first cell */

struct book {
	const char *name;
	unsigned char *addr;		/* of page 0, whether that exists or not */
	size_t first, end;		/* the pages that exist now: [first, end) */
	size_t n_pages;			/* that may exist */
	uint64_t id;			/* content identity of the first cell, wherever it is mapped */
	uint32_t base;			/* version of a page that was never written */
	uint32_t *version;
	uint8_t *flags;
	uint64_t sum;			/* over all versions, kept step by step and compared with a recount */
};

static inline struct book book_make(const char *name, void *addr, size_t n_pages, uint64_t id,
				    uint32_t base)
{
	size_t table = n_pages * CELLS * sizeof(uint32_t);
	unsigned char *ledger = map_anonymous((table + n_pages) / PAGE + 1);
	struct book book = {.name = name, .addr = addr, .end = n_pages, .n_pages = n_pages,
			    .id = id, .base = base, .version = (uint32_t *)(void *)ledger,
			    .flags = ledger + table};

	for (size_t cell = 0; cell < n_pages * CELLS; cell++) {
		book.version[cell] = base;
		book.sum += mix64((id + cell) ^ (uint64_t)base << 44);
	}
	return book;
}

static inline unsigned char *book_page(const struct book *book, size_t page)
{
	return book->addr + page * PAGE;
}

static inline void book_note(struct book *book, size_t cell, uint32_t version)
{
	book->sum -= mix64((book->id + cell) ^ (uint64_t)book->version[cell] << 44);
	book->version[cell] = version;
	book->sum += mix64((book->id + cell) ^ (uint64_t)version << 44);
}

/* The pages have lost what was written to them. */
static inline void book_wipe(struct book *book, size_t page, size_t n)
{
	for (size_t cell = page * CELLS; cell < (page + n) * CELLS; cell++)
		book_note(book, cell, book->base);
	memset(book->flags + page, 0, n);
}

static inline bool cell_is(const struct book *book, size_t cell, uint32_t version)
{
	const void *at = book->addr + cell * CELL;

	if (version & FROM_FILE)
		return content_is(at, FILE_ID + (version & ~FROM_FILE), 1);
	if (version & FILLED)
		return content_is_byte(at, (unsigned char)version);
	return content_is(at, book->id + cell, version);
}

/* Verify one page against its versions. The kernel may drop a freed page while it is read, cell by
 * cell upwards: then a tail of zeroes follows a head of old cells. */
static inline bool book_check_page(const struct book *book, size_t page)
{
	bool may_drop = book->flags[page] & FREED, dropped = false;

	for (size_t cell = page * CELLS; cell < (page + 1) * CELLS; cell++) {
		if (!dropped && cell_is(book, cell, book->version[cell]))
			continue;
		dropped = may_drop && cell_is(book, cell, 0);
		if (!dropped) {
			fail("%s page %zu at %p cell %zu is not version %u (page flags %u, word 0 is %lx)",
			     book->name, page, (void *)book_page(book, page), cell % CELLS,
			     book->version[cell], book->flags[page],
			     *(unsigned long *)(void *)(book->addr + cell * CELL));
			return false;
		}
	}
	return true;
}

static inline void book_check(const struct book *book)
{
	uint64_t sum = 0;

	for (size_t page = book->first; page < book->end; page++)
		if (!book_check_page(book, page))
			return;
	for (size_t cell = 0; cell < book->n_pages * CELLS; cell++)
		sum += mix64((book->id + cell) ^ (uint64_t)book->version[cell] << 44);
	EXPECT(sum == book->sum, "%s: the ledger does not agree with its sum", book->name);
}

/* One cell of a freed page was written: the page cannot vanish any more. See what became of the rest. */
static inline void book_settle(struct book *book, size_t page, size_t written)
{
	int n_old = 0, n_zero = 0;

	book->flags[page] &= (uint8_t)~FREED;
	for (size_t cell = page * CELLS; cell < (page + 1) * CELLS; cell++) {
		uint32_t old = book->version[cell];

		if (cell == written || old == 0)
			continue;
		if (cell_is(book, cell, old)) {
			n_old++;
		} else {
			n_zero++;
			book_note(book, cell, 0);
		}
	}
	EXPECT(!n_old || !n_zero, "%s page %zu was freed in part: %d old cells, %d zero", book->name,
	       page, n_old, n_zero);
}

/* The cell has new contents, whoever wrote them. */
static inline void book_written(struct book *book, size_t cell, uint32_t version)
{
	book_note(book, cell, version);
	if (book->flags[cell / CELLS] & FREED)
		book_settle(book, cell / CELLS, cell);
}

static inline void book_write(struct book *book, size_t cell, uint32_t version)
{
	content_fill(book->addr + cell * CELL, book->id + cell, version);
	book_written(book, cell, version);
}

/* Flip a byte behind the ledger's back, whatever the page's protection is. */
static inline void book_damage(const struct book *book, size_t page)
{
	unsigned char *at = book_page(book, page) + 1234, byte;
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

	if (pread(fd, &byte, 1, (off_t)(uintptr_t)at) != 1)
		die("read /proc/self/mem");
	byte ^= 0x10;
	if (pwrite(fd, &byte, 1, (off_t)(uintptr_t)at) != 1)
		die("write /proc/self/mem");
	close(fd);
}

static inline void book_write_page(struct book *book, size_t page, uint32_t version)
{
	for (size_t cell = page * CELLS; cell < (page + 1) * CELLS; cell++)
		book_write(book, cell, version);
}

/* Pages at an address where they can be transparent huge ones, and the advice that they should. */
static inline void *map_huge(size_t n_pages)
{
	size_t slop = HUGE_PAGES * PAGE;
	unsigned char *got = map_anonymous(n_pages + HUGE_PAGES);
	unsigned char *at = (unsigned char *)(((uintptr_t)got + slop - 1) & ~(slop - 1));

	if (at > got)
		munmap(got, (size_t)(at - got));
	munmap(at + n_pages * PAGE, slop - (size_t)(at - got));
	madvise(at, n_pages * PAGE, MADV_HUGEPAGE);
	return at;
}

/* Write PROGRAM-PID.data into the working directory and return it open for reading. It stays there: a
 * later restore needs it again. Its cell number k has the identity FILE_ID + k and version 1. */
static inline int make_data_file(const char *program, size_t n_pages)
{
	unsigned char page[PAGE];
	char path[64];
	int fd;

	snprintf(path, sizeof path, "%s-%d.data", program, (int)getpid());
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		die("%s", path);
	for (size_t cell = 0; cell < n_pages * CELLS; cell++) {
		content_fill(page + cell % CELLS * CELL, FILE_ID + cell, 1);
		if (cell % CELLS == CELLS - 1)
			write_all(fd, page, PAGE);
	}
	close(fd);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		die("%s", path);
	return fd;
}

#endif
