/*
 * heartbeat [--mib 256] [--percent 1]: how long a process was stopped, as it felt it itself.
 *
 * A thread reads CLOCK_MONOTONIC without end and keeps the longest gap between two readings. `step write` writes into PERCENT of
 * the pages, spread evenly, others each time. `gap` answers the longest gap in nanoseconds since the last `gap`. That is
 * an upper bound: what the scheduler takes away counts as well, so measure without a dump first.
 */
#include "pages.h"

static struct book pages;
static size_t percent = 1, next_page;
static uint32_t version = 1;
static _Atomic int64_t longest;
static _Atomic int n_beats;

static void *beat(void *argument)
{
	int64_t latest = now_ns(CLOCK_MONOTONIC);

	for (;;) {
		int64_t now = now_ns(CLOCK_MONOTONIC);

		if (now - latest > atomic_load_explicit(&longest, memory_order_relaxed))
			atomic_store(&longest, now - latest);
		latest = now;
		atomic_fetch_add_explicit(&n_beats, 1, memory_order_relaxed);
	}
	return argument;
}

static void check(void)
{
	int start = atomic_load(&n_beats);

	book_check(&pages);
	while (atomic_load(&n_beats) == start)
		sched_yield();
}

/* Every 100th page for one percent; the next time, those beside them. */
static void step_write(void)
{
	size_t stride = 100 / percent;

	version++;
	for (size_t page = next_page % stride; page < pages.n_pages; page += stride)
		book_write(&pages, page * CELLS + version % CELLS, version);
	next_page++;
}

static void damage(void)
{
	book_damage(&pages, pages.n_pages / 2);
}

static void gap(char *argument)
{
	(void)argument;
	say("gap %ld", (long)atomic_exchange(&longest, 0));
}

int main(int argc, char **argv)
{
	static const struct named steps[] = {{"write", step_write}, {NULL, NULL}};
	static const struct named damages[] = {{"page", damage}, {NULL, NULL}};
	static const struct command others[] = {{"gap", gap}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, others};
	size_t n_pages = 256 * 256;
	pthread_t thread;

	for (int i = 1; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--mib"))
			n_pages = strtoul(argv[i + 1], NULL, 0) * 256;
		else if (!strcmp(argv[i], "--percent"))
			percent = strtoul(argv[i + 1], NULL, 0);
	}
	if (!n_pages || percent < 1 || percent > 100)
		die("--mib 1 or more, --percent 1 to 100");
	pages = book_make("pages", map_anonymous(n_pages), n_pages, 1 << 20, 0);
	for (size_t page = 0; page < n_pages; page++)
		book_write_page(&pages, page, version);
	start_thread(&thread, beat, NULL);
	return serve(&program);
}
