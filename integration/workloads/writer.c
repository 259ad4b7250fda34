/*
 * writer [--mib 64] [--threads 4] [--rate 20000] [--seed 1] [--ops all|NAME,NAME,...]
 *
 * Threads change memory in every way the kernel offers, RATE operations a second in all (0: as fast as
 * can be), and keep a ledger of what each 512-byte cell must contain. Every thread owns its pages, so its
 * operations follow from the seed alone. `check` brings all threads to a safe point and compares
 * every page with the ledger; a thread that reads a wrong page on its own makes the next check fail too.
 *
 * Commands beyond the protocol: `pause` and `resume` the threads, `stats` (operations done, by name).
 * `corrupt` pauses; the next check resumes. `step` waits until 1000 more operations are done.
 *
 * Writes its data file, writer-PID.data, into the working directory and leaves it there: a later
 * restore needs it again.
 *
 * The operation `procmem` holds /proc/self/mem open for some microseconds, which a dump may refuse, so
 * `all` does not contain it: ask for `all,procmem`.
 */
#include "writer_ops.h"

#define MAX_THREADS 64

static struct gate gate;
static struct worker workers[MAX_THREADS];
static long mib = 64, rate = 20000;
static enum op draw[256];		/* each enabled operation as often as its weight says */
static int n_draw;
static bool paused;

/* ---- threads ---------------------------------------------------------------------------------- */

static void *work(void *argument)
{
	struct worker *w = argument;
	int64_t period = rate ? NS_PER_S * n_threads / rate : 0;
	int64_t due = now_ns(CLOCK_MONOTONIC), now;
	volatile uint64_t n_mine = 0;		/* on this stack, compared with the worker's own count */

	for (;;) {
		gate_pass(&gate);
		operate(w, draw[below(w, (uint64_t)n_draw)]);
		w->n_done++;
		n_mine++;
		EXPECT(n_mine == w->n_done, "thread %d counts %lu operations on its stack, %lu elsewhere",
		       w->index, n_mine, w->n_done);
		atomic_fetch_add(&w->tick, 1);
		if (w->n_done % 64 == 0)
			futex_wake_all(&w->tick);
		if (!period)
			continue;
		due += period;
		now = now_ns(CLOCK_MONOTONIC);
		if (due < now - NS_PER_S / 10) {
			due = now;		/* stopped for long: go on at the rate, do not catch up */
		} else if (due > now + NS_PER_S / 10000 || period > NS_PER_S / 10000) {
			struct timespec until = to_timespec(due);

			while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
				;
		}
	}
	return NULL;
}

static void check_worker(struct worker *w)
{
	const struct book *books[] = {&w->anon, &w->thp, &w->file, &w->stack, &w->brk};

	for (size_t i = 0; i < LEN(books); i++)
		book_check(books[i]);
	for (int i = 0; i < SEGMENTS; i++)
		book_check(&w->segments[i]);
	for (const struct shield *s = w->shields; s < w->shields + SHIELDS; s++)
		for (size_t i = 0; s->book && i < s->n; i++)
			EXPECT(read(zero_fd, book_page(s->book, s->page + i), 1) < 0 && errno == EFAULT,
			       "%s page %zu is writable, it was made read-only", s->book->name,
			       s->page + i);
}

static void check(void)
{
	bool was_paused = paused;

	if (!was_paused && !gate_close(&gate))
		return;
	for (int i = 0; i < n_threads; i++)
		check_worker(&workers[i]);
	EXPECT((unsigned char *)syscall(SYS_brk, 0) == book_page(&workers[0].brk, workers[0].brk.end),
	       "the brk has moved");
	gate_open(&gate);
	paused = false;
}

static void pause_workers(char *argument)
{
	(void)argument;
	if (!paused)
		paused = gate_close(&gate);
	say(paused ? "paused" : "FAIL a thread does not pause");
}

static void resume_workers(char *argument)
{
	(void)argument;
	if (paused)
		gate_open(&gate);
	paused = false;
	say("resumed");
}

static void stats(char *argument)
{
	char text[480] = "stats";
	size_t len = 5;

	(void)argument;
	for (int op = 0; op < N_OPS; op++) {
		uint64_t n = 0;

		for (int i = 0; i < n_threads; i++)
			n += workers[i].done[op];
		len += (size_t)snprintf(text + len, sizeof text - len, " %s=%lu", OPS[op].name, n);
	}
	say("%s", text);
}

/* Flips one bit of one cell that the ledger knows; the threads stay parked so that nothing heals it. */
static void corrupt(void)
{
	struct worker *w = &workers[0];

	if (!paused)
		paused = gate_close(&gate);
	book_damage(&w->anon, w->anon.n_pages / 2);
}

static void step(void)
{
	_Atomic int *tick = &workers[0].tick;
	int start = atomic_load(tick), now;

	if (paused)
		gate_open(&gate);
	paused = false;
	while ((now = atomic_load(tick)) - start < 1000 / n_threads)
		futex_wait(tick, now, NS_PER_S);
}

/* ---- start ------------------------------------------------------------------------------------ */

/* A mapping that grows down needs room: a fence, a hole for it to grow into, its first page on top. */
static void *map_stack(void)
{
	unsigned char *at = map_or_die(NULL, (STACK_PAGES + 1) * PAGE, PROT_NONE,
				       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	munmap(at + PAGE, STACK_PAGES * PAGE);
	map_back(at + STACK_PAGES * PAGE, PAGE, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1, 0);
	return at + PAGE;
}

static void fill(struct worker *w, struct book *book)
{
	for (size_t page = 0; page < book->n_pages; page++)
		if (below(w, 8))		/* one page in eight stays untouched */
			book_write_page(book, page, ++w->version);
}

static void prepare(struct worker *w, int index, size_t n_pages)
{
	size_t n_thp = n_pages / 4 < HUGE_PAGES ? HUGE_PAGES : n_pages / 4 / HUGE_PAGES * HUGE_PAGES;
	size_t n_anon = n_pages - n_thp - n_file_pages - SEGMENTS * SLOT_PAGES / 2;
	uint64_t id = (uint64_t)(index + 1) << 32;

	w->index = index;
	w->random = content_seed * 1000 + (uint64_t)index;
	w->anon = book_make("anonymous", map_anonymous(n_anon), n_anon, id, 0);
	w->thp = book_make("huge", map_huge(n_thp), n_thp, id | 1 << 28, 0);
	w->file = book_make("file", map_or_die(NULL, n_file_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE,
			    data_fd, (off_t)(index * n_file_pages * PAGE)),
			    n_file_pages, FILE_ID + index * n_file_pages * CELLS, 1);
	w->stack = book_make("stack", map_stack(), STACK_PAGES, id | 2 << 28, 0);
	w->stack.first = STACK_PAGES - 1;
	w->slots = map_or_die(NULL, SLOTS * SLOT_PAGES * PAGE, PROT_NONE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	for (int i = 0; i < SEGMENTS; i++) {
		w->slot_of[i] = 2 * i;
		w->segments[i] = book_make("segment", slot_addr(w, 2 * i), SLOT_PAGES,
					   id | (uint64_t)(i + 3) << 28, 0);
		w->segments[i].end = SLOT_PAGES / 2;
		map_or_die(slot_addr(w, 2 * i), SLOT_PAGES / 2 * PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	}
	if (pipe2(w->pipe, O_CLOEXEC))
		die("pipe2");
	fill(w, &w->anon);
	fill(w, &w->thp);
}

static void choose_ops(char *names)
{
	bool on[N_OPS] = {0};

	for (char *name = strtok(names, ","); name; name = strtok(NULL, ",")) {
		bool known = !strcmp(name, "all");

		for (int op = 0; op < N_OPS; op++) {
			bool this = !strcmp(name, OPS[op].name);

			on[op] |= this || (!strcmp(name, "all") && op != PROCMEM);
			known |= this;
		}
		if (!known)
			die("no operation %s", name);
	}
	for (int op = 0; op < N_OPS; op++)
		for (int i = 0; on[op] && i < OPS[op].weight; i++)
			draw[n_draw++] = (enum op)op;
}

int main(int argc, char **argv)
{
	static const struct command others[] = {
		{"pause", pause_workers}, {"resume", resume_workers}, {"stats", stats}, {NULL, NULL}};
	static const struct named steps[] = {{"run", step}, {NULL, NULL}};
	static const struct named damages[] = {{"page", corrupt}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, others};
	static char all[] = "all";
	char *ops = all;
	size_t n_pages;

	for (int i = 1; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--mib"))
			mib = atol(argv[i + 1]);
		else if (!strcmp(argv[i], "--threads"))
			n_threads = atoi(argv[i + 1]);
		else if (!strcmp(argv[i], "--rate"))
			rate = atol(argv[i + 1]);
		else if (!strcmp(argv[i], "--seed"))
			content_seed = strtoul(argv[i + 1], NULL, 0);
		else if (!strcmp(argv[i], "--ops"))
			ops = argv[i + 1];
	}
	if (n_threads < 1 || n_threads > MAX_THREADS || mib / n_threads < 4)
		die("--threads 1 to %d, --mib 4 or more a thread", MAX_THREADS);
	choose_ops(ops);
	n_pages = (size_t)mib * 256 / (size_t)n_threads;
	n_file_pages = n_pages / 8;
	data_fd = make_data_file("writer", n_file_pages * (size_t)n_threads);
	zero_fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
	gate.n_workers = n_threads;
	atomic_store(&gate.closed, 1);
	for (int i = 0; i < n_threads; i++) {
		pthread_t thread;

		prepare(&workers[i], i, n_pages);
		start_thread(&thread, work, &workers[i]);
	}
	gate_await(&gate, n_threads);
	/* Nothing allocates from now on, so the break is ours. */
	workers[0].brk = book_make("brk", (void *)(((uintptr_t)sbrk(0) + PAGE - 1) & ~(PAGE - 1)),
				   BRK_PAGES, 1ull << 31, 0);
	for (int i = 1; i < n_threads; i++)
		workers[i].brk = (struct book){.name = "no brk"};
	workers[0].brk.end = 0;
	syscall(SYS_brk, workers[0].brk.addr);
	gate_open(&gate);
	return serve(&program);
}
