/*
 * s_rseq: restartable sequences, as the C library registers them for each thread.
 *
 * Three threads run a critical section of a quarter of a millisecond without end. The section notes twice, from the processor
 * itself, where and when it runs, and commits with one instruction. Had it been interrupted (moved, preempted, stopped, or
 * brought back from an image in the middle) and gone on nevertheless, the two notes or the registered cpu number would
 * disagree, or lie far apart in time: then the kernel or whoever stopped it has not sent it to its abort handler.
 * `check` moves each thread to every processor and wants the registered number to follow. `counts` answers how often sections
 * were committed and aborted.
 */
#include "workload.h"

#include <sys/rseq.h>

#define N_THREADS 3
#define SPINS 250000ul
#define LONGEST_TICKS 2000000000ul	/* of the time stamp counter: no section takes so long uninterrupted */

struct notes {				/* offsets as in the assembly */
	uint64_t n_commits;		/* 0 */
	uint64_t began, ended;		/* 8, 16: time stamps */
	uint32_t registered;		/* 24: cpu number in the registered area, at the beginning */
	uint32_t cpu_began, cpu_ended;	/* 28, 32: from the processor */
};

/* section(area, notes, spins): 0 committed, 1 aborted */
__asm__(
"	.pushsection .data.rel.local, \"aw\"\n"
"	.balign 32\n"
"descriptor:\n"
"	.long 0, 0\n"
"	.quad 1f, 3f - 1f, 5f\n"
"	.popsection\n"
"	.text\n"
"section:\n"
"	push %rbx\n"
"	mov %rdx, %rbx\n"
"	lea descriptor(%rip), %rax\n"
"	mov %rax, 8(%rdi)\n"			/* rseq_cs: armed */
"1:	mov 4(%rdi), %r10d\n"			/* cpu_id */
"	rdtscp\n"
"	shl $32, %rdx\n	or %rax, %rdx\n	mov %rdx, %r8\n	mov %ecx, %r9d\n"
"2:	dec %rbx\n	jnz 2b\n"
"	rdtscp\n"
"	shl $32, %rdx\n	or %rax, %rdx\n"
"	incq (%rsi)\n"				/* the commit */
"3:	movq $0, 8(%rdi)\n"
"	mov %r8, 8(%rsi)\n	mov %rdx, 16(%rsi)\n"
"	mov %r10d, 24(%rsi)\n	mov %r9d, 28(%rsi)\n	mov %ecx, 32(%rsi)\n"
"	xor %eax, %eax\n	pop %rbx\n	ret\n"
"	.byte 0x0f, 0xb9, 0x3d\n"		/* makes the signature an instruction that traps */
"	.long 0x53053053\n"
"5:	mov $1, %eax\n	pop %rbx\n	ret\n");

int section(struct rseq *area, struct notes *notes, uint64_t spins);

static struct worker {
	pid_t tid;
	struct notes notes;
	uint64_t n_committed, n_aborted;
	struct rseq *area;
	_Atomic int progress, moved_to, unregister;
} workers[N_THREADS];
static _Atomic int started;

static struct rseq *own_area(void)
{
	return (struct rseq *)(void *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

static void look(struct worker *w)
{
	const struct notes *n = &w->notes;
	uint32_t cpu = n->cpu_began & 0xfff;		/* above are the bits of the memory node */

	EXPECT(n->n_commits == w->n_committed, "%lu commits, counted %lu", n->n_commits, w->n_committed);
	EXPECT(n->cpu_began == n->cpu_ended, "a section began on cpu %u and ended on %u", cpu,
	       n->cpu_ended & 0xfff);
	EXPECT(n->registered == cpu, "cpu %u, but registered is %u", cpu, n->registered);
	EXPECT(n->ended - n->began < LONGEST_TICKS, "a section went on for %lu ticks", n->ended - n->began);
}

static void *work(void *argument)
{
	struct worker *w = argument;

	w->tid = (pid_t)syscall(SYS_gettid);
	w->area = own_area();
	atomic_fetch_add(&started, 1);
	for (;;) {
		if (atomic_exchange(&w->unregister, 0))
			syscall(SYS_rseq, w->area, 32, 1 /* RSEQ_FLAG_UNREGISTER */, RSEQ_SIG);
		if (section(w->area, &w->notes, SPINS)) {
			w->n_aborted++;
			continue;
		}
		w->n_committed++;
		look(w);
		atomic_store(&w->moved_to, (int)(w->notes.cpu_began & 0xfff));
		atomic_fetch_add(&w->progress, 1);
		futex_wake_all(&w->progress);
	}
	return NULL;
}

/* Wait until a section that began after this call has been committed, there. */
static void await_commit(struct worker *w, int cpu)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 20 * NS_PER_S;
	int start = atomic_load(&w->progress), now;

	while (((now = atomic_load(&w->progress)) - start < 2 || atomic_load(&w->moved_to) != cpu) &&
	       !atomic_load(&verdict.state)) {
		if (now_ns(CLOCK_MONOTONIC) > give_up)
			return fail("no section is committed on cpu %d", cpu);
		futex_wait(&w->progress, now, NS_PER_S);
	}
}

static void check(void)
{
	cpu_set_t all, one;

	sched_getaffinity(0, sizeof all, &all);
	for (struct worker *w = workers; w < workers + N_THREADS; w++) {
		for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
			if (!CPU_ISSET(cpu, &all))
				continue;
			CPU_ZERO(&one);
			CPU_SET(cpu, &one);
			sched_setaffinity(w->tid, sizeof one, &one);
			await_commit(w, cpu);
		}
		sched_setaffinity(w->tid, sizeof all, &all);
	}
	EXPECT(own_area()->cpu_id < CPU_SETSIZE, "the main thread is on cpu %u", own_area()->cpu_id);
}

static void damage_registration(void)
{
	atomic_store(&workers[1].unregister, 1);
}

/* As if a commit had been lost. */
static void damage_count(void)
{
	workers[0].n_committed++;
}

static void counts(char *argument)
{
	uint64_t commits = 0, aborts = 0;

	(void)argument;
	for (int i = 0; i < N_THREADS; i++) {
		commits += workers[i].n_committed;
		aborts += workers[i].n_aborted;
	}
	say("counts %lu %lu", commits, aborts);
}

int main(void)
{
	static const struct named steps[] = {{"run", check}, {NULL, NULL}};
	static const struct named damages[] = {
		{"registration", damage_registration}, {"count", damage_count}, {NULL, NULL}};
	static const struct command others[] = {{"counts", counts}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, others};

	if (__rseq_size == 0)
		die("the C library has registered no restartable sequences");
	for (int i = 0; i < N_THREADS; i++) {
		pthread_t thread;

		start_thread(&thread, work, &workers[i]);
	}
	while (atomic_load(&started) < N_THREADS)
		sched_yield();
	return serve(&program);
}
