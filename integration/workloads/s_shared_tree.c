/*
 * s_shared_tree: one memory, one memfd and one deleted file in several processes.
 *
 * A parent, two children and a grandchild. Shared anonymous memory made by the parent is mapped by all of them, by the second
 * child only in part and elsewhere; a memfd is mapped by the parent and open in the first child; a deleted file is open in
 * all, with one offset in parent and first child; the grandchild has memory that it shares with its own parent alone. Each
 * process obeys a pipe: `check` has every process say what it sees, and change what all the others must see.
 */
#include "pages.h"

enum { N_CHILDREN = 2, N_PAGES = 12, PART = 4 };

static struct book book;
static unsigned char *memfd_memory, *secret;
static int memfd, ghost, asks[3][2], answers[3][2];
static uint32_t version;
static const char text[] = "of one file";

static uint64_t sum_of(const unsigned char *bytes, size_t len)
{
	const uint64_t *words = (const uint64_t *)(const void *)bytes;
	uint64_t sum = 0;

	for (size_t i = 0; i < len / 8; i++)
		sum = mix64(sum + words[i]);
	return sum;
}

static void answer(int n, uint64_t value)
{
	write_all(answers[n][1], &value, sizeof value);
}

/* What a child does: 's' sums what it sees of the memory, 'm' of the memfd, 'w' writes, 'o' tells its offset. */
static void serve_parent(int n, unsigned char *memory, size_t n_pages)
{
	char order;

	while (read(asks[n][0], &order, 1) == 1) {
		uint64_t word = 0;

		if (order == 's') {
			answer(n, sum_of(memory, n_pages * PAGE));
		} else if (order == 'm') {
			answer(n, pread(memfd, &word, 8, 3000) == 8 ? word : 0);
		} else if (order == 'w') {
			memory[PAGE + 8 * n]++;
			answer(n, memory[PAGE + 8 * n]);
		} else if (order == 'o') {
			answer(n, (uint64_t)lseek(ghost, 0, SEEK_CUR));
		} else {
			secret[100 * n] ^= 0x55;
			answer(n, secret[100 * (3 - n)]);
		}
	}
	_exit(0);
}

static uint64_t ask(int n, char order)
{
	uint64_t value = 0;

	write_all(asks[n][1], &order, 1);
	if (read(answers[n][0], &value, sizeof value) != sizeof value)
		fail("process %d does not answer", n);
	return value;
}

static void be_second(unsigned char *whole)
{
	unsigned char *part = mremap(whole + PART * PAGE, PART * PAGE, PART * PAGE, MREMAP_MAYMOVE);
	unsigned char *elsewhere = map_or_die(NULL, 64 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	part = mremap(part, PART * PAGE, PART * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere + 7 * PAGE);
	if (part == MAP_FAILED)
		die("mremap");
	munmap(whole, PART * PAGE);
	munmap(whole + 2 * PART * PAGE, PART * PAGE);
	munmap(memfd_memory, 2 * PAGE);
	secret = map_or_die(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memset(secret, 0x33, PAGE);
	if (fork() == 0)
		serve_parent(2, part, PART);
	serve_parent(1, part, PART);
}

static void prepare(void)
{
	unsigned char *whole = map_or_die(NULL, N_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char path[64];

	book = book_make("shared by all", whole, N_PAGES - 1, 1 << 20, 0);
	for (size_t page = 2; page < N_PAGES - 1; page++)
		book_write_page(&book, page, ++version);
	memfd = memfd_create("of all", MFD_CLOEXEC);
	if (memfd < 0 || ftruncate(memfd, 2 * PAGE))
		die("memfd_create");
	memfd_memory = map_or_die(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	snprintf(path, sizeof path, "s_shared_tree-%d", (int)getpid());
	ghost = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (ghost < 0 || write(ghost, text, sizeof text) != sizeof text || unlink(path))
		die("%s", path);
	for (int n = 0; n < 3; n++)
		if (pipe2(asks[n], O_CLOEXEC) || pipe2(answers[n], O_CLOEXEC))
			die("pipe2");
	for (int n = 0; n < N_CHILDREN; n++)
		if (fork() == 0) {
			for (int end = 0; end < 3; end++)
				close(asks[end][1]);
			if (n == 1) {
				snprintf(path, sizeof path, "/proc/self/fd/%d", ghost);
				dup3(open(path, O_RDONLY | O_CLOEXEC), ghost, O_CLOEXEC);
				be_second(whole);
			}
			serve_parent(n, whole, N_PAGES);
		}
	munmap(memfd_memory + PAGE, PAGE);	/* all of its first page is the parent's only */
	close(memfd);
	for (int n = 0; n < 3; n++) {
		close(asks[n][0]);
		close(answers[n][1]);
	}
}

/* ---- checks ----------------------------------------------------------------------------------- */

static void check(void)
{
	const unsigned char *whole = book.addr;
	char found[sizeof text] = "";
	uint64_t word;

	for (size_t page = 2; page < N_PAGES - 1; page++)
		book_check_page(&book, page);
	EXPECT(ask(0, 's') == sum_of(whole, N_PAGES * PAGE), "the first child sees another memory");
	for (int n = 1; n < 3; n++)
		EXPECT(ask(n, 's') == sum_of(whole + PART * PAGE, PART * PAGE), "process %d sees another memory", n);
	EXPECT((unsigned char)ask(0, 'w') == whole[PAGE], "what the first child writes is not seen");
	memcpy(&word, memfd_memory + 3000, 8);
	EXPECT(ask(0, 'm') == word, "the memfd is another one in the child");
	word = next_random(&(uint64_t){version++});
	memcpy(memfd_memory + 3000, &word, 8);
	EXPECT(ask(0, 'm') == word, "what is written to the memfd is not seen");
	book_write(&book, 3 * CELLS + version % CELLS, version + 1);
	version++;
	book_write(&book, 5 * CELLS + version % CELLS, version + 1);
	version++;
	EXPECT(ask(1, 's') == sum_of(whole + PART * PAGE, PART * PAGE), "what is written is not seen");
	EXPECT(lseek(ghost, (off_t)(version % 5), SEEK_SET) == (off_t)ask(0, 'o'), "one offset has become two");
	EXPECT(ask(1, 'o') == 0, "two offsets have become one");
	EXPECT(pread(ghost, found, sizeof text, 0) == sizeof text && !memcmp(found, text, sizeof text), "the file is lost");
	/* Each changes a byte of its own and tells that of the other. */
	word = ask(1, 'x');
	ask(2, 'x');
	EXPECT(ask(1, 'x') == (word ^ 0x55), "the grandchild does not share with its parent");
}

static void step_write(void)
{
	for (size_t page = 2; page < N_PAGES - 1; page += 3)
		book_write_page(&book, page, ++version);
}

static void damage_apart(void)
{
	unsigned char copy[PAGE], *page = book.addr + 5 * PAGE;	/* one that the check writes to */

	memcpy(copy, page, PAGE);
	map_or_die(page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	memcpy(page, copy, PAGE);
}

static void damage_content(void) { book.addr[5 * PAGE] ^= 1; }
static void damage_memfd(void)
{
	map_or_die(memfd_memory, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

int main(void)
{
	static const struct named steps[] = {{"write", step_write}, {NULL, NULL}};
	static const struct named damages[] = {
		{"apart", damage_apart}, {"content", damage_content}, {"memfd", damage_memfd}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
