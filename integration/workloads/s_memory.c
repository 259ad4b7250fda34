/*
 * s_memory [guard]: mappings of every kind, each with content that is known and with what the kernel says of it.
 *
 * Reachable in all ways (not at all, read, write only, executable), growing downwards, at a low address, advised in
 * all ways, locked, not reserved, 64 GiB with a few pages in it, files mapped private and shared, written
 * and then made read-only, ending inside a page; the break; the vdso, auxiliary vector, command line and executable.
 * `guard` adds pages with guards in between, where the kernel has them. `step shared` changes the file behind the shared
 * mapping; `step fork` lets a child see what it must not inherit.
 */
#include "pages.h"

#include <sys/auxv.h>
#include <sys/prctl.h>

#define MAX_REGIONS 32
#define SPARSE_PAGES (64ul << 18)
#define DEEP 32ul

struct region {
	const char *name;
	unsigned char *addr;
	size_t n_pages, n_mapped;
	struct book book;		/* of the pages in it that have content */
	bool writable, guarded;
	char seen[400];			/* protection, offset, file and flags, as in smaps */
};

static struct region regions[MAX_REGIONS], now[MAX_REGIONS];
static int n_regions;
static uint32_t version;
static struct region *deep, *low, *heap, *shared, *dont_fork, *wipe_on_fork, *code;
static char process[5][8192];
static size_t process_len[5];
static void *scratch;
static char *argument_0;

/* ---- what the kernel says --------------------------------------------------------------------- */

/* VmFlags that a mapping has because its owner asked for them. The rest comes and goes. */
static bool is_asked_for(const char *flag)
{
	static const char known[] = " rd wr ex sh mr mw me ms gd lo lf dc de dd wf hg nh nr rr sr mg ";
	char padded[8];

	snprintf(padded, sizeof padded, " %.2s ", flag);
	return strstr(known, padded) != NULL;
}

/* Note a mapping in every region that it is part of; all parts of a region must be alike. */
static void note_mapping(uintptr_t from, uintptr_t to, const char *text)
{
	for (struct region *r = now; r < now + n_regions; r++) {
		uintptr_t start = (uintptr_t)r->addr, end = start + r->n_pages * PAGE;

		if (to <= start || from >= end)
			continue;
		if (r->seen[0] && strcmp(r->seen, text))
			strcpy(r->seen, "different in parts");
		else
			memcpy(r->seen, text, strlen(text) + 1);
		r->n_mapped += ((to < end ? to : end) - (from > start ? from : start)) / PAGE;
	}
}

/* Fill in `now` from smaps. */
static void look_at_mappings(void)
{
	FILE *smaps = fopen("/proc/self/smaps", "re");
	char line[400], text[400], permissions[5], path[200], offset[20];
	uintptr_t from = 0, to = 0, a, b;
	int n = 0;

	memcpy(now, regions, sizeof now);
	for (struct region *r = now; r < now + n_regions; r++)
		r->seen[0] = 0;
	while (fgets(line, sizeof line, smaps)) {
		path[0] = 0;
		if (sscanf(line, "%lx-%lx %4s %19s %*s %*s %199[^\n]", &a, &b, permissions, offset, path) >= 4) {
			from = a;
			to = b;
			/* Of anonymous memory the kernel shows no offset worth keeping. */
			n = snprintf(text, sizeof text, "%s %s %s", permissions, path[0] == '/' ? offset : "", path);
		} else if (!strncmp(line, "VmFlags:", 8)) {
			for (char *flag = strtok(line + 8, " \n"); flag; flag = strtok(NULL, " \n"))
				if (is_asked_for(flag))
					n += sprintf(text + n, " %s", flag);
			note_mapping(from, to, text);
		}
	}
	fclose(smaps);
}

static size_t read_whole(const char *path, char *data, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t len = 0;
	ssize_t n;

	while (fd >= 0 && len < size && (n = read(fd, data + len, size - len)) > 0)
		len += (size_t)n;
	close(fd);
	return len;
}

/* The numbers in stat that say where code, data, heap, arguments and environment are: 26 to 28, 45 to 51. */
static void keep_places(char *stat)
{
	char *out = stat, *save, *field = strtok_r(strrchr(stat, ')') + 1, " ", &save);

	for (int number = 3; field; field = strtok_r(NULL, " ", &save), number++)
		if ((number >= 26 && number <= 28) || (number >= 45 && number <= 51))
			out += sprintf(out, "%s ", field);
}

static void look_at_process(char texts[5][8192], size_t lens[5])
{
	static const char *const paths[] = {"/proc/self/auxv", "/proc/self/cmdline", "/proc/self/environ",
					    "/proc/self/stat"};
	ssize_t n;

	for (int i = 0; i < 4; i++) {
		memset(texts[i], 0, sizeof texts[i]);
		lens[i] = read_whole(paths[i], texts[i], sizeof texts[i] - 1);
	}
	keep_places(texts[3]);
	lens[3] = strlen(texts[3]);
	n = readlink("/proc/self/exe", texts[4], sizeof texts[4]);
	lens[4] = n < 0 ? 0 : (size_t)n;
}

/* ---- making them ------------------------------------------------------------------------------ */

static struct region *add(const char *name, void *addr, size_t n_pages, size_t first, size_t n_filled)
{
	struct region *r = &regions[n_regions++];

	*r = (struct region){.name = name, .addr = addr, .n_pages = n_pages};
	r->book = book_make(name, r->addr + first * PAGE, n_filled, (uint64_t)n_regions << 24, 0);
	for (size_t page = 0; page < n_filled; page++)
		book_write_page(&r->book, page, ++version);
	return r;
}

static struct region *add_anonymous(const char *name, int flags, int protection)
{
	void *addr = map_or_die(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
	struct region *r = add(name, addr, 8, 0, 6);		/* two pages stay untouched */

	if (mprotect(addr, 8 * PAGE, protection))
		die("mprotect");
	r->writable = protection == (PROT_READ | PROT_WRITE);
	return r;
}

static struct region *add_advised(const char *name, int advice)
{
	struct region *r = add_anonymous(name, 0, PROT_READ | PROT_WRITE);

	madvise(r->addr, 8 * PAGE, advice);	/* a kernel may be built without one of them */
	return r;
}

static void *map_file(const char *suffix, size_t len, int flags)
{
	char path[64];
	void *addr;
	int fd;

	snprintf(path, sizeof path, "s_memory-%d.%s", (int)getpid(), suffix);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, (off_t)len))
		die("%s", path);
	addr = map_or_die(NULL, len, PROT_READ | PROT_WRITE, flags, fd, 0);
	close(fd);
	return addr;
}

static void prepare_files(void)
{
	struct region *r;
	unsigned char *addr;

	r = add("relocated", map_file("relocated", 8 * PAGE, MAP_PRIVATE), 8, 2, 3);
	mprotect(r->addr, 8 * PAGE, PROT_READ);
	addr = map_file("short", 2 * PAGE + 100, MAP_PRIVATE);
	addr[2 * PAGE + 200] = 'z';		/* behind the end of the file, in its last page */
	r = add("ends inside a page", addr, 3, 0, 1);
	shared = add("shared", map_file("shared", 8 * PAGE, MAP_SHARED), 8, 0, 8);
	msync(shared->addr, 8 * PAGE, MS_SYNC);
	r = add("shared, read-only", map_file("shared-ro", 8 * PAGE, MAP_SHARED), 8, 0, 8);
	msync(r->addr, 8 * PAGE, MS_SYNC);
	mprotect(r->addr, 8 * PAGE, PROT_READ);
}

static void prepare_special(bool guard)
{
	unsigned char *addr;

	addr = map_or_die(NULL, (DEEP + 1) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	munmap(addr + PAGE, DEEP * PAGE);
	map_back(addr + DEEP * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN,
		 -1, 0);
	deep = add("growing down", addr + DEEP * PAGE, 1, 0, 0);
	deep->book = book_make(deep->name, addr + PAGE, DEEP, 1 << 20, 0);
	deep->book.first = DEEP - 1;
	book_write_page(&deep->book, DEEP - 1, ++version);
	low = add("at a low address", map_or_die((void *)(uintptr_t)0x10000, 4 * PAGE, PROT_READ | PROT_WRITE,
		  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0), 4, 1, 2);
	low->writable = true;
	addr = map_or_die(NULL, SPARSE_PAGES * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	add("sparse", addr, SPARSE_PAGES, SPARSE_PAGES / 3, 5)->writable = true;
	addr = map_or_die(NULL, SPARSE_PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			  -1, 0);
	mprotect(addr + SPARSE_PAGES / 2 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE);
	add("inside a reservation", addr + SPARSE_PAGES / 2 * PAGE, 4, 0, 4)->writable = true;
	add("reservation", addr, SPARSE_PAGES / 2, 0, 0);
	if (guard) {
		struct region *r = add_anonymous("guarded", 0, PROT_READ | PROT_WRITE);

		r->guarded = !madvise(r->addr + 7 * PAGE, PAGE, 102 /* MADV_GUARD_INSTALL */);
	}
}

static void prepare(bool guard)
{
	static const unsigned char machine_code[] = {0xb8, 0x21, 0x43, 0x65, 0x07, 0xc3};	/* return 0x07654321 */
	struct region *r;

	add_anonymous("plain", 0, PROT_READ | PROT_WRITE);
	add_anonymous("unreachable", 0, PROT_NONE);
	add_anonymous("read-only", 0, PROT_READ);
	add_anonymous("write-only", 0, PROT_WRITE);
	add_anonymous("not reserved", MAP_NORESERVE, PROT_READ | PROT_WRITE)->writable = true;
	dont_fork = add_advised("not for children", MADV_DONTFORK);
	wipe_on_fork = add_advised("zero for children", MADV_WIPEONFORK);
	add_advised("not for cores", MADV_DONTDUMP);
	add_advised("huge", MADV_HUGEPAGE);
	add_advised("never huge", MADV_NOHUGEPAGE);
	add_advised("random", MADV_RANDOM);
	add_advised("sequential", MADV_SEQUENTIAL);
	add_advised("mergeable", MADV_MERGEABLE);
	r = add_anonymous("locked", 0, PROT_READ | PROT_WRITE);
	if (mlock(r->addr, 4 * PAGE))
		die("mlock");
	r->n_pages = 4;
	r->book.end = 4;
	if (mlock2(r->addr + 4 * PAGE, 4 * PAGE, MLOCK_ONFAULT))
		die("mlock2");
	add("locked when touched", r->addr + 4 * PAGE, 4, 0, 2)->writable = true;
	r = add_anonymous("named", 0, PROT_READ | PROT_WRITE);
	prctl(0x53564d41 /* PR_SET_VMA */, 0, r->addr, 8 * PAGE, "a name");
	code = add_anonymous("executable", 0, PROT_READ | PROT_WRITE);
	memcpy(code->addr + 7 * PAGE, machine_code, sizeof machine_code);
	mprotect(code->addr, 8 * PAGE, PROT_READ | PROT_EXEC);
	code->writable = false;
	prepare_files();
	prepare_special(guard);
	scratch = map_anonymous(8);
	look_at_mappings();			/* whatever the library allocates for this, it has now */
	heap = add("heap", sbrk(16 * PAGE), 16, 1, 14);
	heap->writable = true;
	look_at_mappings();
	for (int i = 0; i < n_regions; i++)
		strcpy(regions[i].seen, now[i].seen);
	look_at_process(process, process_len);
}

/* ---- checks ----------------------------------------------------------------------------------- */

/* Through the kernel's own door, which asks for no protection. */
static void check_content(const struct region *r)
{
	struct book view = r->book;
	int fd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);

	for (size_t page = r->book.first; page < r->book.end; page += 8) {
		size_t n = r->book.end - page < 8 ? r->book.end - page : 8;

		if (pread(fd, scratch, n * PAGE, (off_t)(uintptr_t)book_page(&r->book, page)) != (ssize_t)(n * PAGE)) {
			fail("%s cannot be read", r->name);
			break;
		}
		view.addr = (unsigned char *)scratch - page * PAGE;
		for (size_t i = 0; i < n; i++)
			book_check_page(&view, page + i);
	}
	close(fd);
}

static void check_access(const struct region *r)
{
	int zero = open("/dev/zero", O_RDWR | O_CLOEXEC);
	bool readable = r->seen[0] == 'r' || r->seen[1] == 'w', writable = r->seen[1] == 'w';
	int fds[2];

	if (pipe2(fds, O_CLOEXEC))
		die("pipe2");
	/* On this processor what can be written can be read. */
	EXPECT((write(fds[1], r->addr, 1) == 1) == readable, "%s is readable: %d", r->name, !readable);
	if (r->guarded)
		EXPECT(write(fds[1], r->addr + 7 * PAGE, 1) < 0 && errno == EFAULT, "the guard page is gone");
	EXPECT(writable || (read(zero, r->addr, 1) < 0 && errno == EFAULT), "%s is writable", r->name);
	close(fds[0]);
	close(fds[1]);
	close(zero);
}

static void check_vdso(void)
{
	int64_t before = now_ns(CLOCK_MONOTONIC), after;
	struct timespec ts;

	EXPECT(!memcmp((void *)getauxval(AT_SYSINFO_EHDR), "\177ELF", 4), "there is no vdso");
	raw_syscall(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&ts, 0, 0, 0, 0);
	after = now_ns(CLOCK_MONOTONIC);
	EXPECT(before <= ts.tv_sec * NS_PER_S + ts.tv_nsec && ts.tv_sec * NS_PER_S + ts.tv_nsec <= after,
	       "the vdso and the kernel disagree on the time");
}

static void check(void)
{
	static char is[5][8192];
	size_t len[5];

	look_at_mappings();
	for (int i = 0; i < n_regions; i++) {
		const struct region *r = &regions[i];

		EXPECT(now[i].n_mapped == r->n_pages, "%s: %zu of %zu pages are mapped", r->name,
		       now[i].n_mapped, r->n_pages);
		EXPECT(!strcmp(now[i].seen, r->seen), "%s is '%s', was '%s'", r->name, now[i].seen, r->seen);
		check_content(r);
		check_access(r);
	}
	EXPECT(regions[n_regions - 1].addr + 16 * PAGE == sbrk(0), "the break has moved");
	EXPECT(((int (*)(void))(uintptr_t)(code->addr + 7 * PAGE))() == 0x07654321, "the code is not what it was");
	look_at_process(is, len);
	for (int i = 0; i < 5; i++)
		EXPECT(len[i] == process_len[i] && !memcmp(is[i], process[i], len[i]),
		       "what the kernel says of the process (%s) has changed",
		       (const char *[]){"auxv", "cmdline", "environ", "stat", "exe"}[i]);
	check_vdso();
}

/* ---- steps and damages ------------------------------------------------------------------------ */

static void write_somewhere(struct book *book)
{
	size_t page = book->first + version % (book->end - book->first);

	version++;
	book_write(book, page * CELLS + 3, version);
}

static void step_write(void)
{
	for (struct region *r = regions; r < regions + n_regions; r++)
		if (r->writable)
			write_somewhere(&r->book);
}

/* One page deeper, by touching it. */
static void step_grow(void)
{
	if (deep->book.first == 0)
		return;
	deep->book.first--;
	deep->addr -= PAGE;
	deep->n_pages++;
	book_write_page(&deep->book, deep->book.first, ++version);
}

static void step_shared(void)
{
	write_somewhere(&shared->book);
}

static void step_fork(void)
{
	int fds[2], status = -1;
	pid_t child;

	if (pipe2(fds, O_CLOEXEC))
		die("pipe2");
	child = fork();
	if (child == 0) {
		bool absent = write(fds[1], dont_fork->addr, 1) < 0 && errno == EFAULT;

		_exit(absent && content_is(wipe_on_fork->addr, 0, 0) ? 0 : 1);
	}
	EXPECT(waitpid(child, &status, 0) == child && status == 0, "a child inherits what it must not");
	close(fds[0]);
	close(fds[1]);
}

static struct region *find(const char *name)
{
	for (struct region *r = regions; r < regions + n_regions; r++)
		if (!strcmp(r->name, name))
			return r;
	die("no region %s", name);
}

static void damage_unreachable(void) { book_damage(&find("unreachable")->book, 5); }
static void damage_relocated(void) { book_damage(&find("relocated")->book, 0); }
static void damage_sparse(void) { book_damage(&find("sparse")->book, 4); }
static void damage_shared(void) { book_damage(&shared->book, 7); }
static void damage_heap(void) { book_damage(&heap->book, 13); }
static void damage_low(void) { book_damage(&low->book, 1); }
static void damage_protection(void) { mprotect(find("read-only")->addr, PAGE, PROT_READ | PROT_WRITE); }
static void damage_fork(void) { madvise(dont_fork->addr, PAGE, MADV_DOFORK); }
static void damage_wipe(void) { madvise(wipe_on_fork->addr, 8 * PAGE, MADV_KEEPONFORK); }
static void damage_huge(void) { madvise(find("huge")->addr, 8 * PAGE, MADV_NOHUGEPAGE); }
static void damage_locked(void) { munlock(find("locked")->addr, PAGE); }
static void damage_unmapped(void) { munmap(find("plain")->addr + 7 * PAGE, PAGE); }
static void damage_break(void) { if (brk(heap->addr + 17 * PAGE)) die("brk"); }
static void damage_arguments(void) { argument_0[0] ^= 1; }

int main(int argc, char **argv)
{
	static const struct named steps[] = {
		{"write", step_write}, {"grow", step_grow}, {"fork", step_fork}, {"shared", step_shared}, {NULL, NULL}};
	static const struct named damages[] = {
		{"unreachable", damage_unreachable}, {"relocated", damage_relocated}, {"sparse", damage_sparse},
		{"shared", damage_shared}, {"heap", damage_heap}, {"low", damage_low},
		{"protection", damage_protection}, {"fork", damage_fork}, {"wipe", damage_wipe},
		{"huge", damage_huge}, {"locked", damage_locked}, {"unmapped", damage_unmapped},
		{"break", damage_break}, {"arguments", damage_arguments}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	argument_0 = argv[0];
	prepare(argc > 1 && !strcmp(argv[1], "guard"));
	return serve(&program);
}
