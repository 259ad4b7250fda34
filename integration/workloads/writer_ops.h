/*
 * The operations of the writer: each changes memory in one way, and the ledger with it. A worker owns
 * everything it touches, so no two operations ever meet on a page.
 */
#ifndef WRITER_OPS_H
#define WRITER_OPS_H

#include "pages.h"

#define SEGMENTS 4		/* mremap'ed ranges of a thread */
#define SLOTS (2 * SEGMENTS)	/* places where they can be */
#define SLOT_PAGES 32ul
#define STACK_PAGES 64ul
#define BRK_PAGES 256ul
#define SHIELDS 8		/* read-only ranges of a thread at one time */
#define RUN_PAGES 4ul		/* pages unmapped, dropped or protected at a time */

enum op { WRITE, READ, PREAD, PVM, PROCMEM, REMAP, DONTNEED, FREE, MREMAP, MPROTECT, BRK, STACK, FILED,
	  THP, TOUCH, N_OPS };
static const struct { const char *name; int weight; } OPS[N_OPS] = {
	[WRITE] = {"write", 24}, [READ] = {"read", 8}, [PREAD] = {"pread", 8}, [PVM] = {"pvm", 8},
	[PROCMEM] = {"procmem", 4}, [REMAP] = {"remap", 2}, [DONTNEED] = {"dontneed", 2},
	[FREE] = {"free", 2}, [MREMAP] = {"mremap", 4}, [MPROTECT] = {"mprotect", 4}, [BRK] = {"brk", 3},
	[STACK] = {"stack", 4}, [FILED] = {"file", 8}, [THP] = {"thp", 8}, [TOUCH] = {"touch", 8},
};

struct shield {
	struct book *book;		/* null: not in use */
	size_t page, n;
};

struct worker {
	int index;
	uint64_t random;
	uint32_t version;		/* of the latest write */
	struct book anon, thp, file, stack, brk, segments[SEGMENTS];
	unsigned char *slots;		/* segment i is at slots + slot_of[i] * SLOT_PAGES * PAGE */
	int slot_of[SEGMENTS];
	struct shield shields[SHIELDS];
	int pipe[2];
	uint64_t n_done, done[N_OPS];
	_Atomic int tick;
};

static int n_threads = 4, zero_fd, data_fd;
static size_t n_file_pages;		/* of each thread */

static uint64_t below(struct worker *w, uint64_t limit)
{
	return next_random(&w->random) % limit;
}

/* ---- mappings --------------------------------------------------------------------------------- */

static void set_protection(struct book *book, size_t page, size_t n, int protection)
{
	if (mprotect(book_page(book, page), n * PAGE, protection))
		die("mprotect %s page %zu", book->name, page);
}

/* Whoever is about to write pages [page, page + n) takes every read-only range there away first. */
static void unshield(struct worker *w, struct book *book, size_t page, size_t n)
{
	for (struct shield *s = w->shields; s < w->shields + SHIELDS; s++) {
		if (s->book != book || s->page >= page + n || page >= s->page + s->n)
			continue;
		set_protection(book, s->page, s->n, PROT_READ | PROT_WRITE);
		s->book = NULL;
	}
}

static void do_mprotect(struct worker *w)
{
	struct book *books[] = {&w->anon, &w->thp, &w->file};
	struct shield *shield = &w->shields[below(w, SHIELDS)];
	struct book *book = books[below(w, LEN(books))];
	size_t page = below(w, book->n_pages - RUN_PAGES + 1);

	if (shield->book)
		unshield(w, shield->book, shield->page, shield->n);
	unshield(w, book, page, RUN_PAGES);
	set_protection(book, page, RUN_PAGES, PROT_READ);
	*shield = (struct shield){book, page, RUN_PAGES};
}

/* A run at the start of a book: what is unmapped or dropped again and again stays in one quarter of
 * the pages, so that the other quarters hold more than zeroes. */
static size_t wipe_run(struct worker *w, struct book *book)
{
	return below(w, book->n_pages / 4 / RUN_PAGES) * RUN_PAGES;
}

static void do_remap(struct worker *w)
{
	struct book *book = below(w, 4) ? &w->anon : &w->file;
	size_t page = wipe_run(w, book), len = RUN_PAGES * PAGE;
	unsigned char *at = book_page(book, page);

	unshield(w, book, page, RUN_PAGES);
	if (munmap(at, len))
		die("munmap");
	book_wipe(book, page, RUN_PAGES);
	if (book == &w->anon)
		map_back(at, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	else
		map_back(at, len, PROT_READ | PROT_WRITE, MAP_PRIVATE, data_fd,
			 (off_t)((w->index * n_file_pages + page) * PAGE));
}

static void do_dontneed(struct worker *w)
{
	struct book *books[] = {&w->anon, &w->anon, &w->file, &w->thp};
	struct book *book = books[below(w, LEN(books))];
	size_t page = wipe_run(w, book);

	if (madvise(book_page(book, page), RUN_PAGES * PAGE, MADV_DONTNEED))
		die("MADV_DONTNEED");
	book_wipe(book, page, RUN_PAGES);
}

static void do_free(struct worker *w)
{
	size_t page = wipe_run(w, &w->anon);
	unsigned char *at = book_page(&w->anon, page);

	/* A freed page that was freed before: old or zero already, and nothing has changed that. */
	memset(w->anon.flags + page, FREED, RUN_PAGES);
	if (madvise(at, RUN_PAGES * PAGE, MADV_FREE))
		die("MADV_FREE");
	/* Asking the kernel to reclaim makes it drop freed pages now, where it would wait for need. */
	if (below(w, 2))
		madvise(at, RUN_PAGES * PAGE, MADV_PAGEOUT);
}

static unsigned char *slot_addr(struct worker *w, int slot)
{
	return w->slots + (size_t)slot * SLOT_PAGES * PAGE;
}

/* What a slot does not use is reserved, so that nobody else is ever mapped there for long. */
static void reserve(unsigned char *at, size_t n_pages)
{
	if (n_pages)
		map_back(at, n_pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void resize_in_place(struct book *book, size_t new_end)
{
	unsigned char *tail = book_page(book, new_end > book->end ? book->end : new_end);

	if (new_end > book->end && munmap(tail, (new_end - book->end) * PAGE))
		die("munmap before growing");
	if (mremap(book->addr, book->end * PAGE, new_end * PAGE, 0) != MAP_FAILED) {
		if (new_end < book->end) {
			book_wipe(book, new_end, book->end - new_end);
			reserve(tail, book->end - new_end);
		}
		book->end = new_end;
	} else if (errno == ENOMEM && new_end > book->end) {
		reserve(tail, new_end - book->end);	/* somebody else is there for a moment */
	} else {
		die("mremap in place from %zu to %zu pages", book->end, new_end);
	}
}

static void do_mremap(struct worker *w)
{
	int which = (int)below(w, SEGMENTS), slot = (int)below(w, SLOTS);
	struct book *book = &w->segments[which];
	size_t end = book->end, new_end = 1 + below(w, SLOT_PAGES);
	unsigned char *old = book->addr, *to = slot_addr(w, slot);

	for (int i = 0; i < SEGMENTS; i++) {
		if (w->slot_of[i] != slot)
			continue;
		if (new_end != end)
			resize_in_place(book, new_end);
		return;
	}
	if (mremap(old, end * PAGE, new_end * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		die("mremap from %zu to %zu pages", end, new_end);
	book->addr = to;
	w->slot_of[which] = slot;
	if (new_end < end)
		book_wipe(book, new_end, end - new_end);
	book->end = new_end;
	reserve(old, end);
}

static void do_brk(struct worker *w)
{
	struct book *book = &w->brk;
	size_t end = below(w, book->n_pages + 1);
	unsigned char *want = book_page(book, end);

	if ((unsigned char *)syscall(SYS_brk, want) != want) {
		fail("brk to %p refused", (void *)want);
		return;
	}
	if (end < book->end)
		book_wipe(book, end, book->end - end);
	book->end = end;
	for (int i = 0; end && i < 4; i++)
		book_write(book, below(w, end * CELLS), ++w->version);
}

/* Local variables under way while the stack is taken: the caller's are verified on the way back. */
static __attribute__((noinline)) void recurse(struct worker *w, int depth)
{
	uint64_t local[CELL / 8];
	uint32_t version = w->version + (uint32_t)depth;

	content_fill(local, (uint64_t)depth, version);
	if (depth)
		recurse(w, depth - 1);
	EXPECT(content_is(local, (uint64_t)depth, version), "thread %d: local variables changed", w->index);
}

static void do_stack(struct worker *w)
{
	struct book *book = &w->stack;
	size_t deeper = 1 + below(w, 3);

	if (below(w, 4) == 0) {
		recurse(w, (int)below(w, 64));
		return;
	}
	if (deeper > book->first) {
		size_t n = book->n_pages - book->first;

		if (munmap(book_page(book, book->first), n * PAGE))
			die("munmap of a stack");
		book_wipe(book, book->first, n);
		book->first = book->n_pages - 1;
		map_back(book_page(book, book->first), PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1, 0);
	}
	book_write(book, (book->first - deeper) * CELLS + below(w, CELLS), ++w->version);
	book->first -= deeper;
}

/* ---- writes ----------------------------------------------------------------------------------- */

static struct book *any_book(struct worker *w)
{
	switch (below(w, 8)) {
	case 0: return &w->segments[below(w, SEGMENTS)];
	case 1: return &w->file;
	case 2: return &w->thp;
	case 3: return &w->stack;
	default: return &w->anon;
	}
}

static size_t any_page(struct worker *w, struct book *book)
{
	return book->first + below(w, book->end - book->first);
}

static void do_write(struct worker *w, struct book *book)
{
	size_t page = any_page(w, book);

	unshield(w, book, page, 1);
	w->version++;
	if (below(w, 4))
		book_write(book, page * CELLS + below(w, CELLS), w->version);
	else
		book_write_page(book, page, w->version);
}

static void take(ssize_t n, const char *what)
{
	if (n != (ssize_t)CELL)
		die("%s gave %zd", what, n);
}

/* The kernel writes a cell: from a pipe, from a device, from a file, or as another process would. */
static void do_kernel_write(struct worker *w, enum op op)
{
	struct book *book = any_book(w);
	size_t page = any_page(w, book), cell = page * CELLS + below(w, CELLS);
	unsigned char *at = book->addr + cell * CELL;
	uint32_t version = ++w->version;
	uint64_t data[CELL / 8];
	struct iovec from = {data, CELL}, to = {at, CELL};
	int fd;

	unshield(w, book, page, 1);
	content_fill(data, book->id + cell, version);
	switch ((int)op) {
	case READ:
		if (below(w, 4)) {
			take(write(w->pipe[1], data, CELL), "write to pipe");
			take(read(w->pipe[0], at, CELL), "read from pipe");
		} else {
			version = 0;
			take(read(zero_fd, at, CELL), "read from /dev/zero");
		}
		break;
	case PREAD:
		version = (uint32_t)below(w, n_file_pages * (size_t)n_threads * CELLS);
		take(pread(data_fd, at, CELL, (off_t)(version * CELL)), "pread");
		version |= FROM_FILE;
		break;
	case PVM:
		take(process_vm_writev(getpid(), &from, 1, &to, 1, 0), "process_vm_writev");
		break;
	default:
		fd = open("/proc/self/mem", O_WRONLY | O_CLOEXEC);
		take(pwrite(fd, data, CELL, (off_t)(uintptr_t)at), "write to /proc/self/mem");
		close(fd);
	}
	book_written(book, cell, version);
}

static void do_thp(struct worker *w)
{
	struct book *book = &w->thp;
	size_t chunk = below(w, book->n_pages / HUGE_PAGES) * HUGE_PAGES;

	if (below(w, 256)) {
		do_write(w, book);
	} else if (below(w, 2)) {
		if (madvise(book_page(book, chunk), HUGE_PAGES * PAGE, MADV_DONTNEED))
			die("MADV_DONTNEED of a huge page");
		book_wipe(book, chunk, HUGE_PAGES);
	} else {
		madvise(book_page(book, chunk), HUGE_PAGES * PAGE, 25 /* MADV_COLLAPSE */);
	}
}

static void operate(struct worker *w, enum op op)
{
	struct book *book;

	switch (op) {
	case WRITE: do_write(w, any_book(w)); break;
	case FILED: do_write(w, &w->file); break;
	case REMAP: do_remap(w); break;
	case DONTNEED: do_dontneed(w); break;
	case FREE: do_free(w); break;
	case MREMAP: do_mremap(w); break;
	case MPROTECT: do_mprotect(w); break;
	case STACK: do_stack(w); break;
	case THP: do_thp(w); break;
	case BRK:
		if (w->index == 0)	/* a process has one brk: the first thread owns it */
			do_brk(w);
		break;
	case TOUCH:
		book = any_book(w);
		book_check_page(book, any_page(w, book));
		break;
	default: do_kernel_write(w, op);
	}
	w->done[op]++;
}

#endif
