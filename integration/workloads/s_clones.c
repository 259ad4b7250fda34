/*
 * s_clones: processes that clone() has made to share what only threads share as a rule. Each argument makes one; without
 * arguments, those that have memory of their own.
 *
 *     files      the table of descriptors
 *     fs         working directory and file mode mask
 *     both       these two
 *     sibling    the table, with the first one that shares it; a child of the parent all the same (CLONE_PARENT)
 *     memory     memory
 *     handlers   memory and signal handlers
 *     all        all of that
 *
 * A kid obeys by a pipe: it changes what is its own or the parent's, and the parent looks whether it has changed here; or
 * the other way round. What must not be shared must not change.
 */
#include "workload.h"

#include <linux/sched.h>

#define STACK (64 << 10)
#define HIGH 500		/* above what any of them has open */

struct kid {
	const char *name;
	int flags;
	pid_t pid;
	bool made;
	int ask[2], answer[2];
	char *stack;
	int standing;		/* a descriptor that it has opened, and keeps */
};

static struct kid kids[] = {
	{.name = "files", .flags = CLONE_FILES},
	{.name = "fs", .flags = CLONE_FS},
	{.name = "both", .flags = CLONE_FILES | CLONE_FS},
	{.name = "sibling", .flags = CLONE_FILES | CLONE_PARENT},
	{.name = "memory", .flags = CLONE_VM},
	{.name = "handlers", .flags = CLONE_VM | CLONE_SIGHAND},
	{.name = "all", .flags = CLONE_VM | CLONE_SIGHAND | CLONE_FILES | CLONE_FS},
};
#define N_KIDS LEN(kids)

static pid_t parent;
static char home[512], folder[600], file[600];
static volatile int counter;
static mode_t masks[] = {022, 027};
static int turn;

static void handler_a(int sig) { (void)sig; }
static void handler_b(int sig) { (void)sig; }

/* ---- a kid: its memory may be the parent's, which does nothing until it has answered ---------------- */

static void set_handler(void (*handler)(int))
{
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};

	if (sigaction(SIGUSR2, &action, NULL))
		die("sigaction");
}

static void (*get_handler(void))(int)
{
	struct sigaction action;

	if (sigaction(SIGUSR2, NULL, &action))
		die("sigaction");
	return action.sa_handler;
}

static int obey_order(char order, int argument)
{
	char where[600];
	mode_t mask;

	switch (order) {
	case 'o':
		return open(file, O_RDONLY);
	case 'x':
		return close(argument);
	case 'f':
		return fcntl(argument, F_GETFD) >= 0 ? (int)lseek(argument, 0, SEEK_CUR) : -1;
	case 'd':
		return chdir(argument ? folder : home);
	case 'w':
		return getcwd(where, sizeof where) && !strcmp(where, argument ? folder : home);
	case 'm':
		return (int)umask((mode_t)argument);
	case 'u':
		mask = umask(0);
		umask(mask);
		return (int)mask;
	case '+':
		return ++counter;
	case 'h':
		set_handler(argument ? handler_b : handler_a);
		return 0;
	case 'g':
		return get_handler() == handler_b;
	case 'F':
		return fcntl(argument, F_GETFD) >= 0;
	case 'U':
		return unshare(argument);
	case 'P':
		return (int)getppid();
	}
	_exit(0);
}

struct message {
	int argument;
	char order;
};

static int be_kid(void *argument)
{
	struct kid *kid = argument;
	struct message message;

	while (read(kid->ask[0], &message, sizeof message) == sizeof message) {
		int result;

		if (message.order == 'B') {		/* bear the sibling */
			struct kid *other = &kids[message.argument];

			result = (int)syscall(SYS_clone, other->flags | SIGCHLD, 0, 0, 0, 0);
			if (result == 0) {
				kid = other;
				continue;
			}
		} else {
			result = obey_order(message.order, message.argument);
		}
		write_all(kid->answer[1], &result, sizeof result);
	}
	_exit(0);
}

static int ask(struct kid *kid, char order, int argument)
{
	struct message message = {.order = order, .argument = argument};
	int result;
	ssize_t n;

	write_all(kid->ask[1], &message, sizeof message);
	while ((n = read(kid->answer[0], &result, sizeof result)) < 0 && errno == EINTR)
		;
	if (n != sizeof result)
		die("%s does not answer", kid->name);
	return result;
}

/* ---- the parent ------------------------------------------------------------------------------------- */

static void make(struct kid *kid)
{
	if (kid->flags & CLONE_PARENT) {
		kid->pid = ask(&kids[0], 'B', (int)(kid - kids));
	} else if (kid->flags & CLONE_VM) {
		kid->stack = map_anonymous(STACK / PAGE);
		kid->pid = clone(be_kid, kid->stack + STACK, kid->flags | SIGCHLD, kid);
	} else {
		kid->pid = (pid_t)syscall(SYS_clone, kid->flags | SIGCHLD, 0, 0, 0, 0);
		if (kid->pid == 0)
			be_kid(kid);
	}
	if (kid->pid < 0)
		die("clone %s", kid->name);
	kid->made = true;
}

static void check_files(struct kid *kid)
{
	bool shared = kid->flags & CLONE_FILES;
	int fd, own;

	/* One that stands open since before. */
	EXPECT(ask(kid, 'f', kid->standing) >= 0, "%s has lost its descriptor", kid->name);
	/* What one opens the other can use; what one closes is closed for the other. */
	own = fcntl(0, F_DUPFD, HIGH);
	EXPECT((ask(kid, 'F', own) == 1) == shared, "%s: what is opened here is %sthere", kid->name, shared ? "not " : "");
	close(own);
	if (!shared)
		return;
	EXPECT(lseek(kid->standing, 0, SEEK_CUR) >= 0, "%s: its descriptor %d is not here", kid->name, kid->standing);
	fd = ask(kid, 'o', 0);
	EXPECT(lseek(fd, 1, SEEK_SET) == 1, "%s: what it opens is not here", kid->name);
	EXPECT(ask(kid, 'f', fd) == 1, "%s: its offset", kid->name);
	close(fd);
	EXPECT(ask(kid, 'f', fd) == -1, "%s: what is closed is not closed for it", kid->name);
}

static void check_fs(struct kid *kid)
{
	bool shared = kid->flags & CLONE_FS;

	EXPECT(obey_order('w', turn), "%s: the parent is not where it was", kid->name);
	EXPECT(ask(kid, 'w', shared ? turn : 0), "%s is not where it was", kid->name);
	EXPECT(obey_order('u', 0) == (int)masks[turn], "the mask is 0%o", obey_order('u', 0));
	EXPECT(ask(kid, 'u', 0) == (int)masks[shared ? turn : 0], "%s: its mask is 0%o", kid->name, ask(kid, 'u', 0));
	ask(kid, 'd', 1);
	ask(kid, 'm', 077);
	EXPECT(!!obey_order('w', 1) == (shared || turn == 1), "%s: where it goes", kid->name);
	EXPECT((obey_order('u', 0) == 077) == shared, "%s: what it masks", kid->name);
	ask(kid, 'd', shared ? turn : 0);
	ask(kid, 'm', (int)masks[shared ? turn : 0]);
}

static void check_memory(struct kid *kid)
{
	bool shared = kid->flags & CLONE_VM;
	int before = counter, told;

	told = ask(kid, '+', 0);
	EXPECT((counter == before + 1) == shared, "%s: what it counts is %sseen", kid->name, shared ? "not " : "");
	if (shared)
		EXPECT(told == before + 1, "%s counts %d, not %d", kid->name, told, before + 1);
}

static void check_handlers(struct kid *kid)
{
	bool shared = kid->flags & CLONE_SIGHAND;

	EXPECT(get_handler() == (turn ? handler_b : handler_a), "the handler is another");
	EXPECT(ask(kid, 'g', 0) == (shared ? turn : 0), "%s: its handler is another", kid->name);
	set_handler(turn ? handler_a : handler_b);
	EXPECT(ask(kid, 'g', 0) == (shared ? !turn : 0), "%s: a handler that is set here", kid->name);
	set_handler(turn ? handler_b : handler_a);
}

static void check(void)
{
	for (size_t i = 0; i < N_KIDS; i++) {
		if (!kids[i].made)
			continue;
		EXPECT(ask(&kids[i], 'P', 0) == parent, "%s: its parent is %d", kids[i].name, ask(&kids[i], 'P', 0));
		check_files(&kids[i]);
		check_fs(&kids[i]);
		check_memory(&kids[i]);
		check_handlers(&kids[i]);
	}
}

/* Others change with it: directory, mask, handler, the descriptors that stand open. */
static void change(void)
{
	turn = !turn;
	obey_order('d', turn);
	umask(masks[turn]);
	set_handler(turn ? handler_b : handler_a);
	for (size_t i = 0; i < N_KIDS; i++) {
		if (!kids[i].made)
			continue;
		ask(&kids[i], 'x', kids[i].standing);
		kids[i].standing = ask(&kids[i], 'o', 0);
	}
}

/* By default the plain ones. */
static void prepare(int argc, char **argv)
{
	static const char content[] = "some text";
	int fd;

	parent = getpid();
	if (!getcwd(home, sizeof home))
		die("getcwd");
	snprintf(folder, sizeof folder, "%s/s_clones-%d.d", home, parent);
	snprintf(file, sizeof file, "%s/s_clones-%d.data", home, parent);
	fd = open(file, O_CREAT | O_WRONLY, 0600);
	if (mkdir(folder, 0700) || fd < 0)
		die("prepare");
	write_all(fd, content, sizeof content);
	close(fd);
	umask(masks[0]);
	set_handler(handler_a);
	for (size_t i = 0; i < N_KIDS; i++)
		if (pipe(kids[i].ask) || pipe(kids[i].answer))
			die("pipe");
	for (size_t i = 0; i < N_KIDS; i++) {
		bool wanted = argc == 1 && !(kids[i].flags & CLONE_VM);

		for (int k = 1; k < argc; k++)
			wanted |= !strcmp(argv[k], kids[i].name);
		if (wanted)
			make(&kids[i]);
	}
	for (size_t i = 0; i < N_KIDS; i++)
		if (kids[i].made)
			kids[i].standing = ask(&kids[i], 'o', 0);
}

static void damage_files(void) { ask(&kids[0], 'U', CLONE_FILES); }
static void damage_fs(void) { ask(&kids[1], 'U', CLONE_FS); }
static void damage_mask(void) { ask(&kids[1], 'm', 0); }
static void damage_handler(void) { set_handler(turn ? handler_a : handler_b); }
static void damage_closed(void) { close(kids[0].standing); }

int main(int argc, char **argv)
{
	static const struct named steps[] = {{"change", change}, {NULL, NULL}};
	static const struct named damages[] = {
		{"files", damage_files}, {"fs", damage_fs}, {"mask", damage_mask},
		{"handler", damage_handler}, {"closed", damage_closed}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};
	int result;

	prepare(argc, argv);
	result = serve(&program);
	/* They may have the other end of their own pipes: none of them hears the end of its orders. */
	for (size_t i = 0; i < N_KIDS; i++)
		if (kids[i].made && kill(kids[i].pid, SIGKILL) == 0)
			waitpid(kids[i].pid, NULL, 0);
	return result;
}
