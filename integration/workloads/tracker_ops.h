/*
 * Operations of the tracker cases that change one range of pages: by the program's own stores, by the
 * kernel, by another process, and by changing the mapping under them; and the log of what changed.
 */
#ifndef TRACKER_OPS_H
#define TRACKER_OPS_H

#include "pages.h"

#include <sys/socket.h>

#define MAX_BOOKS 32

static struct book books[MAX_BOOKS];
static size_t n_books;
static struct book *const pages = &books[0];
static uint32_t version;
static uint64_t rng = 42;
static int data_fd;

/* ---- what changed ----------------------------------------------------------------------------- */

enum kind { WRITTEN, GONE, FREE_LATER, MOVED, N_KINDS };
static const char *const KINDS[N_KINDS] = {"written", " gone", " freed", " moved"};
static struct { enum kind kind; unsigned char *page; } changes[512];
static size_t n_changes;

static void note(enum kind kind, const struct book *book, size_t page, size_t n)
{
	for (; n; n--, page++) {
		if (n_changes == LEN(changes))
			return;
		changes[n_changes].kind = kind;
		changes[n_changes++].page = book_page(book, page);
	}
}

static void written(char *argument)
{
	char text[LEN(changes) * 20];
	size_t len = 0;

	(void)argument;
	for (int kind = 0; kind < N_KINDS; kind++) {
		len += (size_t)sprintf(text + len, "%s", KINDS[kind]);
		for (size_t i = 0; i < n_changes; i++)
			if ((int)changes[i].kind == kind)
				len += (size_t)sprintf(text + len, " %lx", (uintptr_t)changes[i].page);
	}
	n_changes = 0;
	say("%s", text);
}

/* ---- common moves ----------------------------------------------------------------------------- */

static struct book *add_book(const char *name, void *addr, size_t n_pages, uint64_t id, uint32_t base)
{
	if (n_books == MAX_BOOKS)
		die("too many books");
	books[n_books] = book_make(name, addr, n_pages, id, base);
	return &books[n_books++];
}

/* Pages that all have content. */
static struct book *add_filled(const char *name, void *addr, size_t n_pages)
{
	struct book *book = add_book(name, addr, n_pages, (n_books + 1) << 20, 0);

	for (size_t page = 0; page < n_pages; page++)
		book_write_page(book, page, ++version);
	return book;
}

static size_t below(size_t limit)
{
	return next_random(&rng) % limit;
}

static void wrote(struct book *book, size_t cell, uint32_t what)
{
	book_written(book, cell, what);
	note(WRITTEN, book, cell / CELLS, 1);
}

static void write_cell(struct book *book, size_t page)
{
	book_write(book, page * CELLS + below(CELLS), ++version);
	note(WRITTEN, book, page, 1);
}

static void lost(struct book *book, size_t page, size_t n)
{
	book_wipe(book, page, n);
	note(GONE, book, page, n);
}

static void drop(size_t page, size_t n)
{
	if (madvise(book_page(pages, page), n * PAGE, MADV_DONTNEED))
		die("MADV_DONTNEED");
	lost(pages, page, n);
}

static void protect(size_t page, size_t n, int protection)
{
	if (mprotect(book_page(pages, page), n * PAGE, protection))
		die("mprotect");
}

/* The last page of the first book is never written, dropped or moved away: damage stays visible there. */
static size_t any_page(void)
{
	return below(pages->end - 1);
}

static void write_one(void)
{
	write_cell(pages, any_page());
}

static void prepare_plain(void)
{
	add_filled("pages", map_anonymous(64), 64);
}

/* ---- t_write, t_kernel_write, t_foreign_write -------------------------------------------------- */

static void write_many(void)
{
	for (int i = 0; i < 8; i++)
		write_one();
}

static void write_page(void)
{
	size_t page = any_page();

	book_write_page(pages, page, ++version);
	note(WRITTEN, pages, page, 1);
}

/* The bytes of the last cell of a page and of the first of the next one, as one piece. */
static size_t straddle(unsigned char both[2 * CELL])
{
	size_t cell = below(pages->end - 2) * CELLS + CELLS - 1;

	version++;
	content_fill(both, pages->id + cell, version);
	content_fill(both + CELL, pages->id + cell + 1, version);
	return cell;
}

static void straddled(size_t cell)
{
	wrote(pages, cell, version);
	wrote(pages, cell + 1, version);
}

static void write_across(void)
{
	unsigned char both[2 * CELL] __attribute__((aligned(8)));
	size_t cell = straddle(both);

	memcpy(pages->addr + cell * CELL, both, sizeof both);
	straddled(cell);
}

static void by_kernel(int fds[2], bool is_socket)
{
	unsigned char both[2 * CELL] __attribute__((aligned(8)));
	size_t cell = straddle(both);
	void *at = pages->addr + cell * CELL;
	ssize_t n;

	write_all(fds[1], both, sizeof both);
	n = is_socket ? recv(fds[0], at, sizeof both, MSG_WAITALL) : read(fds[0], at, sizeof both);
	if (n != (ssize_t)sizeof both)
		die("kernel wrote %zd bytes", n);
	close(fds[0]);
	close(fds[1]);
	straddled(cell);
}

static void kernel_read(void)
{
	int fds[2];

	if (pipe(fds))
		die("pipe");
	by_kernel(fds, false);
}

static void kernel_recv(void)
{
	int fds[2];

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds))
		die("socketpair");
	by_kernel(fds, true);
}

static void kernel_pread(void)
{
	size_t cell = any_page() * CELLS + below(CELLS);
	uint32_t from = (uint32_t)below(16 * CELLS);

	if (pread(data_fd, pages->addr + cell * CELL, CELL, from * (off_t)CELL) != (ssize_t)CELL)
		die("pread");
	wrote(pages, cell, FROM_FILE | from);
}

static void prepare_kernel_write(void)
{
	prepare_plain();
	data_fd = make_data_file("tracker_cases", 16);
}

static void where(char *argument)
{
	(void)argument;
	say("%lx %zu %02zx", (uintptr_t)pages->addr, pages->n_pages * PAGE, 1 + below(255));
}

static void expect(char *argument)
{
	unsigned byte, page;

	if (sscanf(argument, "%x %u", &byte, &page) != 2 || byte > 255 || page >= pages->n_pages) {
		say("FAIL usage: expect HEXBYTE PAGE");
		return;
	}
	for (size_t cell = page * CELLS; cell < (page + 1) * CELLS; cell++)
		book_note(pages, cell, FILLED | byte);
	note(WRITTEN, pages, page, 1);
	say("expected");
}

/* ---- t_remap_same, t_dontneed, t_free ---------------------------------------------------------- */

static void remap(size_t page, size_t n)
{
	if (munmap(book_page(pages, page), n * PAGE))
		die("munmap");
	lost(pages, page, n);
	map_back(book_page(pages, page), n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		 -1, 0);
}

static void remap_part(void)
{
	remap(below(pages->end - 4), 4);
}

static void remap_most(void)
{
	remap(0, pages->end - 1);
}

static void remap_write(void)
{
	size_t page = below(pages->end - 4);

	remap(page, 4);
	write_cell(pages, page + 1);
}

static void drop_part(void)
{
	drop(below(pages->end - 4), 4);
}

static void drop_most(void)
{
	drop(0, pages->end - 1);
}

static void drop_write(void)
{
	size_t page = below(pages->end - 4);

	drop(page, 4);
	write_cell(pages, page + 1);
}

static size_t give_free(int then)
{
	size_t page = below(pages->end - 4);

	memset(pages->flags + page, FREED, 4);
	note(FREE_LATER, pages, page, 4);
	if (madvise(book_page(pages, page), 4 * PAGE, MADV_FREE))
		die("MADV_FREE");
	if (then)
		madvise(book_page(pages, page), 4 * PAGE, then);
	return page;
}

static void free_part(void)
{
	give_free(0);
}

static void free_reclaim(void)
{
	give_free(MADV_PAGEOUT);
}

static void free_write(void)
{
	write_cell(pages, give_free(0) + 1);
}

/* ---- t_mremap --------------------------------------------------------------------------------- */

#define ROOM 32ul
static unsigned char *rooms[2];
static int room;

static void reserve(unsigned char *at, size_t n)
{
	if (n)
		map_back(at, n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void prepare_mremap(void)
{
	rooms[0] = map_or_die(NULL, 2 * ROOM * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	rooms[1] = rooms[0] + ROOM * PAGE;
	map_or_die(rooms[0], ROOM / 2 * PAGE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	add_book("moving", rooms[0], ROOM, 1 << 20, 0)->end = ROOM / 2;
	for (size_t page = 0; page < ROOM / 2; page++)
		book_write_page(pages, page, ++version);
}

/* To another address or in place, and to another size, within a room. */
static void resize(long by, bool move)
{
	size_t end = pages->end, wanted = (size_t)((long)end + by), keep;
	unsigned char *old = pages->addr, *to = move ? rooms[room ^= 1] : old;

	wanted = wanted < 4 ? 4 : wanted > ROOM ? ROOM : wanted;
	keep = wanted < end ? wanted : end;
	if (!move && wanted > end && munmap(old + end * PAGE, (wanted - end) * PAGE))
		die("munmap");
	if (mremap(old, end * PAGE, wanted * PAGE, move ? MREMAP_MAYMOVE | MREMAP_FIXED : 0, to) != to)
		die("mremap from %zu to %zu pages", end, wanted);
	pages->addr = to;
	pages->end = wanted;
	if (wanted < end)
		book_wipe(pages, wanted, end - wanted);
	else
		note(GONE, pages, end, wanted - end);
	if (move) {
		reserve(old, end);
		note(MOVED, pages, 0, keep);
	} else if (wanted < end) {
		reserve(old + wanted * PAGE, end - wanted);
	}
}

static void move_same(void) { resize(0, true); }
static void grow(void) { resize(4, false); }
static void shrink(void) { resize(-8, false); }
static void move_grow(void) { resize(8, true); }
static void move_shrink(void) { resize(-4, true); }

/* The old addresses stay mapped, and empty. */
static void move_keep(void)
{
	unsigned char *old = pages->addr;
	size_t len = pages->end * PAGE;

	pages->addr = rooms[room ^= 1];
	if (mremap(old, len, len, MREMAP_MAYMOVE | MREMAP_FIXED | 4 /* DONTUNMAP */, pages->addr) !=
	    pages->addr)
		die("mremap that keeps the old mapping");
	for (size_t i = 0; i < len / 8; i++)
		EXPECT(((uint64_t *)(void *)old)[i] == 0, "the mapping left behind is not empty");
	if (munmap(old, len))
		die("munmap");
	reserve(old, len / PAGE);
	note(MOVED, pages, 0, pages->end);
}

#endif
