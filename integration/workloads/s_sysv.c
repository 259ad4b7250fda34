/*
 * s_sysv [keep|own]: System V shared memory. One segment is attached twice, once read-only; of another only parts are
 * left; a third is whole. All are removed already and live only because they are attached; with
 * `keep` the first is not. With `own` neither, and the program has an IPC namespace of its own, with semaphores, a
 * message queue and a segment that nobody has attached. It needs root.
 */
#include "workload.h"

#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>

#define N_PAGES 16

struct segment {
	int id, n_attached;
	char *at, *again;
	struct shmid_ds was;
};

static struct segment plain, parts, removed, idle;
static int semaphores = -1, queue = -1;
static uint64_t round_number = 1;
static bool own;

static struct segment make(key_t key, int mode)
{
	struct segment made = {.id = shmget(key, N_PAGES * PAGE, IPC_CREAT | IPC_EXCL | mode)};

	if (made.id < 0 || (made.at = shmat(made.id, NULL, 0)) == (char *)-1)
		die("shared memory");
	return made;
}

static void fill(char *page, uint64_t tag)
{
	uint64_t *words = (uint64_t *)page;

	for (size_t i = 0; i < PAGE / sizeof *words; i++)
		words[i] = mix64(tag * 4096 + i);
}

static bool holds(const char *page, uint64_t tag)
{
	const uint64_t *words = (const uint64_t *)page;

	for (size_t i = 0; i < PAGE / sizeof *words; i++)
		if (words[i] != mix64(tag * 4096 + i))
			return false;
	return true;
}

static struct shmid_ds ask(struct segment *s)
{
	struct shmid_ds now = {0};

	if (shmctl(s->id, IPC_STAT, &now))
		fail("segment %d: %s", s->id, strerror(errno));
	return now;
}

static void compare(struct segment *s, const char *name)
{
	struct shmid_ds now = ask(s);

	EXPECT(now.shm_segsz == s->was.shm_segsz, "%s has %zu bytes", name, now.shm_segsz);
	EXPECT(now.shm_perm.mode == s->was.shm_perm.mode, "%s has mode %o, had %o", name, now.shm_perm.mode,
	       s->was.shm_perm.mode);
	EXPECT(now.shm_perm.__key == s->was.shm_perm.__key, "%s has key %x", name, now.shm_perm.__key);
	EXPECT(now.shm_perm.uid == s->was.shm_perm.uid && now.shm_perm.gid == s->was.shm_perm.gid,
	       "%s is of %u %u", name, now.shm_perm.uid, now.shm_perm.gid);
	EXPECT(now.shm_nattch == s->was.shm_nattch, "%s is attached %lu times, was %lu", name, now.shm_nattch,
	       s->was.shm_nattch);
}

static void check_own(void)
{
	unsigned short values[3];
	struct { long type; char text[64]; } message;
	ssize_t n;

	EXPECT(!semctl(semaphores, 0, GETALL, values) && values[0] == 5 && values[1] == 0 && values[2] == 32767,
	       "the semaphores are %hu %hu %hu", values[0], values[1], values[2]);
	for (long i = 1; i <= 3; i++) {
		n = msgrcv(queue, &message, sizeof message.text, 0, IPC_NOWAIT);
		EXPECT(n == 10 * i && message.type == i * 1000 && message.text[0] == 'a' + i,
		       "message %ld has %zd bytes", i, n);
		if (n < 0 || msgsnd(queue, &message, (size_t)n, IPC_NOWAIT))
			return fail("message %ld: %s", i, strerror(errno));
	}
	compare(&idle, "the idle segment");
	idle.at = shmat(idle.id, NULL, 0);
	EXPECT(idle.at != (char *)-1 && holds(idle.at + PAGE, 77), "the idle segment has changed");
	shmdt(idle.at);
}

static void check(void)
{
	compare(&plain, "the plain segment");
	compare(&parts, "the segment in parts");
	compare(&removed, "the removed segment");
	EXPECT(holds(plain.at + 3 * PAGE, round_number), "the plain segment holds something else");
	EXPECT(holds(plain.again + 3 * PAGE, round_number), "its second attachment holds something else");
	EXPECT(!plain.at[5 * PAGE] && !memcmp(plain.at + 5 * PAGE, plain.at + 5 * PAGE + 1, PAGE - 1),
	       "a page that was never touched is not zero");
	plain.at[0]++;
	EXPECT(plain.again[0] == plain.at[0], "the two attachments show two memories");
	EXPECT(holds(parts.at + 2 * PAGE, 22) && holds(parts.at + 9 * PAGE, 29), "the parts hold something else");
	EXPECT(parts.at[0] == 'h' && parts.at[2 * PAGE - 1] == 'h', "what lies in place of a part has changed");
	EXPECT(holds(removed.at + 15 * PAGE, 3), "the removed segment holds something else");
	if (own)
		check_own();
}

static void step_write(void) { fill(plain.at + 3 * PAGE, ++round_number); }

/* Detach and attach: the kernel knows these addresses as attachments. */
static void step_reattach(void)
{
	if (shmdt(plain.again) || (plain.again = shmat(plain.id, plain.again, SHM_RDONLY)) == (char *)-1)
		fail("attaching again: %s", strerror(errno));
}

static void damage_content(void) { plain.at[3 * PAGE + 100]++; }
static void damage_removed(void) { removed.at[15 * PAGE]++; }
static void damage_parts(void) { parts.at[9 * PAGE + 8]++; }
static void damage_mode(void) { struct shmid_ds now = ask(&plain); now.shm_perm.mode ^= 4; shmctl(plain.id, IPC_SET, &now); }
static void damage_detached(void) { if (shmdt(plain.again)) die("shmdt"); plain.again = plain.at; }

static void make_own(void)
{
	unsigned short values[] = {5, 0, 32767};
	struct { long type; char text[64]; } message;

	semaphores = semget(0x5e3a, 3, IPC_CREAT | 0640);
	queue = msgget(IPC_PRIVATE, 0600);
	if (semaphores < 0 || queue < 0 || semctl(semaphores, 0, SETALL, values))
		die("semaphores or queue");
	for (long i = 1; i <= 3; i++) {
		message.type = i * 1000;
		memset(message.text, 'a' + (int)i, sizeof message.text);
		if (msgsnd(queue, &message, 10 * (size_t)i, 0))
			die("msgsnd");
	}
	idle = make(0x1d1e, 0600);
	fill(idle.at + PAGE, 77);
	shmdt(idle.at);
	idle.was = ask(&idle);
}

int main(int argc, char **argv)
{
	static const struct named steps[] = {{"write", step_write}, {"reattach", step_reattach}, {NULL, NULL}};
	static const struct named damages[] = {
		{"content", damage_content}, {"removed", damage_removed}, {"parts", damage_parts},
		{"mode", damage_mode}, {"detached", damage_detached}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};
	int status;

	own = argc > 1 && !strcmp(argv[1], "own");
	if (own && unshare(CLONE_NEWIPC))
		die("unshare");
	plain = make((key_t)(0x10000000 + getpid()), 0640);
	plain.again = shmat(plain.id, NULL, SHM_RDONLY);
	fill(plain.at + 3 * PAGE, round_number);
	parts = make(IPC_PRIVATE, 0600);
	fill(parts.at + 2 * PAGE, 22);
	fill(parts.at + 9 * PAGE, 29);
	/* Something else lies where its beginning was. */
	memset(map_or_die(parts.at, 2 * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), 'h', 2 * PAGE);
	munmap(parts.at + 4 * PAGE, 3 * PAGE);
	removed = make(IPC_PRIVATE, 0666);
	fill(removed.at + 15 * PAGE, 3);
	if (plain.again == (char *)-1 || shmctl(removed.id, IPC_RMID, NULL))
		die("shared memory");
	/* Lives on without its creator, and is gone with the last who has it attached. */
	if (shmctl(parts.id, IPC_RMID, NULL) || (argc < 2 && shmctl(plain.id, IPC_RMID, NULL)))
		die("shared memory");
	plain.was = ask(&plain);
	parts.was = ask(&parts);
	removed.was = ask(&removed);
	if (own)
		make_own();
	status = serve(&program);
	/* Nobody else would. */
	shmctl(plain.id, IPC_RMID, NULL);
	return status;
}
