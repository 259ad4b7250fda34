/*
 * s_sweepers: processes that write, all the time, to memory that they shared when they were forked.
 *
 * A parent and three children have the same pages. Each sweeps over them without end, page after page: a page must be as its
 * last sweep left it, every word of it, and gets the next content. So a page of another moment, of another process, or of two
 * of them is found by the next sweep. Which pages a process writes depends on their number: some nobody does, some the parent
 * alone, some the children, some all. How far each has come stands in shared memory; where it is, in its own.
 */
#include "pages.h"

enum { N_PAGES = 1024, N_PROCESSES = 4, PAUSE_EVERY = 16 };

static struct { _Atomic uint64_t sweeps; _Atomic int wrong; } *told;	/* of each process, shared by all */
static unsigned char *memory;
static uint64_t sweep = 1;		/* number of the one under way */
static int who;

static uint64_t content_of(size_t page, uint64_t number)
{
	return number ? mix64((uint64_t)(who + 1) << 40 ^ number << 16 ^ page) : mix64(page);
}

static bool writes(size_t page)
{
	return page % 4 == 3 || page % 4 == (who ? 2 : 1);
}

static void visit(size_t page)
{
	volatile uint64_t *words = (volatile uint64_t *)(void *)(memory + page * PAGE);
	uint64_t old = content_of(page, writes(page) ? sweep - 1 : 0), new = content_of(page, sweep);

	for (size_t n = 0; n < PAGE / 8; n++)
		if (words[n] != old + n)
			atomic_store(&told[who].wrong, (int)page + 1);
	for (size_t n = 0; writes(page) && n < PAGE / 8; n++)
		words[n] = new + n;
}

static void *sweep_on(void *nothing)
{
	for (;; sweep++) {
		for (size_t page = 0; page < N_PAGES; page++) {
			visit(page);
			if (page % PAUSE_EVERY == 0)
				nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
		}
		atomic_store(&told[who].sweeps, sweep);
	}
	return nothing;
}

static void prepare(void)
{
	pthread_t thread;

	told = map_or_die(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memory = map_anonymous(N_PAGES);
	for (size_t page = 0; page < N_PAGES; page++)
		for (size_t n = 0; n < PAGE / 8; n++)
			((uint64_t *)(void *)(memory + page * PAGE))[n] = content_of(page, 0) + n;
	for (int n = 1; n < N_PROCESSES; n++)
		if (fork() == 0) {
			who = n;
			sweep_on(NULL);
		}
	if (pthread_create(&thread, NULL, sweep_on, NULL))
		die("pthread_create");
}

/* Every page of every process is looked at by the second sweep that ends from now on. */
static void check(void)
{
	for (int n = 0; n < N_PROCESSES; n++) {
		uint64_t before = atomic_load(&told[n].sweeps);

		while (atomic_load(&told[n].sweeps) < before + 2)
			nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
		EXPECT(!atomic_load(&told[n].wrong), "process %d: page %d", n, atomic_load(&told[n].wrong) - 1);
	}
}

static void damage_page(void) { memory[4 * PAGE + 100] ^= 1; }

int main(void)
{
	static const struct named damages[] = {{"page", damage_page}, {NULL, NULL}};
	static const struct program program = {check, NULL, damages, NULL};

	prepare();
	return serve(&program);
}
