/*
 * s_timerfd: timers that are read, and epoll instances that watch them.
 *
 * Clocks: monotonic, boot time, real time; set from now on and to an absolute time, with and without TFD_TIMER_CANCEL_ON_SET.
 * States: an hour to go, expired and not read (once, and with an interval), disarmed, never armed, and one that
 * expires every 10 ms. `check` asks each for the time that is left and compares it with its deadline on its own clock; the beat must
 * have lost nothing and gained nothing, in all the time that has passed on CLOCK_MONOTONIC.
 */
#include "workload.h"

#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>

#define HOUR (3600 * NS_PER_S)
#define BEAT (NS_PER_S / 100)
#define EARLY (NS_PER_S / 50000)	/* clocks are read at another moment than the timer */
#define LATE (NS_PER_S / 20)		/* a timer is set a moment after the clock was read */
#define SET_TICKS _IOW('T', 0, uint64_t)	/* TFD_IOC_SET_TICKS: older headers lack it */

static struct timer {
	const char *name;
	clockid_t clock;
	int flags, fd;
	int64_t deadline, interval;	/* on `clock`; 0: not armed */
	uint64_t ticks;			/* that nobody reads */
} timers[] = {
	{.name = "monotonic", .clock = CLOCK_MONOTONIC, .deadline = HOUR},
	{.name = "monotonic, absolute", .clock = CLOCK_MONOTONIC, .flags = TFD_TIMER_ABSTIME, .deadline = 2 * HOUR},
	{.name = "boot time", .clock = CLOCK_BOOTTIME, .deadline = HOUR, .interval = 3 * NS_PER_S},
	{.name = "boot time, absolute", .clock = CLOCK_BOOTTIME, .flags = TFD_TIMER_ABSTIME, .deadline = HOUR},
	{.name = "real time, absolute", .clock = CLOCK_REALTIME, .flags = TFD_TIMER_ABSTIME, .deadline = HOUR},
	{.name = "cancelled when set", .clock = CLOCK_REALTIME, .flags = TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET,
	 .deadline = HOUR},
	{.name = "expired", .clock = CLOCK_MONOTONIC, .ticks = 1},
	{.name = "expired, again in an hour", .clock = CLOCK_MONOTONIC, .interval = HOUR, .ticks = 1},
	{.name = "disarmed, with an interval", .clock = CLOCK_MONOTONIC, .interval = 5 * NS_PER_S},
	{.name = "never armed", .clock = CLOCK_BOOTTIME},
};
static int beat, inner, outer;
static int64_t beat_start;		/* when it expires first, on CLOCK_MONOTONIC */
static uint64_t n_beats;		/* how often it has expired, as far as we have read */

static struct itimerspec times(int64_t value, int64_t interval)
{
	return (struct itimerspec){.it_value = to_timespec(value), .it_interval = to_timespec(interval)};
}

static void arm(int fd, int flags, int64_t value, int64_t interval)
{
	struct itimerspec when = times(value, interval);

	if (timerfd_settime(fd, flags, &when, NULL))
		die("timerfd_settime");
}

static void await(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};

	while (poll(&polled, 1, 20000) < 0 && errno == EINTR)
		;
	EXPECT(polled.revents == POLLIN, "fd %d is not readable after 20 s", fd);
}

static void prepare_timer(struct timer *t)
{
	int64_t now = now_ns(t->clock);

	t->fd = timerfd_create(t->clock, TFD_CLOEXEC | TFD_NONBLOCK);
	if (t->fd < 0)
		die("timerfd_create");
	if (t->ticks) {
		arm(t->fd, 0, 1, t->interval);
		await(t->fd);
		t->deadline = t->interval ? now + t->interval : 0;
	} else if (t->deadline) {
		arm(t->fd, t->flags, t->deadline + (t->flags & TFD_TIMER_ABSTIME ? now : 0), t->interval);
		t->deadline += now;
	} else if (t->interval) {
		arm(t->fd, 0, 0, t->interval);
	}
}

static void watch(int epoll, int fd)
{
	struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		die("epoll_ctl");
}

static void prepare(void)
{
	inner = epoll_create1(EPOLL_CLOEXEC);
	outer = epoll_create1(EPOLL_CLOEXEC);
	for (struct timer *t = timers; t < timers + LEN(timers); t++) {
		prepare_timer(t);
		watch(inner, t->fd);
	}
	beat = fcntl(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), F_DUPFD, 50);
	beat_start = now_ns(CLOCK_MONOTONIC) + BEAT;
	arm(beat, TFD_TIMER_ABSTIME, beat_start, BEAT);
	watch(outer, beat);
	watch(outer, inner);
}

/* What fdinfo says after a name; -1 if there is no such line. */
static long info(int fd, const char *name, int base)
{
	char path[64], line[256];
	long value = -1;
	FILE *file;

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	file = fopen(path, "re");
	while (file && fgets(line, sizeof line, file))
		if (!strncmp(line, name, strlen(name)))
			value = strtol(line + strlen(name), NULL, base);
	if (file)
		fclose(file);
	return value;
}

static void check_timer(struct timer *t)
{
	struct itimerspec now = {0};
	int64_t before = now_ns(t->clock), after, left;

	if (timerfd_gettime(t->fd, &now))
		return fail("%s: timerfd_gettime", t->name);
	after = now_ns(t->clock);
	left = now.it_value.tv_sec * NS_PER_S + now.it_value.tv_nsec;
	EXPECT(now.it_interval.tv_sec * NS_PER_S + now.it_interval.tv_nsec == t->interval, "%s: another interval", t->name);
	if (t->deadline)
		EXPECT(left >= t->deadline - after - EARLY && left <= t->deadline - before + LATE,
		       "%s: %ld ms left, not %ld", t->name, (long)(left / 1000000), (long)((t->deadline - after) / 1000000));
	else
		EXPECT(!left, "%s: %ld ns left", t->name, (long)left);
	EXPECT(info(t->fd, "ticks:", 10) == (long)t->ticks, "%s: %ld ticks", t->name, info(t->fd, "ticks:", 10));
	EXPECT(info(t->fd, "settime flags:", 8) == t->flags, "%s: flags %lo", t->name, info(t->fd, "settime flags:", 8));
	EXPECT(info(t->fd, "clockid:", 10) == t->clock, "%s: another clock", t->name);
}

/* All beats since the start have been told by now, and none before its time. */
static void check_beat(void)
{
	int64_t before = now_ns(CLOCK_MONOTONIC), after;
	uint64_t n = 0;

	if (read(beat, &n, sizeof n) != sizeof n)
		EXPECT(errno == EAGAIN, "the beat cannot be read");
	n_beats += n;
	after = now_ns(CLOCK_MONOTONIC);
	EXPECT((int64_t)n_beats >= (before - LATE - beat_start) / BEAT + (before - LATE >= beat_start),
	       "%lu beats, too few", (unsigned long)n_beats);
	EXPECT((int64_t)n_beats <= (after + EARLY - beat_start) / BEAT + 1, "%lu beats, too many", (unsigned long)n_beats);
}

/* The inner instance tells of what has expired and was not read; the outer one of the inner one, and of the beat. */
static void check_epolls(void)
{
	struct epoll_event events[LEN(timers) + 1];
	int n = epoll_wait(inner, events, LEN(events), 0), n_expired = 0;

	for (struct timer *t = timers; t < timers + LEN(timers); t++)
		n_expired += t->ticks > 0;
	EXPECT(n == n_expired, "%d timers expired, not %d", n, n_expired);
	await(beat);
	n = epoll_wait(outer, events, LEN(events), 20000);
	EXPECT(n == 2, "the outer instance tells of %d files, not 2", n);
}

static void check(void)
{
	for (struct timer *t = timers; t < timers + LEN(timers); t++)
		check_timer(t);
	check_epolls();
	check_beat();
}

static struct timer *find(const char *name)
{
	for (struct timer *t = timers; t < timers + LEN(timers); t++)
		if (!strcmp(t->name, name))
			return t;
	die("no timer %s", name);
}

/* Wait for some beats, and leave one unread. */
static void tick(void)
{
	for (int i = 0; i < 3; i++) {
		uint64_t n = 0;

		await(beat);
		EXPECT(read(beat, &n, sizeof n) == sizeof n, "the beat cannot be read");
		n_beats += n;
	}
	await(beat);
}

/* What has expired is read and expires again. */
static void expire(void)
{
	struct timer *t = find("expired");
	uint64_t n = 0;

	EXPECT(read(t->fd, &n, sizeof n) == sizeof n && n == 1, "%lu ticks", (unsigned long)n);
	arm(t->fd, 0, 1000, 0);
	await(t->fd);
}

static void damage_later(void) { arm(find("monotonic")->fd, 0, 2 * HOUR, 0); }
static void damage_interval(void) { arm(find("boot time")->fd, 0, HOUR, NS_PER_S); }
static void damage_flags(void) { struct timer *t = find("real time, absolute"); arm(t->fd, 3, t->deadline, 0); }
static void damage_armed(void) { arm(find("never armed")->fd, 0, HOUR, 0); }
static void damage_beat(void) { arm(beat, TFD_TIMER_ABSTIME, beat_start + NS_PER_S, BEAT); }
static void damage_epoll(void) { epoll_ctl(outer, EPOLL_CTL_DEL, inner, NULL); }
static void damage_lost(void)
{
	uint64_t n;

	EXPECT(read(find("expired, again in an hour")->fd, &n, sizeof n) == sizeof n, "read");
}
static void damage_ticks(void)
{
	uint64_t n = 2;

	if (ioctl(find("expired")->fd, SET_TICKS, &n))
		die("TFD_IOC_SET_TICKS");
}

int main(void)
{
	static const struct named steps[] = {{"tick", tick}, {"expire", expire}, {NULL, NULL}};
	static const struct named damages[] = {
		{"later", damage_later}, {"interval", damage_interval}, {"flags", damage_flags},
		{"armed", damage_armed}, {"beat", damage_beat}, {"epoll", damage_epoll},
		{"lost", damage_lost}, {"ticks", damage_ticks}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
