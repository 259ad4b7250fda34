/*
 * target [--mib N] [--fill random|half|sparse] [--rate PAGES_PER_S] [--threads N] [--vmas N] [--fds N] [--processes N]
 *
 * A program of a certain size: memory, threads that sleep, mappings, open files, processes: it and its children, each of which has
 * written a few of its pages and sleeps. A thread writes random pages at a rate, or, if
 * `spins` of the board is set, computes and writes in turn as fast as it can. Standard output says `ready` once and becomes /dev/null,
 * as the other two standard streams should be from the beginning; then the board is obeyed.
 *
 * Fills: `random` cannot be compressed; `half` is a random and a zero word in turn (zstd, level 1: to 51 %); `sparse` has every
 * sixteenth page, which is random, and no others.
 */
#include "beat.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>

#define PAGE 4096ul
#define WORDS (PAGE / sizeof(uint64_t))

static uint64_t *area;
static size_t n_pages, every = 1, n_threads, n_vmas, n_fds, n_processes = 1;
static bool half;
static uint64_t seed = 1, n_commands;

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

static uint64_t *page_at(size_t page)
{
	return area + page * WORDS;
}

/* The first word of a page says for good which page it is; the others change. */
static void fill_page(size_t page)
{
	uint64_t *words = page_at(page), at = mix(seed ^ page << 20);

	words[0] = mix(page);
	for (size_t i = 1; i < WORDS; i++)
		words[i] = half && i % 2 ? 0 : mix(at += WORDS);
}

static void *write_pages(void *nothing)
{
	uint64_t random = 0;
	int64_t next = now_ns(), owed = 0;

	for (;;) {
		int64_t spins = atomic_load(&board->spins), rate = atomic_load(&board->rate);

		if (spins) {
			for (int64_t i = 0; i < spins; i++)
				random = mix(random);
			owed = 1000;
		} else {
			owed += rate;	/* thousandths of a page: one turn is a millisecond */
		}
		for (; owed >= 1000; owed -= 1000) {
			random = mix(random);
			page_at(random % n_pages / every * every)[1]++;
			atomic_fetch_add_explicit(&board->n_written, 1, memory_order_relaxed);
		}
		if (spins)
			continue;
		next += 1000000;
		if (next > now_ns())
			sleep_ns(next - now_ns());
		else
			next = now_ns();	/* what was missed while it stood still is not made up for */
	}
	return nothing;
}

static void *sleep_for_ever(void *nothing)
{
	for (;;)
		pause();
	return nothing;
}

/* Every second page of a mapping gets another protection: as many mappings, each with one page. */
static void make_vmas(void)
{
	char *at = mmap(NULL, n_vmas * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		die("mmap");
	for (size_t i = 0; i < n_vmas; i++) {
		at[i * PAGE] = (char)i;
		if (i % 2 && mprotect(at + i * PAGE, PAGE, PROT_READ))
			die("mprotect");
	}
}

/* Of ten: six regular files, each opened by itself, two eventfds, a pipe. */
static void make_fds(void)
{
	struct rlimit limit;
	int pipes[2];

	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	for (size_t i = 0; i < n_fds; i++) {
		int got, kind = i % 10;

		if (kind < 6)
			got = open("opened", O_RDWR | O_CREAT, 0600);
		else if (kind < 8)
			got = eventfd((unsigned)i, 0);
		else if (kind == 8)
			got = pipe(pipes);
		else
			continue;
		if (got < 0)
			die("make a descriptor");
	}
}

#define OWN_PAGES 16

static void make_children(void)
{
	for (size_t i = 1; i < n_processes; i++) {
		int ready[2];
		pid_t pid;
		char byte;

		if (pipe(ready))
			die("make a pipe");
		pid = fork();
		if (pid < 0)
			die("fork");
		if (!pid) {
			for (size_t page = 0; page < n_pages && page < OWN_PAGES; page++)
				page_at(page)[1] = i;
			close(ready[0]);
			close(ready[1]);
			sleep_for_ever(NULL);
		}
		close(ready[1]);
		/* The end of the pipe: it has got ready. */
		if (read(ready[0], &byte, 1))
			die("wait for a child");
		close(ready[0]);
	}
}

static void make_area(void)
{
	area = mmap(NULL, n_pages * PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (area == MAP_FAILED)
		die("mmap");
	/* What was written is known page by page only where pages are small, and figures shall not hang on where the area lies. */
	madvise(area, n_pages * PAGE, MADV_NOHUGEPAGE);
	for (size_t page = 0; page < n_pages; page += every)
		fill_page(page);
	atomic_store(&board->area, (int64_t)(uintptr_t)area);
	atomic_store(&board->n_pages, (int64_t)n_pages);
}

static int64_t count_wrong(void)
{
	int64_t n_wrong = 0;

	for (size_t page = 0; page < n_pages; page += every)
		n_wrong += page_at(page)[0] != mix(page);
	return n_wrong;
}

static int64_t obey(int64_t command, size_t n)
{
	size_t first;

	seed++;
	n_commands++;
	switch (command) {
	case 1:	/* look at all of it */
		return count_wrong();
	case 2:	/* write n pages, spread evenly, others than the last time */
		for (size_t i = 0; i < n; i++)
			fill_page((i * n_pages / n + n_commands) % n_pages);
		return (int64_t)n;
	case 3:	/* write n pages side by side, others than the last time */
		first = n_commands * n % (n_pages - n + 1);
		for (size_t i = 0; i < n; i++)
			fill_page(first + i);
		return (int64_t)n;
	default:
		return -1;
	}
}

static void parse(char *const *argument)
{
	for (; argument[0] && argument[1]; argument += 2) {
		size_t value = strtoul(argument[1], NULL, 0);

		if (!strcmp(argument[0], "--mib"))
			n_pages = value * 256;
		else if (!strcmp(argument[0], "--rate"))
			atomic_store(&board->rate, (int64_t)value);
		else if (!strcmp(argument[0], "--threads"))
			n_threads = value;
		else if (!strcmp(argument[0], "--vmas"))
			n_vmas = value;
		else if (!strcmp(argument[0], "--fds"))
			n_fds = value;
		else if (!strcmp(argument[0], "--processes"))
			n_processes = value;
		else if (!strcmp(argument[1], "half"))
			half = true;
		else if (!strcmp(argument[1], "sparse"))
			every = 16;
	}
}

int main(int argc, char **argv)
{
	int nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);

	(void)argc;
	n_pages = 256;
	start_beat();
	parse(argv + 1);
	make_area();
	if (n_vmas)
		make_vmas();
	if (n_fds)
		make_fds();
	make_children();
	for (size_t i = 0; i < n_threads; i++)
		start_small_thread(sleep_for_ever);
	start_small_thread(write_pages);
	if (write(1, "ready\n", 6) != 6 || dup2(nowhere, 1) < 0)
		die("say that it is ready");
	close(nowhere);
	for (;;) {
		int64_t asked = atomic_load(&board->asked);

		if (asked != atomic_load(&board->answered)) {
			atomic_store(&board->answer, obey(atomic_load(&board->command),
							  (size_t)atomic_load(&board->argument)));
			atomic_store(&board->answered, asked);
		}
		sleep_ns(1000000);
	}
}
