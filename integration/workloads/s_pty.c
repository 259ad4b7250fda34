/*
 * s_pty: pseudo-terminals whose both sides are in the process.
 *
 * `raw`: a raw pair with three slave descriptions, one of them without waiting. `packet`: a cooked one in packet mode, the
 * slave exclusive, locked. `left`: a master whose slave was closed. `hung`: a slave whose master was closed. `own`: the
 * controlling terminal, opened as /dev/tty too; we lead its session and are its foreground. Each keeps its number, which is
 * not the lowest, so that programs side by side do not want the same. `check` asks for all settings and lets bytes
 * go through in both directions; nothing may be left over, and no signal may have come but those that steps have caused.
 */
#include "workload.h"

#include <sys/ioctl.h>
#include <termios.h>

enum { RAW, PACKET, LEFT, HUNG, OWN, N_PAIRS };

static struct pair {
	const char *name;
	int master, slave;
	unsigned number;
	struct termios settings;
	struct winsize size;
} pairs[N_PAIRS] = {{.name = "raw"}, {.name = "packet"}, {.name = "left"}, {.name = "hung"}, {.name = "own"}};
static int raw_again, raw_nonblocking, controlling;
static int signals[] = {SIGHUP, SIGCONT, SIGWINCH, SIGINT, SIGTTIN, SIGTTOU};
static volatile sig_atomic_t n_came[LEN(signals)];
static int n_caused[LEN(signals)];

static void count(int number)
{
	for (size_t i = 0; i < LEN(signals); i++)
		if (signals[i] == number)
			n_came[i]++;
}

static int caused(int number)
{
	size_t i = 0;

	while (signals[i] != number)
		i++;
	n_caused[i]++;
	return n_caused[i];
}

/* ---- setting up ------------------------------------------------------------------------------- */

static unsigned number_of(int master)
{
	unsigned number = 0;

	if (ioctl(master, TIOCGPTN, &number))
		die("TIOCGPTN");
	return number;
}

static void open_pair(struct pair *p, unsigned at_least)
{
	int lower[512], n_lower = 0, unlocked = 0;
	char path[64];

	for (;;) {
		p->master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
		if (p->master < 0 || n_lower == LEN(lower))
			die("ptmx");
		if (number_of(p->master) >= at_least)
			break;
		lower[n_lower++] = p->master;
	}
	while (n_lower)
		close(lower[--n_lower]);
	p->number = number_of(p->master);
	snprintf(path, sizeof path, "/dev/pts/%u", p->number);
	if (ioctl(p->master, TIOCSPTLCK, &unlocked) || chmod(path, 0622))
		die("unlock %s", path);
	p->slave = open(path, O_RDWR | O_NOCTTY);
	if (p->slave < 0)
		die("open %s", path);
	p->size = (struct winsize){(unsigned short)(20 + p->number), 121, 640, (unsigned short)(p - pairs)};
	if (ioctl(p->master, TIOCSWINSZ, &p->size) || tcgetattr(p->slave, &p->settings))
		die("set up %s", path);
}

static void set(struct pair *p)
{
	if (tcsetattr(p->slave, TCSANOW, &p->settings) || tcgetattr(p->slave, &p->settings))
		die("settings of %s", p->name);
}

static void prepare(void)
{
	unsigned first = 40 + 6 * ((unsigned)getpid() % 40);
	struct sigaction action = {.sa_handler = count, .sa_flags = SA_RESTART};
	int yes = 1;

	for (int i = 0; i < N_PAIRS; i++)
		open_pair(&pairs[i], first);
	cfmakeraw(&pairs[RAW].settings);
	pairs[RAW].settings.c_cc[VTIME] = 3;
	set(&pairs[RAW]);
	raw_again = dup(pairs[RAW].slave);
	raw_nonblocking = open(ttyname(pairs[RAW].slave), O_WRONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	pairs[PACKET].settings.c_cc[VERASE] = '#';
	set(&pairs[PACKET]);
	if (ioctl(pairs[PACKET].master, TIOCPKT, &yes) || ioctl(pairs[PACKET].slave, TIOCEXCL) ||
	    ioctl(pairs[PACKET].master, TIOCSPTLCK, &yes))
		die("packet mode");
	close(pairs[LEFT].slave);
	close(pairs[HUNG].master);
	for (size_t i = 0; i < LEN(signals); i++)
		sigaction(signals[i], &action, NULL);
	if (getsid(0) != getpid() && setsid() < 0)
		die("setsid");
	if (ioctl(pairs[OWN].slave, TIOCSCTTY, 0))
		die("TIOCSCTTY");
	controlling = open("/dev/tty", O_RDWR);
	if (raw_again < 0 || raw_nonblocking < 0 || controlling < 0)
		die("open again");
}

/* ---- judging ---------------------------------------------------------------------------------- */

static void check_transfer(const char *name, int from, const char *sent, int to, const char *must)
{
	char is[64] = "";
	struct pollfd ready = {.fd = to, .events = POLLIN};
	size_t n_is = 0;
	ssize_t n;

	write_all(from, sent, strlen(sent));
	while (n_is < strlen(must) && poll(&ready, 1, 10000) == 1 && ready.revents & POLLIN) {
		n = read(to, is + n_is, sizeof is - 1 - n_is);
		if (n <= 0)
			break;
		/* In packet mode, every read begins with a byte of control. */
		if (to == pairs[PACKET].master) {
			EXPECT(!is[n_is], "%s: control byte %x", name, (unsigned)is[n_is]);
			memmove(is + n_is, is + n_is + 1, (size_t)n--);
		}
		n_is += (size_t)n;
	}
	is[n_is] = 0;
	EXPECT(!strcmp(is, must), "%s: '%s' came out, not '%s'", name, is, must);
}

static void check_pair(struct pair *p)
{
	struct termios settings;
	struct winsize size;
	struct stat name;
	char path[64], is[64];

	snprintf(path, sizeof path, "/dev/pts/%u", p->number);
	EXPECT(number_of(p->master) == p->number, "%s has number %u, not %u", p->name, number_of(p->master), p->number);
	EXPECT(!ioctl(p->master, TIOCGWINSZ, &size) && !memcmp(&size, &p->size, sizeof size),
	       "%s has %u rows, not %u", p->name, size.ws_row, p->size.ws_row);
	EXPECT(!tcgetattr(p->master, &settings) && !memcmp(&settings, &p->settings, sizeof settings),
	       "%s: other settings", p->name);
	EXPECT(!stat(path, &name) && (name.st_mode & 07777) == 0622, "%s: mode %o", path, name.st_mode);
	if (p == &pairs[LEFT]) {
		EXPECT(read(p->master, is, 1) == -1 && errno == EIO, "left: the slave is not closed");
		return;
	}
	EXPECT(!ttyname_r(p->slave, is, sizeof is) && !strcmp(is, path), "%s: its name is not %s", p->name, path);
}

static void check_packet(void)
{
	int packets = 0, locked = 0, exclusive = 0;

	EXPECT(!ioctl(pairs[PACKET].master, TIOCGPKT, &packets) && packets, "not in packet mode");
	EXPECT(!ioctl(pairs[PACKET].master, TIOCGPTLCK, &locked) && locked, "not locked");
	EXPECT(!ioctl(pairs[PACKET].slave, TIOCGEXCL, &exclusive) && exclusive, "not exclusive");
	if (packets)
		check_transfer("packet", pairs[PACKET].slave, "a\n", pairs[PACKET].master, "a\r\n");
}

static void check_own(void)
{
	unsigned device = 0, must = 0;

	EXPECT(tcgetsid(controlling) == getpid(), "the terminal's session is %d", (int)tcgetsid(controlling));
	EXPECT(tcgetpgrp(controlling) == getpgrp(), "the foreground is %d", (int)tcgetpgrp(controlling));
	EXPECT(!ioctl(controlling, TIOCGDEV, &device) && !ioctl(pairs[OWN].slave, TIOCGDEV, &must) && device == must,
	       "/dev/tty is %x, not %x", device, must);
	check_transfer("own", controlling, "b", pairs[OWN].master, "b");
	for (size_t i = 0; i < LEN(signals); i++)
		EXPECT(n_came[i] == n_caused[i], "signal %d came %d times, not %d", signals[i], (int)n_came[i], n_caused[i]);
}

static void check(void)
{
	char byte;

	for (int i = 0; i < N_PAIRS; i++)
		if (i != HUNG)
			check_pair(&pairs[i]);
	check_transfer("raw input", pairs[RAW].master, "\x03\r#", pairs[RAW].slave, "\x03\r#");
	check_transfer("raw output", raw_again, "\n", pairs[RAW].master, "\n");
	check_transfer("raw output again", raw_nonblocking, "x\n", pairs[RAW].master, "x\n");
	EXPECT(fcntl(raw_nonblocking, F_GETFL) & O_NONBLOCK && !(fcntl(pairs[RAW].slave, F_GETFL) & O_NONBLOCK),
	       "O_NONBLOCK is shared, or lost");
	check_packet();
	EXPECT(read(pairs[HUNG].slave, &byte, 1) == 0 && write(pairs[HUNG].slave, &byte, 1) == -1 && errno == EIO,
	       "hung: it is not hung up");
	check_own();
}

/* ---- protocol --------------------------------------------------------------------------------- */

static void wait_for(int number, int times)
{
	size_t i = 0;

	while (signals[i] != number)
		i++;
	for (int64_t give_up = now_ns(CLOCK_MONOTONIC) + 10 * NS_PER_S; n_came[i] < times;)
		if (now_ns(CLOCK_MONOTONIC) > give_up)
			return fail("signal %d does not come", number);
}

/* Who types ^C at the master interrupts the foreground, which we are. */
static void interrupt(void)
{
	int times = caused(SIGINT);

	check_transfer("interrupt", pairs[OWN].master, "\x03", pairs[OWN].master, "^C");
	wait_for(SIGINT, times);
}

static void resize(void)
{
	int times = caused(SIGWINCH);

	pairs[OWN].size.ws_col++;
	if (ioctl(pairs[OWN].master, TIOCSWINSZ, &pairs[OWN].size))
		die("TIOCSWINSZ");
	wait_for(SIGWINCH, times);
}

/* A cooked line, edited while it is typed. */
static void type(void)
{
	check_transfer("typed", pairs[OWN].master, "lx\x7fs\n", pairs[OWN].slave, "ls\n");
	check_transfer("echo", pairs[OWN].master, "", pairs[OWN].master, "lx\b \bs\r\n");
}

static void change_settings(void)
{
	pairs[RAW].settings.c_cc[VTIME] ^= 1;
	set(&pairs[RAW]);
}

static const struct named steps[] = {
	{"interrupt", interrupt}, {"resize", resize}, {"type", type}, {"settings", change_settings}, {NULL, NULL},
};

static void lose_size(void)
{
	struct winsize none = {0};

	ioctl(pairs[RAW].master, TIOCSWINSZ, &none);
}

static void lose_settings(void)
{
	struct termios settings = pairs[LEFT].settings;

	settings.c_lflag ^= ECHO;
	tcsetattr(pairs[LEFT].master, TCSANOW, &settings);
}

static void lose_packets(void)
{
	int no = 0;

	ioctl(pairs[PACKET].master, TIOCPKT, &no);
}

static void lose_exclusive(void)
{
	ioctl(pairs[PACKET].slave, TIOCNXCL);
}

static void lose_lock(void)
{
	int no = 0;

	ioctl(pairs[PACKET].master, TIOCSPTLCK, &no);
}

static void lose_mode(void)
{
	chmod(ttyname(pairs[RAW].slave), 0600);
}

static void open_left(void)
{
	open_pair(&pairs[LEFT], pairs[LEFT].number + 1);
}

static void lose_signal(void)
{
	raise(SIGHUP);
}

static void lose_flag(void)
{
	fcntl(raw_nonblocking, F_SETFL, 0);
}

static const struct named damages[] = {
	{"size", lose_size}, {"settings", lose_settings}, {"packets", lose_packets}, {"exclusive", lose_exclusive},
	{"lock", lose_lock}, {"mode", lose_mode}, {"left", open_left}, {"signal", lose_signal}, {"flag", lose_flag}, {NULL, NULL},
};

int main(void)
{
	static const struct program program = {.check = check, .steps = steps, .damages = damages};

	prepare();
	return serve(&program);
}
