/*
 * heartbeat [--mib 256] [--percent 1]: how long a process was stopped, as it felt it itself.
 *
 * A thread reads CLOCK_MONOTONIC without end and keeps the longest gap between two readings. `gap` answers it since the last `gap`,
 * and when it began, both in nanoseconds. That is an upper bound: what the scheduler takes away counts as well, so measure
 * without a dump first.
 *
 * `step write` writes PERCENT of the pages anew, spread evenly, others each time; `step cluster` as many side by side. `touch N
 * PERCENT` stores N words as they are into random pages of the first PERCENT of them, and answers the nanoseconds it took. `where`
 * answers the address and the bytes of the pages.
 *
 * Every page is of one version, and the ledger is a byte for each: next to nothing is written beside what was asked for.
 */
#include "pages.h"

static unsigned char *pages;
static uint8_t *versions;
static size_t n_pages = 256 * 256, percent = 1, n_steps;
static _Atomic int64_t longest, longest_from;
static _Atomic int n_beats;

static void *beat(void *argument)
{
	int64_t latest = now_ns(CLOCK_MONOTONIC);

	for (;;) {
		int64_t now = now_ns(CLOCK_MONOTONIC);

		if (now - latest > atomic_load_explicit(&longest, memory_order_relaxed)) {
			atomic_store(&longest_from, latest);
			atomic_store(&longest, now - latest);
		}
		latest = now;
		atomic_fetch_add_explicit(&n_beats, 1, memory_order_relaxed);
	}
	return argument;
}

static void write_page(size_t page)
{
	versions[page] = (uint8_t)(versions[page] % 255 + 1);
	for (size_t cell = page * CELLS; cell < (page + 1) * CELLS; cell++)
		content_fill(pages + cell * CELL, cell, versions[page]);
}

static void check(void)
{
	int start = atomic_load(&n_beats);

	for (size_t cell = 0; cell < n_pages * CELLS; cell++)
		EXPECT(content_is(pages + cell * CELL, cell, versions[cell / CELLS]),
		       "page %zu is not of version %d", cell / CELLS, versions[cell / CELLS]);
	while (atomic_load(&n_beats) == start)
		sched_yield();
}

/* Every 100th page for one percent; the next time, those beside them. */
static void step_write(void)
{
	for (size_t page = n_steps++ % 100; page < n_pages; page += 100)
		for (size_t i = page; i < page + percent && i < n_pages; i++)
			write_page(i);
}

static void step_cluster(void)
{
	size_t n = n_pages * percent / 100, first = n_steps++ * n % (n_pages - n + 1);

	for (size_t page = first; page < first + n; page++)
		write_page(page);
}

static void damage(void)
{
	pages[n_pages / 2 * PAGE + 1234] ^= 0x10;
}

static void gap(char *argument)
{
	int64_t length = atomic_exchange(&longest, 0);

	(void)argument;
	say("gap %ld %ld", (long)length, (long)atomic_load(&longest_from));
}

static void where(char *argument)
{
	(void)argument;
	say("where %lx %lu", (unsigned long)(uintptr_t)pages, n_pages * PAGE);
}

static void touch(char *argument)
{
	static uint64_t random;
	size_t n = strtoul(argument, &argument, 0), share = strtoul(argument, NULL, 0);
	size_t n_words = n_pages * share / 100 * (PAGE / 8);
	volatile uint64_t *words = (uint64_t *)(void *)pages;
	int64_t start = now_ns(CLOCK_MONOTONIC);

	if (!n_words || share > 100) {
		fail("touch N PERCENT");
		return answer_verdict("");
	}
	while (n--) {
		size_t word = next_random(&random) % n_words;

		words[word] = words[word];
	}
	say("touched %ld", (long)(now_ns(CLOCK_MONOTONIC) - start));
}

int main(int argc, char **argv)
{
	static const struct named steps[] = {{"write", step_write}, {"cluster", step_cluster}, {NULL, NULL}};
	static const struct named damages[] = {{"page", damage}, {NULL, NULL}};
	static const struct command others[] = {{"gap", gap}, {"where", where}, {"touch", touch}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, others};
	pthread_t thread;

	for (int i = 1; i + 1 < argc; i += 2) {
		if (!strcmp(argv[i], "--mib"))
			n_pages = strtoul(argv[i + 1], NULL, 0) * 256;
		else if (!strcmp(argv[i], "--percent"))
			percent = strtoul(argv[i + 1], NULL, 0);
	}
	if (!n_pages || percent < 1 || percent > 100)
		die("--mib 1 or more, --percent 1 to 100");
	pages = map_anonymous(n_pages);
	versions = map_anonymous(n_pages / PAGE + 1);
	for (size_t page = 0; page < n_pages; page++)
		write_page(page);
	start_thread(&thread, beat, NULL);
	return serve(&program);
}
