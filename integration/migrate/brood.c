/*
 * brood MIB RATE: a parent, and children that write RATE pages of their own memory a second.
 *
 *     parent (a subreaper)
 *      ├ 0         is replaced by another one at the command `replace`; it judges its memory before it ends
 *      ├ 2         leads a session of its own
 *      └ 3         has no memory to speak of; ends at `orphan`, and then 1 is the parent's child
 *         └ 1      leaves its session at `leave`
 *
 * `check` has each of them compare every byte of its memory with what it must be; `pids` tells who is there.
 */
#include "../workloads/pages.h"

#include <sys/prctl.h>

enum { N = 4, MIDDLE = 3 };

struct answer { bool bad; pid_t pid; char why[200]; };

static int asks[N][2], answers[N][2];
static pid_t pids[N];
static size_t n_pages;
static long rate;
static uint64_t generation = 1;

static void answer(int n)
{
	struct answer told = {.bad = atomic_load(&verdict.state), .pid = getpid()};

	memcpy(told.why, verdict.why, sizeof told.why - 1);
	write_all(answers[n][1], &told, sizeof told);
}

static struct answer hear(int n)
{
	struct answer told;

	if (read(answers[n][0], &told, sizeof told) != sizeof told)
		die("no answer of child %d", n);
	if (told.bad)
		fail("child %d: %s", n, told.why);
	return told;
}

static struct answer ask(int n, char order)
{
	write_all(asks[n][1], &order, 1);
	return hear(n);
}

static void obey_parent(int n, char order, const struct book *book)
{
	if (order == 's' && setsid() < 0)
		fail("setsid: %s", strerror(errno));
	if (book && order != 's')
		book_check(book);
	answer(n);
	if (order == 'q')
		_exit(0);
}

static __attribute__((noreturn)) void live(int n)
{
	struct book book = book_make("memory", map_anonymous(n_pages), n_pages, 0, 0);
	uint64_t state = content_seed = generation;
	uint32_t version = 1;
	char order;

	for (size_t page = 0; page < n_pages; page++)
		book_write_page(&book, page, version);
	answer(n);
	for (;;) {
		struct pollfd ready = {.fd = asks[n][0], .events = POLLIN};

		if (poll(&ready, 1, 1) == 1 && read(asks[n][0], &order, 1) == 1)
			obey_parent(n, order, &book);
		for (long i = 0; i < rate / 1000; i++) {
			state = mix64(state + 1);
			book_write_page(&book, state % n_pages, ++version);
		}
	}
}

static pid_t bear(int n)
{
	pid_t pid;

	generation++;
	pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0)
		live(n);
	return pid;
}

static __attribute__((noreturn)) void be_middle(void)
{
	char order;

	bear(1);
	while (read(asks[MIDDLE][0], &order, 1) == 1)
		obey_parent(MIDDLE, order, NULL);
	_exit(0);
}

static void end(int n)
{
	int status;

	ask(n, 'q');
	EXPECT(waitpid(pids[n], &status, 0) == pids[n] && status == 0, "child %d ended as %x", n, status);
	pids[n] = 0;
}

static void check(void)
{
	for (int n = 0; n < N; n++)
		if (pids[n])
			EXPECT(ask(n, 'c').pid == pids[n], "child %d has another number", n);
	EXPECT(pids[MIDDLE] || waitpid(pids[1], NULL, WNOHANG) == 0, "1 is not our child");
}

static void replace(void)
{
	end(0);
	pids[0] = bear(0);
	hear(0);
}

static void orphan(void)
{
	end(MIDDLE);
}

static void leave(void)
{
	ask(1, 's');
	EXPECT(getsid(pids[1]) == pids[1], "1 leads no session");
}

static void say_pids(char *argument)
{
	(void)argument;
	say("%d %d %d %d", pids[0], pids[1], pids[2], pids[3]);
}

int main(int argc, char **argv)
{
	static const struct named steps[] = {
		{"replace", replace}, {"orphan", orphan}, {"leave", leave}, {NULL, NULL}};
	static const struct command others[] = {{"pids", say_pids}, {NULL, NULL}};

	if (argc != 3)
		die("brood MIB RATE");
	n_pages = strtoul(argv[1], NULL, 10) * 256;
	rate = strtol(argv[2], NULL, 10);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	for (int n = 0; n < N; n++)
		if (pipe(asks[n]) || pipe(answers[n]))
			die("pipe");
	pids[0] = bear(0);
	pids[2] = bear(2);
	pids[MIDDLE] = fork();
	if (pids[MIDDLE] == 0)
		be_middle();
	for (int n = 0; n < MIDDLE; n++)
		pids[n] = hear(n).pid;
	ask(2, 's');
	return serve(&(struct program){.check = check, .steps = steps, .others = others});
}
