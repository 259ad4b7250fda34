/*
 * s_registers: threads that spin with known patterns in their registers and look at them all the time.
 *
 * One thread for each of: all general registers with the direction flag and the GS base (gpr), the same
 * around a system call that is made again and again (syscall), x87 (x87), SSE with MXCSR (sse), and as the
 * processor has them AVX (avx) and AVX-512 with its masks (avx512). The spinning is assembly from the first load
 * to the last comparison or store, so the compiler cannot keep anything elsewhere. Vector patterns change from
 * round to round. `check` waits until every thread has looked at its registers again; `kinds` names the threads.
 */
#include "workload.h"

#include <asm/prctl.h>
#include <cpuid.h>
#include <ucontext.h>

#define SPINS 20000000ul		/* of a vector round: some ten milliseconds */

/*
 * spin_gpr(table), spin_syscall(table): %rsp is the table, so that the other fifteen registers are free.
 * They come back when a register differs or `stop` is set. Offsets are those of struct table.
 */
__asm__(
"	.macro EACH what\n"
"	\\what rax, 0\n	\\what rbx, 1\n	\\what rcx, 2\n	\\what rdx, 3\n	\\what rsi, 4\n"
"	\\what rdi, 5\n	\\what rbp, 6\n	\\what r8, 7\n	\\what r9, 8\n	\\what r10, 9\n"
"	\\what r11, 10\n	\\what r12, 11\n	\\what r13, 12\n	\\what r14, 13\n	\\what r15, 14\n"
"	.endm\n"
"	.macro LOAD reg, n\n	mov 8*\\n(%rsp), %\\reg\n	.endm\n"
"	.macro SAVE reg, n\n	mov %\\reg, 152+8*\\n(%rsp)\n	.endm\n"
"	.macro LOOK reg, n\n	cmp 8*\\n(%rsp), %\\reg\n	jne 2f\n	.endm\n"
"	.macro ENTER\n"
"	push %rbx\n	push %rbp\n	push %r12\n	push %r13\n	push %r14\n	push %r15\n"
"	mov %rsp, 120(%rdi)\n	mov %rdi, %rsp\n	EACH LOAD\n	std\n"
"	.endm\n"
"	.macro LEAVE\n"
"	EACH SAVE\n	pushfq\n	popq 272(%rsp)\n	cld\n	mov 120(%rsp), %rsp\n"
"	pop %r15\n	pop %r14\n	pop %r13\n	pop %r12\n	pop %rbp\n	pop %rbx\n	ret\n"
"	.endm\n"
"	.macro LOOK_FLAGS\n"
"	pushfq\n	testl $0x400, (%rsp)\n	lea 8(%rsp), %rsp\n	je 2f\n"
"	incq 128(%rsp)\n	cmpq $0, 136(%rsp)\n	je 1b\n"
"	.endm\n"
"	.text\n"
"spin_gpr:\n"
"	ENTER\n"
"1:	EACH LOOK\n	cmp %gs:0, %rax\n	jne 2f\n	LOOK_FLAGS\n"
"2:	LEAVE\n"
"spin_syscall:\n"
"	ENTER\n"
"1:	mov $186, %eax\n	syscall\n"			/* gettid */
"	cmp 144(%rsp), %rax\n	jne 2f\n"
"	LOAD rax, 0\n	LOAD rcx, 2\n	LOAD r11, 10\n"		/* what a system call may change */
"	EACH LOOK\n	cmp %gs:0, %rax\n	jne 2f\n	LOOK_FLAGS\n"
"2:	LEAVE\n");

enum { GPR_NAMES = 15 };
static const char *const NAMES[] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10",
				    "r11", "r12", "r13", "r14", "r15"};

struct table {
	uint64_t expected[GPR_NAMES];
	uint64_t stack, n_rounds, stop, tid;
	uint64_t seen[GPR_NAMES], flags;
};
_Static_assert(offsetof(struct table, stack) == 120 && offsetof(struct table, n_rounds) == 128 &&
	       offsetof(struct table, stop) == 136 && offsetof(struct table, tid) == 144 &&
	       offsetof(struct table, seen) == 152 && offsetof(struct table, flags) == 272, "as the assembly says");

void spin_gpr(struct table *table);
void spin_syscall(struct table *table);

/* spin_VECTOR(patterns, spins): load, spin, store. `live` is set while the registers hold the patterns. */
struct patterns {
	uint8_t in[32][64], out[32][64];
	uint64_t masks_in[8], masks_out[8];		/* at 4096 and 4160 */
	uint32_t control_in, control_out;		/* 4224, 4228: MXCSR, or the x87 control word */
	volatile uint32_t live;				/* 4232 */
	uint8_t fxsave[512] __attribute__((aligned(64)));	/* 4288 */
} __attribute__((aligned(64)));
_Static_assert(offsetof(struct patterns, masks_in) == 4096 && offsetof(struct patterns, control_in) == 4224 &&
	       offsetof(struct patterns, live) == 4232 && offsetof(struct patterns, fxsave) == 4288,
	       "as the assembly says");

__asm__(
"	.macro SPIN\n"
"	movl $1, 4232(%rdi)\n"
"1:	dec %rsi\n	jne 1b\n"
"	movl $0, 4232(%rdi)\n"
"	.endm\n"
"	.text\n"
"spin_x87:\n"
"	fninit\n	fldcw 4224(%rdi)\n"
"	.irp n, 7,6,5,4,3,2,1,0\n	fldt 64*\\n(%rdi)\n	.endr\n"
"	SPIN\n"
"	fxsave64 4288(%rdi)\n	fninit\n	ret\n"
"spin_sse:\n"
"	ldmxcsr 4224(%rdi)\n"
"	.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n	movups 64*\\n(%rdi), %xmm\\n\n	.endr\n"
"	SPIN\n"
"	.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n	movups %xmm\\n, 2048+64*\\n(%rdi)\n	.endr\n"
"	stmxcsr 4228(%rdi)\n	movl $0x1f80, 4232(%rdi)\n	ldmxcsr 4232(%rdi)\n	movl $0, 4232(%rdi)\n"
"	ret\n"
"spin_avx:\n"
"	.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n	vmovups 64*\\n(%rdi), %ymm\\n\n	.endr\n"
"	SPIN\n"
"	.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n	vmovups %ymm\\n, 2048+64*\\n(%rdi)\n	.endr\n"
"	vzeroupper\n	ret\n"
"	.macro ZMM first, what:vararg\n"
"	.irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
"	.ifc \\first, in\n	vmovups 64*\\n(%rdi), %zmm\\n\n"
"	.else\n	vmovups %zmm\\n, 2048+64*\\n(%rdi)\n	.endif\n"
"	.endr\n"
"	.endm\n"
"spin_avx512:\n"
"	ZMM in\n"
"	.irp n, 0,1,2,3,4,5,6,7\n	kmovq 4096+8*\\n(%rdi), %k\\n\n	.endr\n"
"	SPIN\n"
"	ZMM out\n"
"	.irp n, 0,1,2,3,4,5,6,7\n	kmovq %k\\n, 4160+8*\\n(%rdi)\n	.endr\n"
"	vzeroupper\n	ret\n");

void spin_x87(struct patterns *p, uint64_t spins);
void spin_sse(struct patterns *p, uint64_t spins);
void spin_avx(struct patterns *p, uint64_t spins);
void spin_avx512(struct patterns *p, uint64_t spins);

/* ---- the threads ------------------------------------------------------------------------------ */

enum kind { GPR, SYSCALL, X87, SSE, AVX, AVX512, N_KINDS };
static const char *const KINDS[N_KINDS] = {"gpr", "syscall", "x87", "sse", "avx", "avx512"};
static bool present[N_KINDS];
static pid_t tids[N_KINDS];
static _Atomic uint64_t rounds[N_KINDS];
static _Atomic int started;
static struct patterns patterns[N_KINDS];
static struct { char room[32768]; struct table table; } tables[2];	/* room for signal frames */

static void *spin_general(void *argument)
{
	enum kind kind = (enum kind)(uintptr_t)argument;
	struct table *table = &tables[kind].table;

	tids[kind] = (pid_t)syscall(SYS_gettid);
	for (int i = 0; i < GPR_NAMES; i++)
		table->expected[i] = mix64((uint64_t)kind * 100 + (uint64_t)i);
	table->tid = (uint64_t)tids[kind];
	if (syscall(SYS_arch_prctl, ARCH_SET_GS, table))
		die("ARCH_SET_GS");
	atomic_fetch_add(&started, 1);
	if (kind == GPR)
		spin_gpr(table);
	else
		spin_syscall(table);
	for (int i = 0; i < GPR_NAMES; i++)
		EXPECT(table->seen[i] == table->expected[i], "%s: %s is %lx, was %lx", KINDS[kind], NAMES[i],
		       table->seen[i], table->expected[i]);
	fail("%s: flags %lx, GS base or thread id changed", KINDS[kind], table->flags);
	return NULL;
}

/* Which bytes of `in` are loaded and come back, per register. */
static size_t width(enum kind kind)
{
	return kind == X87 ? 10 : kind == SSE ? 16 : kind == AVX ? 32 : 64;
}

static size_t n_registers(enum kind kind)
{
	return kind == X87 ? 8 : kind == AVX512 ? 32 : 16;
}

static void look(enum kind kind, struct patterns *p)
{
	for (size_t i = 0; i < n_registers(kind); i++) {
		const uint8_t *seen = kind == X87 ? p->fxsave + 32 + 16 * i : p->out[i];

		EXPECT(!memcmp(seen, p->in[i], width(kind)), "%s: register %zu changed", KINDS[kind], i);
	}
	for (int i = 0; kind == AVX512 && i < 8; i++)
		EXPECT(p->masks_in[i] == p->masks_out[i], "avx512: mask %d is %lx, was %lx", i,
		       p->masks_out[i], p->masks_in[i]);
	if (kind == X87)
		EXPECT((p->fxsave[0] | p->fxsave[1] << 8) == (int)p->control_in, "x87: another control word");
	if (kind == SSE)
		EXPECT(p->control_in == p->control_out, "sse: MXCSR is %x, was %x", p->control_out,
		       p->control_in);
}

static void *spin_vector(void *argument)
{
	enum kind kind = (enum kind)(uintptr_t)argument;
	struct patterns *p = &patterns[kind];
	uint64_t random = (uint64_t)kind;

	tids[kind] = (pid_t)syscall(SYS_gettid);
	p->control_in = kind == X87 ? 0x0b7f : 0xbf80;	/* rounding up; rounding down, flush to zero */
	for (;;) {
		for (size_t i = 0; i < sizeof p->in / 8; i++)
			((uint64_t *)(void *)p->in)[i] = next_random(&random);
		for (int i = 0; i < 8; i++) {
			p->masks_in[i] = next_random(&random);
			if (kind == X87)		/* a normal number: exponent in range, integer bit set */
				memcpy(p->in[i] + 7, (uint8_t[]){0x80 | (uint8_t)i, (uint8_t)i, 0x40}, 3);
		}
		if (atomic_load(&rounds[kind]) == 0)
			atomic_fetch_add(&started, 1);
		switch (kind) {
		case X87: spin_x87(p, SPINS); break;
		case SSE: spin_sse(p, SPINS); break;
		case AVX: spin_avx(p, SPINS); break;
		default: spin_avx512(p, SPINS);
		}
		look(kind, p);
		atomic_fetch_add(&rounds[kind], 1);
	}
	return NULL;
}

/* ---- protocol --------------------------------------------------------------------------------- */

static uint64_t n_rounds(int kind)
{
	return kind <= SYSCALL ? *(volatile uint64_t *)&tables[kind].table.n_rounds : atomic_load(&rounds[kind]);
}

/* Every thread has looked at what it had when this was called, or something is already known to be wrong. */
static void check(void)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 30 * NS_PER_S;
	uint64_t before[N_KINDS];

	for (int kind = 0; kind < N_KINDS; kind++)
		before[kind] = n_rounds(kind);
	for (int kind = 0; kind < N_KINDS; kind++)
		while (present[kind] && n_rounds(kind) < before[kind] + 1 + (kind <= SYSCALL) &&
		       !atomic_load(&verdict.state)) {
			if (now_ns(CLOCK_MONOTONIC) > give_up)
				fail("%s does not go on", KINDS[kind]);
			sched_yield();
		}
}

static volatile int damaged;
static unsigned xstate_offset[8];

/* In the thread: change one register in the frame that it returns to. */
static void damage(int number, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;
	uint8_t *state = (uint8_t *)uc->uc_mcontext.fpregs;
	int kind = info->si_value.sival_int;

	(void)number;
	if (damaged)
		return;			/* sent once too often: a second flip would heal it */
	if (kind <= SYSCALL) {
		uc->uc_mcontext.gregs[REG_R12] ^= 1;
		damaged = 1;
		return;
	}
	if (!patterns[kind].live)
		return;
	switch (kind) {
	case X87: state[32 + 16 * 3] ^= 1; break;		/* st(3) */
	case SSE: state[160 + 16 * 5] ^= 1; break;		/* xmm5 */
	case AVX: state[xstate_offset[2] + 16 * 5] ^= 1; break;	/* upper half of ymm5 */
	default: state[xstate_offset[6] + 32 * 5] ^= 1;		/* upper half of zmm5 */
	}
	damaged = 1;
}

static void corrupt(enum kind kind)
{
	struct sigaction action = {.sa_sigaction = damage, .sa_flags = SA_SIGINFO | SA_RESTART};
	siginfo_t info = {.si_code = SI_QUEUE, .si_value.sival_int = (int)kind};

	if (!present[kind])
		return fail("this processor has no %s", KINDS[kind]);
	sigaction(SIGUSR1, &action, NULL);
	damaged = 0;
	while (!damaged) {
		syscall(SYS_rt_tgsigqueueinfo, getpid(), tids[kind], SIGUSR1, &info);
		sched_yield();
	}
}

static void corrupt_gpr(void) { corrupt(GPR); }
static void corrupt_syscall(void) { corrupt(SYSCALL); }
static void corrupt_x87(void) { corrupt(X87); }
static void corrupt_sse(void) { corrupt(SSE); }
static void corrupt_avx(void) { corrupt(AVX); }
static void corrupt_avx512(void) { corrupt(AVX512); }

static void kinds(char *argument)
{
	char text[128] = "kinds";

	(void)argument;
	for (int kind = 0; kind < N_KINDS; kind++)
		if (present[kind])
			sprintf(text + strlen(text), " %s", KINDS[kind]);
	say("%s", text);
}

int main(void)
{
	static const struct named steps[] = {{"run", check}, {NULL, NULL}};
	static const struct named damages[] = {
		{"gpr", corrupt_gpr}, {"syscall", corrupt_syscall}, {"x87", corrupt_x87}, {"sse", corrupt_sse},
		{"avx", corrupt_avx}, {"avx512", corrupt_avx512}, {NULL, NULL}};
	static const struct command others[] = {{"kinds", kinds}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, others};
	int n_present = 0;

	for (int kind = 0; kind < N_KINDS; kind++) {
		pthread_t thread;

		present[kind] = kind <= SSE || (kind == AVX && __builtin_cpu_supports("avx")) ||
				(kind == AVX512 && __builtin_cpu_supports("avx512bw"));
		if (!present[kind])
			continue;
		n_present++;
		start_thread(&thread, kind <= SYSCALL ? spin_general : spin_vector, (void *)(uintptr_t)kind);
	}
	for (unsigned i = 2; i < LEN(xstate_offset); i++) {
		unsigned a, c, d;

		__cpuid_count(0xd, i, a, xstate_offset[i], c, d);
	}
	while (atomic_load(&started) < n_present)
		sched_yield();
	return serve(&program);
}
