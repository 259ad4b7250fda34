/*
 * tracker_cases CASE: one way in which memory changes between two generations, small and exact.
 *
 * `step` does the case's operations in turn, `step NAME` one of them (names: the table at the end).
 * `written` answers which pages changed since the last `written`, as hexadecimal addresses:
 *     written A B.. gone C.. freed D.. moved E..
 * written by anyone; gone: content lost to unmapping or dropping; freed: may be lost; moved: same content,
 * now at this address. Not kept for t_full_speed and t_exec, and by t_foreign_write only after `expect`.
 *
 * t_foreign_write is written by another process: `where` answers "ADDR LEN PATTERN" (hex, decimal, hex);
 * whoever asks fills whole pages with one byte and says so by `expect HEXBYTE PAGE`.
 * t_thp answers `huge` with the KiB that are mapped as huge pages now.
 */
#include "tracker_ops.h"

#define DEEPER 64ul		/* pages by which a step makes the main thread's stack deeper */
#define N_SPEED 2

static struct program program;
static struct gate gate;
static bool held;			/* the gate stays closed until the next check */
static int generation;			/* of t_exec: how often this process has replaced itself */

/* ---- t_mprotect ------------------------------------------------------------------------------- */

static bool read_only[64];

static void set_protection(size_t page, size_t n, int protection)
{
	protect(page, n, protection);
	memset(read_only + page, protection == PROT_READ, n);
}

static void make_readonly(void)
{
	size_t page = below(pages->end - 4);

	set_protection(page, 4, PROT_READ | PROT_WRITE);
	write_cell(pages, page);
	set_protection(page, 4, PROT_READ);
}

static void make_writable(void)
{
	set_protection(0, pages->end, PROT_READ | PROT_WRITE);
}

static void protect_cycle(void)
{
	size_t page = below(pages->end - 4);

	set_protection(page, 4, PROT_READ);
	set_protection(page, 4, PROT_READ | PROT_WRITE);
	write_cell(pages, page + 2);
}

/* Unreachable and back, without a write. */
static void protect_none(void)
{
	size_t page = below(pages->end - 4);

	set_protection(page, 4, PROT_NONE);
	set_protection(page, 4, PROT_READ | PROT_WRITE);
}

static void check_protection(void)
{
	int zero_fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);

	for (size_t page = 0; page < pages->end; page++)
		EXPECT(!read_only[page] ||
		       (read(zero_fd, book_page(pages, page), 1) < 0 && errno == EFAULT),
		       "page %zu is writable, it was made read-only", page);
	close(zero_fd);
}

/* ---- t_brk_stack ------------------------------------------------------------------------------ */

static struct book *heap;
static int depth;

static void set_brk(size_t end)
{
	unsigned char *want = book_page(heap, end);

	if ((unsigned char *)syscall(SYS_brk, want) != want)
		die("brk to %p", (void *)want);
	if (end < heap->end)
		book_wipe(heap, end, heap->end - end);
	else
		note(GONE, heap, heap->end, end - heap->end);
	heap->end = end;
}

static void prepare_brk_stack(void)
{
	unsigned char *end;

	prepare_plain();
	end = (unsigned char *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1));
	heap = add_book("heap", end, 256, 1 << 28, 0);
	heap->end = 0;
	set_brk(0);
}

static void brk_grow(void)
{
	size_t end = heap->end;

	set_brk(end + 8 > heap->n_pages ? 8 : end + 8);
	write_cell(heap, heap->end - 1);	/* the last page; those between stay untouched */
}

static void brk_shrink(void)
{
	set_brk(heap->end < 4 ? 0 : heap->end - 4);
}

static void check_brk(void)
{
	EXPECT((unsigned char *)syscall(SYS_brk, 0) == book_page(heap, heap->end), "the brk has moved");
}

/* Pages of a live frame: the commands that follow are served further down in the same stack. */
static __attribute__((noinline, noreturn)) void go_deeper(void)
{
	unsigned char frame[(DEEPER + 1) * PAGE];
	struct book *book = add_book("stack", (void *)(((uintptr_t)frame + PAGE - 1) & ~(PAGE - 1)), DEEPER,
				     ((uint64_t)++depth + 1000) << 20, 0);

	for (size_t page = 0; page < DEEPER; page++) {
		book_write_page(book, page, ++version);
		note(WRITTEN, book, page, 1);
	}
	say("stepped");
	exit(serve_loop(&program));
}

static void stack_grow(void)
{
	if (depth < MAX_BOOKS - 3)
		go_deeper();
	write_cell(&books[n_books - 1], 0);
}

/* ---- t_file_private, t_thp, t_first_touch ------------------------------------------------------ */

static void prepare_file_private(void)
{
	data_fd = make_data_file("tracker_cases", 32);
	add_book("file", map_or_die(NULL, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, data_fd, 0), 32,
		 FILE_ID, 1);
	version = 1;			/* the file's own: what is written must differ from it */
}

/* As a linker does with relocated data: written once, then read-only. */
static void relocate(void)
{
	size_t page = any_page();

	protect(page, 1, PROT_READ | PROT_WRITE);
	write_cell(pages, page);
	protect(page, 1, PROT_READ);
}

static void cow_write(void)
{
	size_t page = any_page();

	protect(page, 1, PROT_READ | PROT_WRITE);
	write_cell(pages, page);
}

/* Read only: the page is the file's, and no copy. */
static void look(void)
{
	book_check_page(pages, any_page());
}

static void prepare_thp(void)
{
	struct book *book = add_book("huge", map_huge(2 * HUGE_PAGES), 2 * HUGE_PAGES, 1 << 28, 0);

	for (size_t page = 0; page < book->n_pages; page += 8)
		book_write(book, page * CELLS, ++version);
	book_write(book, book->n_pages * CELLS - 1, ++version);
}

static void thp_protect(void)
{
	size_t page = any_page();

	protect(page, 1, PROT_READ);
	protect(page, 1, PROT_READ | PROT_WRITE);
}

static void thp_collapse(void)
{
	madvise(pages->addr, pages->n_pages * PAGE, 25 /* MADV_COLLAPSE */);
}

/* A whole huge page is given up and then read: the kernel may put its huge page of zeros there. */
static void thp_zero(void)
{
	drop(0, HUGE_PAGES);
	for (size_t page = 0; page < HUGE_PAGES; page++)
		book_check_page(pages, page);
}

static void huge(char *argument)
{
	FILE *smaps = fopen("/proc/self/smaps", "re");
	uintptr_t a, b, from = 0, to = 0, mine = (uintptr_t)pages->addr;
	unsigned long kib, sum = 0;
	char line[512];

	(void)argument;
	while (smaps && fgets(line, sizeof line, smaps)) {
		if (sscanf(line, "%lx-%lx ", &a, &b) == 2) {
			from = a;
			to = b;
		}
		if (from >= mine && to <= mine + pages->n_pages * PAGE &&
		    sscanf(line, "AnonHugePages: %lu", &kib) == 1)
			sum += kib;
	}
	fclose(smaps);
	say("huge %lu", sum);
}

static size_t untouched;

static void prepare_first_touch(void)
{
	add_book("touched", map_anonymous(257), 257, 1 << 20, 0);
}

static size_t take_untouched(void)
{
	if (untouched == 256) {
		drop(0, 256);
		untouched = 0;
	}
	return untouched++;
}

static void touch_write(void)
{
	for (int i = 0; i < 4; i++)
		write_cell(pages, take_untouched());
}

static void touch_read(void)
{
	for (int i = 0; i < 4; i++)
		book_check_page(pages, take_untouched());
}

static void touch_kernel(void)
{
	size_t cell = take_untouched() * CELLS;
	int fds[2];

	if (pipe(fds))
		die("pipe");
	for (uint32_t word = 0; word < CELL / 8; word++) {
		uint64_t content = content_word(pages->id + cell, version + 1, word);

		write_all(fds[1], &content, sizeof content);
	}
	if (read(fds[0], pages->addr + cell * CELL, CELL) != (ssize_t)CELL)
		die("read");
	close(fds[0]);
	close(fds[1]);
	wrote(pages, cell, ++version);
}

/* ---- t_tables --------------------------------------------------------------------------------- */

#define TABLE_PAGES 512ul		/* that one page table maps; moved whole when it lies alike */
#define N_FILLED 64ul			/* of them, in each area */

static unsigned char *spare;

static void prepare_tables(void)
{
	unsigned char *at = map_huge(3 * TABLE_PAGES);

	madvise(at, 3 * TABLE_PAGES * PAGE, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < 2; i++) {
		struct book *book = add_book(i ? "right" : "left", at + i * TABLE_PAGES * PAGE, TABLE_PAGES,
					     (i + 1) << 20, 0);

		for (size_t page = 0; page < TABLE_PAGES; page += TABLE_PAGES / N_FILLED)
			book_write_page(book, page, ++version);
		book_write_page(book, TABLE_PAGES - 1, ++version);
	}
	spare = at + 2 * TABLE_PAGES * PAGE;
}

static void move_table(unsigned char *from, unsigned char *to)
{
	if (mremap(from, TABLE_PAGES * PAGE, TABLE_PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
		die("mremap of a page table");
}

/* Two areas change places: no page is written, and each address has other content. */
static void exchange(void)
{
	unsigned char *left = books[0].addr, *right = books[1].addr;

	move_table(left, spare);
	move_table(right, left);
	move_table(spare, right);
	map_back(spare, TABLE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	books[0].addr = right;
	books[1].addr = left;
	for (size_t i = 0; i < 2; i++) {
		for (size_t page = 0; page < TABLE_PAGES; page += TABLE_PAGES / N_FILLED)
			note(MOVED, &books[i], page, 1);
		note(MOVED, &books[i], TABLE_PAGES - 1, 1);
	}
}

/* ---- t_fork ----------------------------------------------------------------------------------- */

static void hand_over(int fd)
{
	write_all(fd, "x", 1);
}

static void wait_for(int fd)
{
	char byte;

	if (read(fd, &byte, 1) != 1)
		die("read from the other side of a fork");
}

/* In the child: other contents in every page, and a look whether the parent's writes stay out of them. */
static __attribute__((noreturn)) void be_child(int from_parent, int to_parent)
{
	for (size_t page = 0; page < pages->n_pages; page++)
		book_write_page(pages, page, 0x1000000 + (uint32_t)page);
	hand_over(to_parent);
	wait_for(from_parent);
	book_check(pages);
	_exit(verdict.ever);
}

static void fork_and(bool parent_writes)
{
	int down[2], up[2], status;
	pid_t child;

	if (pipe(down) || pipe(up))
		die("pipe");
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0)
		be_child(down[0], up[1]);
	wait_for(up[0]);
	if (parent_writes)
		write_one();
	hand_over(down[1]);
	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	EXPECT(status == 0, "the child's copies are wrong");
	if (parent_writes)
		write_one();
	for (int i = 0; i < 2; i++) {
		close(down[i]);
		close(up[i]);
	}
}

static void fork_only(void) { fork_and(false); }
static void fork_write(void) { fork_and(true); }

/* ---- t_full_speed, t_exec --------------------------------------------------------------------- */

static _Atomic int n_writes[N_SPEED];

static void *write_at_full_speed(void *argument)
{
	struct book *book = argument;
	uint64_t random = book->id;
	uint32_t mine = 0;
	_Atomic int *n = &n_writes[book - books];

	for (;;) {
		gate_pass(&gate);
		book_write(book, next_random(&random) % (book->n_pages * CELLS), ++mine);
		if (atomic_fetch_add(n, 1) % 1024 == 0)
			futex_wake_all(n);
	}
	return NULL;
}

static void prepare_full_speed(void)
{
	gate.n_workers = N_SPEED;
	for (int i = 0; i < N_SPEED; i++)
		add_filled("speed", map_anonymous(1024), 1024);
	for (int i = 0; i < N_SPEED; i++) {
		pthread_t thread;

		start_thread(&thread, write_at_full_speed, &books[i]);
	}
}

static void run_on(void)
{
	for (int i = 0; i < N_SPEED; i++) {
		int start = atomic_load(&n_writes[i]), now;

		while ((now = atomic_load(&n_writes[i])) - start < 5000)
			futex_wait(&n_writes[i], now, NS_PER_S);
	}
}

static void prepare_exec(void)
{
	content_seed = 100 + (uint64_t)generation;
	prepare_plain();
}

static void replace_self(void)
{
	char next[16];

	snprintf(next, sizeof next, "%d", generation + 1);
	execl("/proc/self/exe", "tracker_cases", "t_exec", next, NULL);
	die("exec");
}

/* ---- the cases -------------------------------------------------------------------------------- */

static const struct test_case {
	const char *name;
	void (*prepare)(void);
	struct named steps[8];
	void (*check_more)(void);
} CASES[] = {
	{"t_write", prepare_plain,
	 {{"one", write_one}, {"many", write_many}, {"page", write_page}, {"across", write_across}}, NULL},
	{"t_kernel_write", prepare_kernel_write,
	 {{"read", kernel_read}, {"recv", kernel_recv}, {"pread", kernel_pread}}, NULL},
	{"t_foreign_write", prepare_plain, {{"one", write_one}}, NULL},
	{"t_remap_same", prepare_plain,
	 {{"part", remap_part}, {"write", remap_write}, {"one", write_one}, {"most", remap_most}}, NULL},
	{"t_dontneed", prepare_plain,
	 {{"part", drop_part}, {"write", drop_write}, {"one", write_one}, {"most", drop_most}}, NULL},
	{"t_free", prepare_plain,
	 {{"part", free_part}, {"reclaim", free_reclaim}, {"write", free_write}, {"page", write_page}}, NULL},
	{"t_mremap", prepare_mremap,
	 {{"move", move_same}, {"grow", grow}, {"shrink", shrink}, {"move_grow", move_grow},
	  {"move_shrink", move_shrink}, {"move_keep", move_keep}, {"one", write_one}}, NULL},
	{"t_mprotect", prepare_plain,
	 {{"readonly", make_readonly}, {"writable", make_writable}, {"cycle", protect_cycle},
	  {"none", protect_none}}, check_protection},
	{"t_brk_stack", prepare_brk_stack,
	 {{"brk_grow", brk_grow}, {"stack_grow", stack_grow}, {"brk_shrink", brk_shrink}}, check_brk},
	{"t_file_private", prepare_file_private,
	 {{"write", cow_write}, {"look", look}, {"relocate", relocate}, {"drop", drop_part}}, NULL},
	{"t_fork", prepare_plain, {{"write", fork_write}, {"only", fork_only}}, NULL},
	{"t_thp", prepare_thp,
	 {{"one", write_one}, {"drop", drop_part}, {"protect", thp_protect}, {"collapse", thp_collapse},
	  {"zero", thp_zero}}, NULL},
	{"t_tables", prepare_tables, {{"exchange", exchange}, {"one", write_one}}, NULL},
	{"t_first_touch", prepare_first_touch,
	 {{"write", touch_write}, {"read", touch_read}, {"kernel", touch_kernel}}, NULL},
	{"t_full_speed", prepare_full_speed, {{"run", run_on}}, NULL},
	{"t_exec", prepare_exec, {{"exec", replace_self}}, NULL},
};
static const struct test_case *this_case;

static void check(void)
{
	if (gate.n_workers && !held && !gate_close(&gate))
		return;
	for (size_t i = 0; i < n_books; i++)
		book_check(&books[i]);
	if (this_case->check_more)
		this_case->check_more();
	if (gate.n_workers)
		gate_open(&gate);
	held = false;
}

static void corrupt(void)
{
	if (gate.n_workers && !held)
		held = gate_close(&gate);
	book_damage(pages, pages->end - 1);
}

static const struct command OTHERS[] = {
	{"written", written}, {"where", where}, {"expect", expect}, {"huge", huge},
	{NULL, NULL},
};
static const struct named DAMAGES[] = {{"page", corrupt}, {NULL, NULL}};
static struct program program = {check, NULL, DAMAGES, OTHERS};

int main(int argc, char **argv)
{
	for (size_t i = 0; argc > 1 && i < LEN(CASES); i++)
		if (!strcmp(CASES[i].name, argv[1]))
			this_case = &CASES[i];
	if (!this_case)
		die("usage: tracker_cases CASE");
	generation = argc > 2 ? atoi(argv[2]) : 0;
	program.steps = this_case->steps;
	this_case->prepare();
	if (!generation)
		return serve(&program);
	say("stepped");		/* the step that brought us here */
	return serve_loop(&program);
}
