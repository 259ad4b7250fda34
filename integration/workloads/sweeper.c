/*
 * sweeper [--mib 64] [--token TEXT] [subreaper] [seccomp] [nproc]
 *
 * A thread writes page after page, as fast as it can, and counts: write number K makes page K % N hold
 * K. So at any moment the pages tell how far the count is, and all of them must be of that moment. It
 * sweeps only between `step` (returns when all pages have been written again) and `pause`.
 *
 * Besides, memory that a fork leaves out or empties, and memory that nobody may read. And it notices
 * children: SIGCHLD is counted, and `children` says how many there were and what wait4 says.
 *
 * subreaper, seccomp (a filter that allows all), nproc (as another user, with no process to spare) make
 * cloning it harder. The token is for whoever looks for the process.
 */
#include "pages.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#define SIDE_PAGES 512ul
#define USER 54321

static struct gate gate;
static struct book no_fork, wiped, unreachable;
static unsigned char *plain;
static size_t n_plain;
static _Atomic uint64_t count;		/* of writes that are done */
static _Atomic int sweeps;
static _Atomic int n_sigchld;
static bool paused = true;

static void on_sigchld(int sig)
{
	(void)sig;
	n_sigchld++;
}

/* The count comes after the page: whatever it says is done. One more page may be half-written. */
static void write_page(uint64_t number)
{
	uint64_t *page = (uint64_t *)(void *)(plain + number % n_plain * PAGE);

	for (size_t word = 0; word < PAGE / 8; word++)
		page[word] = mix64(number * PAGE + word);
	atomic_store(&count, number + 1);
}

static void *sweep(void *argument)
{
	(void)argument;
	for (;;) {
		gate_pass(&gate);
		write_page(atomic_load(&count));
		if (atomic_load(&count) % n_plain == 0) {
			sweeps++;
			futex_wake_all(&sweeps);
		}
	}
	return NULL;
}

static void check_plain(void)
{
	uint64_t end = atomic_load(&count);

	for (uint64_t number = end - n_plain; number < end; number++) {
		const uint64_t *page = (const uint64_t *)(const void *)(plain + number % n_plain * PAGE);

		for (size_t word = 0; word < PAGE / 8; word++)
			EXPECT(page[word] == mix64(number * PAGE + word), "page %lu is not of write %lu, the last is %lu",
			       number % n_plain, number, end - 1);
	}
}

static void check(void)
{
	if (!paused && !gate_close(&gate))
		return;
	paused = true;
	check_plain();
	book_check(&no_fork);
	book_check(&wiped);
	mprotect(unreachable.addr, SIDE_PAGES * PAGE, PROT_READ);
	book_check(&unreachable);
	mprotect(unreachable.addr, SIDE_PAGES * PAGE, PROT_NONE);
}

static void step(void)
{
	int now, start = atomic_load(&sweeps);

	if (paused)
		gate_open(&gate);
	paused = false;
	while ((now = atomic_load(&sweeps)) - start < 2)
		futex_wait(&sweeps, now, NS_PER_S);
}

static void pause_sweeping(char *argument)
{
	(void)argument;
	if (!paused)
		paused = gate_close(&gate);
	say(paused ? "paused" : "FAIL the thread does not pause");
}

static void children(char *argument)
{
	pid_t found = (pid_t)syscall(SYS_wait4, -1, NULL, 0x40000000 /* __WALL */ | WNOHANG, NULL);
	const char *reply = found < 0 && errno == ECHILD ? "none" : "some";

	(void)argument;
	say("children %s sigchld %d", reply, atomic_load(&n_sigchld));
}

/* A child that ends at once. */
static void fork_once(char *argument)
{
	pid_t child = fork();

	(void)argument;
	if (child == 0)
		_exit(0);
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	say("forked");
}

static void damage_plain(void) { plain[n_plain / 2 * PAGE] ^= 1; }
static void damage_no_fork(void) { book_damage(&no_fork, 100); }
static void damage_wiped(void) { book_damage(&wiped, 100); }
static void damage_unreachable(void) { book_damage(&unreachable, 100); }

static void corrupt_paused(void (*damage)(void))
{
	if (!paused)
		paused = gate_close(&gate);
	damage();
}
static void corrupt_plain(void) { corrupt_paused(damage_plain); }

static struct book make_book(const char *name, uint64_t id)
{
	struct book book = book_make(name, map_anonymous(SIDE_PAGES), SIDE_PAGES, id << 24, 0);

	for (size_t page = 0; page < SIDE_PAGES; page++)
		book_write_page(&book, page, (uint32_t)page + 1);
	return book;
}

static void prepare(long mib)
{
	n_plain = (size_t)mib * 256;
	plain = map_anonymous(n_plain);
	while (atomic_load(&count) < n_plain)
		write_page(atomic_load(&count));
	no_fork = make_book("not for children", 1);
	madvise(no_fork.addr, SIDE_PAGES * PAGE, MADV_DONTFORK);
	wiped = make_book("zero for children", 2);
	madvise(wiped.addr, SIDE_PAGES * PAGE, MADV_WIPEONFORK);
	unreachable = make_book("unreachable", 3);
	mprotect(unreachable.addr, SIDE_PAGES * PAGE, PROT_NONE);
}

static void allow_all(void)
{
	struct sock_filter code = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog filter = {1, &code};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
		die("seccomp");
}

static void become_poor(void)
{
	struct rlimit none = {1, 1};

	if (setresgid(USER, USER, USER) || setresuid(USER, USER, USER) || setrlimit(RLIMIT_NPROC, &none))
		die("another user");
}

int main(int argc, char **argv)
{
	static const struct command others[] = {
		{"pause", pause_sweeping}, {"children", children}, {"fork", fork_once}, {NULL, NULL}};
	static const struct named steps[] = {{"sweep", step}, {NULL, NULL}};
	static const struct named damages[] = {
		{"plain", corrupt_plain}, {"no_fork", damage_no_fork}, {"wiped", damage_wiped},
		{"unreachable", damage_unreachable}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, others};
	bool poor = false, filtered = false;
	pthread_t thread;
	long mib = 64;

	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--mib"))
			mib = atol(argv[++i]);
		else if (!strcmp(argv[i], "--token"))
			i++;
		else if (!strcmp(argv[i], "subreaper"))
			prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
		else if (!strcmp(argv[i], "seccomp"))
			filtered = true;
		else if (!strcmp(argv[i], "nproc"))
			poor = true;
		else
			die("what is %s", argv[i]);
	}
	prepare(mib);
	signal(SIGCHLD, on_sigchld);
	gate.n_workers = 1;
	atomic_store(&gate.closed, 1);
	start_thread(&thread, sweep, NULL);
	gate_await(&gate, 1);
	if (poor)
		become_poor();
	if (filtered)
		allow_all();
	return serve(&program);
}
