/*
 * s_signals [all]: what a process has decided about every signal, and the signals that wait for it.
 *
 * All signals but two of the C library's and the two that cannot be changed get an action by the raw system call:
 * default, ignored, or a handler with one of many combinations of flags and masks, some with a restorer of our own.
 * Signals of several codes are pending for the process (not for a thread), real-time ones more than once, one
 * SIGCHLD made by the kernel. SIGURG stays at its default, unless `all`: then no signal that is ignored by default
 * is left without a handler. `step raise` sends what may be sent and verifies the handlers' surroundings.
 */
#include "workload.h"

#define MAX_PENDING 12
#define RESTORER 0x04000000ul		/* SA_RESTORER */

struct action {				/* struct kernel_sigaction */
	void (*handler)(int, siginfo_t *, void *);
	unsigned long flags;
	void (*restorer)(void);
	uint64_t mask;
};

static struct action actions[65];
static siginfo_t pending[MAX_PENDING];
static int n_pending;
static uint64_t blocked;
static volatile int handled[65];
static int sent[65];
static volatile uint64_t mask_inside[65];
static volatile long value_inside[65];

void own_restorer(void);
__asm__("	.text\nown_restorer:\n	mov $15, %eax\n	syscall\n");	/* rt_sigreturn */

static uint64_t bit(int number)
{
	return 1ull << (number - 1);
}

static uint64_t current_mask(void)
{
	uint64_t mask = 0;

	syscall(SYS_rt_sigprocmask, SIG_SETMASK, NULL, &mask, sizeof mask);
	return mask;
}

static void handle(int number, siginfo_t *info, void *context)
{
	(void)context;
	mask_inside[number] = current_mask();
	if (actions[number].flags & SA_SIGINFO)
		value_inside[number] = (long)info->si_value.sival_ptr;
	handled[number]++;
}

static void handle_otherwise(int number, siginfo_t *info, void *context)
{
	handle(number, info, context);
}

static bool changeable(int number)
{
	return number != SIGKILL && number != SIGSTOP && number != 32 && number != 33;
}

static void set_action(int number, const struct action *action)
{
	if (syscall(SYS_rt_sigaction, number, action, NULL, sizeof action->mask))
		die("rt_sigaction %d", number);
}

static void prepare_actions(bool all)
{
	static const unsigned long flags[] = {
		SA_RESTART, SA_NODEFER, SA_ONSTACK, SA_SIGINFO, SA_RESTART | SA_SIGINFO | SA_NODEFER,
		SA_RESETHAND, SA_NOCLDSTOP, SA_NOCLDWAIT, SA_SIGINFO | SA_ONSTACK | SA_RESETHAND, 0};
	struct action libc;

	/* The restorer that the C library uses: learnt from an action that it has set itself. */
	signal(SIGUSR1, SIG_IGN);
	syscall(SYS_rt_sigaction, SIGUSR1, NULL, &libc, sizeof libc.mask);
	for (int i = 1; i <= 64; i++) {
		struct action *a = &actions[i];

		if (!changeable(i))
			continue;
		a->flags = flags[(size_t)i % LEN(flags)] | RESTORER;
		a->mask = mix64((uint64_t)i) & ~(bit(SIGKILL) | bit(SIGSTOP));
		a->restorer = i % 3 ? libc.restorer : own_restorer;
		a->handler = i % 2 ? handle : handle_otherwise;
		if (i % 7 == 3)
			a->handler = (void (*)(int, siginfo_t *, void *))(uintptr_t)SIG_IGN;
		if (i % 7 == 5 || (i == SIGURG && !all))
			*a = (struct action){.handler = NULL};
		set_action(i, a);
	}
	actions[SIGCHLD] = (struct action){.handler = handle, .flags = SA_NOCLDSTOP | SA_RESTART | RESTORER,
					   .restorer = libc.restorer};
	set_action(SIGCHLD, &actions[SIGCHLD]);
}

static void queue(int number, int code, long value)
{
	siginfo_t *info = &pending[n_pending++];

	info->si_signo = number;
	info->si_code = code;
	info->si_pid = (pid_t)(3000 + value);
	info->si_uid = 6000;
	info->si_value.sival_ptr = (void *)(0x567800000000 + value);
	if (syscall(SYS_rt_sigqueueinfo, getpid(), number, info))
		die("rt_sigqueueinfo");
}

/* As the kernel hands them out: by number, those of one number as they came. */
static void prepare_pending(void)
{
	struct timespec none = {0, 0};
	uint64_t child_only = bit(SIGCHLD);
	pid_t child;

	blocked = bit(SIGUSR2) | bit(SIGCHLD) | bit(SIGTERM) | bit(40) | bit(50) | bit(63);
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &blocked, NULL, sizeof blocked);
	queue(SIGUSR2, SI_QUEUE, 1);
	queue(SIGTERM, SI_USER, 2);
	pending[n_pending - 1].si_value.sival_ptr = NULL;
	child = fork();
	if (child == 0)
		_exit(42);
	while (waitpid(child, NULL, 0) < 0)
		;
	/* Taken out and put back, to learn what the kernel wrote. */
	syscall(SYS_rt_sigtimedwait, &child_only, &pending[n_pending++], &none, sizeof child_only);
	syscall(SYS_rt_sigqueueinfo, getpid(), SIGCHLD, &pending[n_pending - 1]);
	queue(40, SI_QUEUE, 4);
	queue(40, SI_QUEUE, 5);
	queue(40, SI_ASYNCIO, 6);
	queue(50, -77, 7);
	queue(63, SI_MESGQ, 8);
}

static void check_pending(void)
{
	siginfo_t got[MAX_PENDING + 1];
	uint64_t all = ~0ull, own = 0, shared = 0, expected = 0;
	struct timespec none = {0, 0};
	FILE *status = fopen("/proc/self/status", "re");
	char line[256];
	int n = 0;

	while (status && fgets(line, sizeof line, status)) {
		sscanf(line, "SigPnd: %lx", &own);
		sscanf(line, "ShdPnd: %lx", &shared);
	}
	fclose(status);
	for (int i = 0; i < n_pending; i++)
		expected |= bit(pending[i].si_signo);
	EXPECT(own == 0 && shared == expected, "pending for the thread %lx, for the process %lx, was %lx", own,
	       shared, expected);
	EXPECT(current_mask() == blocked, "blocked are %lx, were %lx", current_mask(), blocked);
	while (n <= MAX_PENDING && syscall(SYS_rt_sigtimedwait, &all, &got[n], &none, sizeof all) > 0)
		n++;
	EXPECT(n == n_pending, "%d signals are pending, were %d", n, n_pending);
	for (int i = 0; i < n && i < n_pending; i++) {
		const siginfo_t *is = &got[i], *was = &pending[i];

		EXPECT(is->si_signo == was->si_signo && is->si_code == was->si_code &&
		       is->si_pid == was->si_pid && is->si_uid == was->si_uid &&
		       (was->si_code == SI_USER || is->si_value.sival_ptr == was->si_value.sival_ptr),
		       "pending %d is signal %d code %d pid %d value %p, was %d, %d, %d, %p", i, is->si_signo,
		       is->si_code, is->si_pid, is->si_value.sival_ptr, was->si_signo, was->si_code,
		       was->si_pid, was->si_value.sival_ptr);
		EXPECT(was->si_signo != SIGCHLD || (is->si_status == 42 && is->si_code == CLD_EXITED),
		       "the child's end says status %d", is->si_status);
	}
	for (int i = 0; i < n; i++)
		syscall(SYS_rt_sigqueueinfo, getpid(), got[i].si_signo, &got[i]);
}

static void check(void)
{
	for (int i = 1; i <= 64; i++) {
		struct action is;

		if (!changeable(i))
			continue;
		syscall(SYS_rt_sigaction, i, NULL, &is, sizeof is.mask);
		EXPECT(is.handler == actions[i].handler && is.flags == actions[i].flags &&
		       is.restorer == actions[i].restorer && is.mask == actions[i].mask,
		       "signal %d: handler %p flags %lx restorer %p mask %lx", i,
		       (void *)(uintptr_t)is.handler, is.flags, (void *)(uintptr_t)is.restorer, is.mask);
		EXPECT(handled[i] == sent[i], "signal %d was handled %d times, sent %d times", i, handled[i],
		       sent[i]);
	}
	check_pending();
}

static void send_one(int number)
{
	const struct action *a = &actions[number];
	long value = (long)mix64((uint64_t)sent[number]);
	siginfo_t info = {.si_signo = number, .si_code = SI_QUEUE, .si_value.sival_ptr = (void *)value};
	bool is_handler = a->handler == handle || a->handler == handle_otherwise;

	if (blocked & bit(number) || !changeable(number) || !a->handler)
		return;
	syscall(SYS_rt_sigqueueinfo, getpid(), number, &info);
	if (!is_handler)
		return;				/* ignored: nothing may happen */
	sent[number]++;
	EXPECT(mask_inside[number] == (blocked | a->mask | (a->flags & SA_NODEFER ? 0 : bit(number))),
	       "signal %d was handled with mask %lx", number, mask_inside[number]);
	EXPECT(!(a->flags & SA_SIGINFO) || value_inside[number] == value,
	       "signal %d came with %lx, not %lx", number, value_inside[number], value);
	if (a->flags & SA_RESETHAND)
		set_action(number, a);
}

static void raise_all(void)
{
	for (int i = 1; i <= 64; i++)
		send_one(i);
}

static void change_action(int number, int what)
{
	struct action changed = actions[number];

	changed.handler = what == 0 ? handle_otherwise : changed.handler;
	changed.flags ^= what == 1 ? SA_RESTART : 0;
	changed.restorer = what == 2 ? own_restorer : changed.restorer;
	changed.mask ^= what == 3 ? bit(SIGHUP) : 0;
	set_action(number, &changed);
}

static void damage_handler(void) { change_action(SIGCHLD, 0); }
static void damage_flags(void) { change_action(SIGCHLD, 1); }
static void damage_restorer(void) { change_action(SIGCHLD, 2); }
static void damage_mask(void) { change_action(SIGCHLD, 3); }
static void damage_ignored(void) { signal(SIGQUIT, SIG_DFL); }
static void damage_blocked(void) { uint64_t more = blocked | 1; syscall(SYS_rt_sigprocmask, SIG_SETMASK, &more, 0, 8); }

static siginfo_t take(int number)
{
	uint64_t set = bit(number);
	struct timespec none = {0, 0};
	siginfo_t info = {.si_signo = 0};

	syscall(SYS_rt_sigtimedwait, &set, &info, &none, sizeof set);
	return info;
}

static void damage_pending(void)
{
	take(63);
}

static void damage_value(void)
{
	siginfo_t info = take(50);

	info.si_value.sival_int ^= 1;
	syscall(SYS_rt_sigqueueinfo, getpid(), 50, &info);
}

static void damage_order(void)
{
	siginfo_t info = take(40);

	syscall(SYS_rt_sigqueueinfo, getpid(), 40, &info);
}

/* Pending as before, but for the thread. */
static void damage_shared(void)
{
	siginfo_t info = take(63);

	syscall(SYS_rt_tgsigqueueinfo, getpid(), getpid(), 63, &info);
}

int main(int argc, char **argv)
{
	static const struct named steps[] = {{"raise", raise_all}, {NULL, NULL}};
	static const struct named damages[] = {
		{"handler", damage_handler}, {"flags", damage_flags}, {"restorer", damage_restorer},
		{"mask", damage_mask}, {"ignored", damage_ignored}, {"blocked", damage_blocked},
		{"pending", damage_pending}, {"value", damage_value}, {"order", damage_order},
		{"shared", damage_shared}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};
	stack_t stack = {.ss_sp = map_anonymous(16), .ss_size = 16 * PAGE};

	sigaltstack(&stack, NULL);
	prepare_actions(argc > 1 && !strcmp(argv[1], "all"));
	prepare_pending();
	return serve(&program);
}
