/*
 * A heartbeat inside a program: how long it stood still, as it felt it itself, and a board over which a bench speaks with it.
 *
 * The board is one private page at a fixed address. The bench reads and writes it with process_vm_readv and process_vm_writev, so the
 * program needs no descriptor that leads outside, and can be asked in the same way after it was brought back by whatever tool.
 *
 * A thread reads CLOCK_REALTIME every 50 microseconds and keeps the longest gap between two readings, and where it began: the
 * other clocks may stand still while the process does not exist (time_namespaces(7)). It runs as SCHED_FIFO, so that no other thread
 * of the machine is taken for a standstill; where that is forbidden, gaps are upper bounds.
 */
#ifndef BEAT_H
#define BEAT_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define BOARD_ADDRESS 0x100000000000ul
#define BOARD_PAGE 4096ul
#define BEAT_NS 50000
#define NS_PER_S 1000000000ll

/* Every field is 8 bytes wide; integration/bench/target.py lists them in this order. */
struct board {
	_Atomic int64_t n_beats;
	_Atomic int64_t longest;	/* ns; the bench sets it to 0 */
	_Atomic int64_t longest_from;	/* CLOCK_REALTIME, ns */
	_Atomic int64_t n_written;	/* by the thread that writes */
	_Atomic int64_t rate;		/* pages per second that it shall write */
	_Atomic int64_t spins;		/* if not 0: compute so long between two pages, and keep no rate */
	_Atomic int64_t command, argument, asked, answered, answer;
	_Atomic int64_t area, n_pages;	/* the memory that is written */
};

static struct board *const board = (struct board *)BOARD_ADDRESS;

static inline void die(const char *what)
{
	perror(what);
	_exit(3);
}

static inline int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return ts.tv_sec * NS_PER_S + ts.tv_nsec;
}

static inline void sleep_ns(int64_t ns)
{
	struct timespec ts = {.tv_sec = ns / NS_PER_S, .tv_nsec = ns % NS_PER_S};

	clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, NULL);
}

static void *beat(void *nothing)
{
	struct sched_param urgent = {.sched_priority = 1};
	int64_t latest = now_ns();

	pthread_setschedparam(pthread_self(), SCHED_FIFO, &urgent);
	for (;;) {
		int64_t now = now_ns();

		if (now - latest > atomic_load(&board->longest)) {
			atomic_store(&board->longest_from, latest);
			atomic_store(&board->longest, now - latest);
		}
		latest = now;
		atomic_fetch_add(&board->n_beats, 1);
		sleep_ns(BEAT_NS);
	}
	return nothing;
}

static inline void start_small_thread(void *(*run)(void *))
{
	pthread_attr_t small;
	pthread_t thread;
	sigset_t all, before;

	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 64 << 10);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);	/* signals are for the program itself */
	if (pthread_create(&thread, &small, run, NULL))
		die("pthread_create");
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&small);
}

static inline void start_beat(void)
{
	void *got = mmap((void *)BOARD_ADDRESS, BOARD_PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

	if (got != (void *)BOARD_ADDRESS)
		die("map the board");
	start_small_thread(beat);
}

#endif
