/*
 * s_creds [dropped]: who a thread is. Needs root at its start.
 *
 * Four threads have given up different things by raw system calls: all user and group ids different from each other, other
 * groups, capabilities kept without root, ambient and bounding sets, securebits, no_new_privs; one is still root in
 * full. The main thread is root too, unless `dropped`: then it is nobody special. Every thread compares what the kernel says of it with what it said at the start.
 */
#include "workload.h"

#include <linux/capability.h>
#include <linux/securebits.h>
#include <sys/prctl.h>

#define N_THREADS 4
#define MAX_GROUPS 8
#define BIT(number) (1ull << (number))

struct who {
	uint32_t uids[4], gids[4];		/* real, effective, saved, of the file system */
	uint32_t groups[MAX_GROUPS];
	int n_groups;
	uint64_t effective, permitted, inheritable, bounding, ambient;
	int securebits, no_new_privs, keep_caps;
};

static struct who start[N_THREADS + 1], seen[N_THREADS + 1];
static struct servant servants[N_THREADS + 1];	/* the last one stands for the main thread */
static int dumpable;

static int number_of(const struct servant *s)
{
	return (int)(s - servants);
}

static struct __user_cap_header_struct cap_header = {_LINUX_CAPABILITY_VERSION_3, 0};

/* ---- what the kernel says --------------------------------------------------------------------- */

static void look(struct servant *s)
{
	struct __user_cap_data_struct data[2] = {{0, 0, 0}};
	struct who *w = &seen[number_of(s)];

	memset(w, 0, sizeof *w);
	syscall(SYS_getresuid, &w->uids[0], &w->uids[1], &w->uids[2]);
	syscall(SYS_getresgid, &w->gids[0], &w->gids[1], &w->gids[2]);
	w->uids[3] = (uint32_t)syscall(SYS_setfsuid, -1);
	w->gids[3] = (uint32_t)syscall(SYS_setfsgid, -1);
	w->n_groups = (int)syscall(SYS_getgroups, MAX_GROUPS, w->groups);
	syscall(SYS_capget, &cap_header, data);
	w->effective = data[0].effective | (uint64_t)data[1].effective << 32;
	w->permitted = data[0].permitted | (uint64_t)data[1].permitted << 32;
	w->inheritable = data[0].inheritable | (uint64_t)data[1].inheritable << 32;
	for (int cap = 0; cap < 64; cap++) {
		w->bounding |= prctl(PR_CAPBSET_READ, cap, 0, 0, 0) == 1 ? BIT(cap) : 0;
		w->ambient |= prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, cap, 0, 0) == 1 ? BIT(cap) : 0;
	}
	w->securebits = prctl(PR_GET_SECUREBITS);
	w->no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
	w->keep_caps = prctl(PR_GET_KEEPCAPS);
}

static void compare(int number)
{
	const struct who *is = &seen[number], *was = &start[number];

	EXPECT(!memcmp(is->uids, was->uids, sizeof is->uids), "thread %d has uids %u %u %u %u", number,
	       is->uids[0], is->uids[1], is->uids[2], is->uids[3]);
	EXPECT(!memcmp(is->gids, was->gids, sizeof is->gids), "thread %d has gids %u %u %u %u", number,
	       is->gids[0], is->gids[1], is->gids[2], is->gids[3]);
	EXPECT(is->n_groups == was->n_groups && !memcmp(is->groups, was->groups, sizeof is->groups),
	       "thread %d has other groups (%d of them)", number, is->n_groups);
	EXPECT(is->effective == was->effective, "thread %d: effective %lx, was %lx", number, is->effective,
	       was->effective);
	EXPECT(is->permitted == was->permitted, "thread %d: permitted %lx, was %lx", number, is->permitted,
	       was->permitted);
	EXPECT(is->inheritable == was->inheritable, "thread %d: inheritable %lx, was %lx", number,
	       is->inheritable, was->inheritable);
	EXPECT(is->bounding == was->bounding, "thread %d: bounding %lx, was %lx", number, is->bounding,
	       was->bounding);
	EXPECT(is->ambient == was->ambient, "thread %d: ambient %lx, was %lx", number, is->ambient,
	       was->ambient);
	EXPECT(is->securebits == was->securebits && is->keep_caps == was->keep_caps,
	       "thread %d: securebits %x, were %x", number, (unsigned)is->securebits,
	       (unsigned)was->securebits);
	EXPECT(is->no_new_privs == was->no_new_privs, "thread %d: no_new_privs is %d", number,
	       is->no_new_privs);
}

/* ---- giving up -------------------------------------------------------------------------------- */

static void must(long result, const char *what)
{
	if (result)
		die("%s", what);
}

static void set_capabilities(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct __user_cap_data_struct data[2] = {
		{(uint32_t)effective, (uint32_t)permitted, (uint32_t)inheritable},
		{(uint32_t)(effective >> 32), (uint32_t)(permitted >> 32), (uint32_t)(inheritable >> 32)}};

	must(syscall(SYS_capset, &cap_header, data), "capset");
}

static void set_ids(uint32_t user, uint32_t group)
{
	must(syscall(SYS_setresgid, group, group + 1, group + 2), "setresgid");
	syscall(SYS_setfsgid, group + 3);
	must(syscall(SYS_setresuid, user, user + 1, user + 2), "setresuid");
	syscall(SYS_setfsuid, user + 3);
}

/* Not root, but with some capabilities, which survive because the thread asked for that. */
static void become_capable(struct servant *s)
{
	static const uint32_t groups[] = {5, 2001, 40000, 70000};
	uint64_t keep = BIT(CAP_SETUID) | BIT(CAP_SETGID) | BIT(CAP_SETPCAP) | BIT(CAP_CHOWN) |
			BIT(CAP_NET_BIND_SERVICE);

	must(prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT), "PR_CAPBSET_DROP");
	must(prctl(PR_CAPBSET_DROP, CAP_MKNOD), "PR_CAPBSET_DROP");
	must(syscall(SYS_setgroups, LEN(groups), groups), "setgroups");
	must(prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP | SECBIT_KEEP_CAPS), "PR_SET_SECUREBITS");
	set_ids(1001, 2001);
	set_capabilities(keep & ~BIT(CAP_NET_BIND_SERVICE), keep, BIT(CAP_CHOWN) | BIT(CAP_NET_BIND_SERVICE));
	must(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0), "PR_CAP_AMBIENT");
	look(s);
}

/* Nobody special, for good. */
static void become_ordinary(struct servant *s)
{
	must(syscall(SYS_setgroups, 0, NULL), "setgroups");
	must(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS");
	must(prctl(PR_SET_SECUREBITS, SECBIT_NOROOT | SECBIT_NOROOT_LOCKED), "PR_SET_SECUREBITS");
	set_ids(65534, 65533);
	look(s);
}

/* Still user 0, but not all-powerful. */
static void become_weak_root(struct servant *s)
{
	set_capabilities(BIT(CAP_SETUID), BIT(CAP_SETUID) | BIT(CAP_KILL), BIT(CAP_KILL));
	look(s);
}

/* ---- protocol --------------------------------------------------------------------------------- */

static void check(void)
{
	for (int i = 0; i < N_THREADS; i++) {
		servant_ask(&servants[i], look);
		compare(i);
	}
	look(&servants[N_THREADS]);
	compare(N_THREADS);
	EXPECT(prctl(PR_GET_DUMPABLE) == dumpable, "dumpable is %d, was %d", prctl(PR_GET_DUMPABLE), dumpable);
}

/* Use what was kept: change and change back what only a capability allows. */
static void use_capability(struct servant *s)
{
	EXPECT(!syscall(SYS_setresuid, -1, 7777, -1) && !syscall(SYS_setresuid, -1, 1002, -1),
	       "the capability to change user ids does not work");
	syscall(SYS_setfsuid, 1004);
	(void)s;
}

static void step_use(void) { servant_ask(&servants[1], use_capability); }

static void spoil_uid(struct servant *s) { (void)s; syscall(SYS_setresuid, -1, 7777, -1); }
static void spoil_fsuid(struct servant *s) { (void)s; syscall(SYS_setfsuid, 1001); }
static void spoil_gid(struct servant *s) { (void)s; syscall(SYS_setresgid, -1, -1, 2001); }
static void spoil_groups(struct servant *s) { uint32_t g[] = {5, 2001, 40000, 70001}; (void)s; syscall(SYS_setgroups, 4, g); }
static void spoil_bounding(struct servant *s) { (void)s; prctl(PR_CAPBSET_DROP, CAP_SYS_PACCT); }
static void spoil_securebits(struct servant *s) { (void)s; prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP); }
static void spoil_privs(struct servant *s) { (void)s; prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); }

static void spoil_ambient(struct servant *s)
{
	(void)s;
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_LOWER, CAP_NET_BIND_SERVICE, 0, 0);
}

static void spoil_effective(struct servant *s)
{
	(void)s;
	set_capabilities(0, BIT(CAP_SETUID) | BIT(CAP_KILL), BIT(CAP_KILL));
}

static void damage_uid(void) { servant_ask(&servants[1], spoil_uid); }
static void damage_fsuid(void) { servant_ask(&servants[1], spoil_fsuid); }
static void damage_gid(void) { servant_ask(&servants[1], spoil_gid); }
static void damage_groups(void) { servant_ask(&servants[1], spoil_groups); }
static void damage_bounding(void) { servant_ask(&servants[1], spoil_bounding); }
static void damage_securebits(void) { servant_ask(&servants[1], spoil_securebits); }
static void damage_ambient(void) { servant_ask(&servants[1], spoil_ambient); }
static void damage_privs(void) { servant_ask(&servants[0], spoil_privs); }
static void damage_effective(void) { servant_ask(&servants[3], spoil_effective); }

int main(int argc, char **argv)
{
	static void (*const become[N_THREADS])(struct servant *) = {
		look, become_capable, become_ordinary, become_weak_root};
	static const struct named steps[] = {{"use", step_use}, {NULL, NULL}};
	static const struct named damages[] = {
		{"uid", damage_uid}, {"fsuid", damage_fsuid}, {"gid", damage_gid}, {"groups", damage_groups},
		{"bounding", damage_bounding}, {"securebits", damage_securebits}, {"ambient", damage_ambient},
		{"privs", damage_privs}, {"effective", damage_effective}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	for (int i = 0; i < N_THREADS; i++)
		start_thread(&servants[i].thread, servant_run, &servants[i]);
	for (int i = 0; i < N_THREADS; i++) {
		servant_ask(&servants[i], become[i]);
		servant_ask(&servants[i], look);
	}
	if (argc > 1 && !strcmp(argv[1], "dropped"))
		become_ordinary(&servants[N_THREADS]);
	look(&servants[N_THREADS]);
	memcpy(start, seen, sizeof start);
	dumpable = prctl(PR_GET_DUMPABLE);
	return serve(&program);
}
