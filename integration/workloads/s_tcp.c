/*
 * s_tcp: TCP connections, both ends here, over the loopback; and one to somebody else, by `call`.
 *
 * For IPv4 and IPv6 each: one with data under way in both directions; one whose sender was stopped by a full window; one
 * closed by the one side, with data behind; one closed by both; one reset by the peer with data not read; one shut down for
 * reading. What is sent is told by its place in the stream, so a byte that is lost, doubled or moved is noticed. `check`
 * compares addresses, options and what both ends had agreed on, reads everything that was sent, and sends anew.
 *
 *     call PORT     connect to a port of the loopback          say N         send N bytes, as far as they fit: "said M"
 *     hear N        read N bytes and compare them: "heard"     end           "end" if the other end has closed, or the error
 */
#include "workload.h"

#include <inttypes.h>

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

struct option {
	int level, name;
};
static const struct option OPTIONS[] = {
	{SOL_SOCKET, SO_REUSEADDR}, {SOL_SOCKET, SO_KEEPALIVE}, {SOL_SOCKET, SO_LINGER}, {SOL_SOCKET, SO_PRIORITY},
	{SOL_SOCKET, SO_RCVTIMEO}, {SOL_SOCKET, SO_SNDBUF}, {IPPROTO_TCP, TCP_NODELAY}, {IPPROTO_TCP, TCP_CORK}, {IPPROTO_TCP, TCP_KEEPIDLE},
	{IPPROTO_TCP, TCP_KEEPINTVL}, {IPPROTO_TCP, TCP_KEEPCNT}, {IPPROTO_TCP, TCP_USER_TIMEOUT}, {IPPROTO_TCP, TCP_CONGESTION},
	{IPPROTO_IP, IP_TOS}, {IPPROTO_IP, IP_MTU_DISCOVER},
};

#define SNDBUF_AT 5

/* One end. What it has written and read is counted; the other end's counts must follow. */
struct end {
	int fd;
	uint64_t written, read, seed;
	int status_flags;
	uint8_t state, agreed, scales;
	struct sockaddr_storage here, there;
	char options[LEN(OPTIONS)][16];
};

enum kind { FLOWING, FULL, HALF_CLOSED, CLOSED, RESET, DEAF, N_KINDS };
static const char *const NAMES[N_KINDS] = {"flowing", "full", "half closed", "closed", "reset", "deaf"};

static struct pair {
	enum kind kind;
	bool v6;
	struct end ends[2];
} pairs[2 * N_KINDS];
static int n_pairs;

static struct end other = {.fd = -1};	/* of `call` */

static uint8_t byte_at(uint64_t seed, uint64_t place)
{
	return (uint8_t)(mix64(seed ^ place >> 3) >> (place & 7) * 8);
}

/* ---- sending and reading ---------------------------------------------------------------------- */

/* Send up to `wanted` bytes, without waiting; how many it took. */
static uint64_t push(struct end *e, uint64_t wanted)
{
	uint8_t buffer[65536];
	uint64_t done = 0;

	while (done < wanted) {
		size_t len = wanted - done < sizeof buffer ? wanted - done : sizeof buffer;
		ssize_t n;

		for (size_t i = 0; i < len; i++)
			buffer[i] = byte_at(e->seed, e->written + i);
		n = send(e->fd, buffer, len, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			break;
		e->written += (uint64_t)n;
		done += (uint64_t)n;
	}
	return done;
}

/* Read exactly `wanted` bytes that `seed` tells; false, and a verdict, if they are not there or not right. */
static bool pull(struct end *e, uint64_t wanted, uint64_t seed, const char *name)
{
	uint8_t buffer[65536];
	uint64_t done = 0;

	while (done < wanted) {
		size_t len = wanted - done < sizeof buffer ? wanted - done : sizeof buffer;
		struct pollfd polled = {.fd = e->fd, .events = POLLIN};
		ssize_t n;

		if (poll(&polled, 1, 20000) < 1) {
			fail("%s: %" PRIu64 " bytes of %" PRIu64 " came", name, done, wanted);
			return false;
		}
		n = recv(e->fd, buffer, len, MSG_DONTWAIT);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n <= 0) {
			fail("%s: %s after %" PRIu64 " bytes of %" PRIu64, name, n ? strerror(errno) : "the end", done,
			     wanted);
			return false;
		}
		for (ssize_t i = 0; i < n; i++)
			if (buffer[i] != byte_at(seed, e->read + (uint64_t)i)) {
				fail("%s: byte %" PRIu64 " of the stream is wrong", name, e->read + (uint64_t)i);
				return false;
			}
		e->read += (uint64_t)n;
		done += (uint64_t)n;
	}
	return true;
}

/* ---- what can be asked of a socket ------------------------------------------------------------ */

static void ask(struct end *e)
{
	struct tcp_info info;
	socklen_t len = sizeof info;

	memset(&info, 0, sizeof info);
	if (getsockopt(e->fd, IPPROTO_TCP, TCP_INFO, &info, &len))
		fail("TCP_INFO: %s", strerror(errno));
	e->state = info.tcpi_state;
	e->agreed = info.tcpi_options & (TCPI_OPT_TIMESTAMPS | TCPI_OPT_SACK | TCPI_OPT_WSCALE);
	e->scales = (uint8_t)(info.tcpi_snd_wscale << 4 | info.tcpi_rcv_wscale);
	e->status_flags = fcntl(e->fd, F_GETFL);
	memset(&e->here, 0, sizeof e->here);
	memset(&e->there, 0, sizeof e->there);
	len = sizeof e->here;
	getsockname(e->fd, (struct sockaddr *)&e->here, &len);
	len = sizeof e->there;
	getpeername(e->fd, (struct sockaddr *)&e->there, &len);
	memset(e->options, 0, sizeof e->options);
	for (size_t i = 0; i < LEN(OPTIONS); i++) {
		len = sizeof e->options[i];
		getsockopt(e->fd, OPTIONS[i].level, OPTIONS[i].name, e->options[i], &len);
	}
}

static void compare(const struct end *was, const char *name)
{
	struct end is = *was;

	ask(&is);
	EXPECT(is.state == was->state, "%s: state %d, was %d", name, is.state, was->state);
	EXPECT(is.status_flags == was->status_flags, "%s: flags %o, were %o", name, (unsigned)is.status_flags,
	       (unsigned)was->status_flags);
	if (!*(const int *)(const void *)was->options[SNDBUF_AT])
		memset(is.options[SNDBUF_AT], 0, sizeof is.options[0]);
	for (size_t i = 0; i < LEN(OPTIONS); i++)
		EXPECT(!memcmp(is.options[i], was->options[i], sizeof is.options[i]), "%s: option %d of level %d is %d, was %d",
		       name, OPTIONS[i].name, OPTIONS[i].level, *(int *)(void *)is.options[i],
		       *(const int *)(const void *)was->options[i]);
	/* Of one that has ended the addresses mean nothing any more. */
	if (was->state == TCP_CLOSE)
		return;
	EXPECT(!memcmp(&is.here, &was->here, sizeof is.here) && !memcmp(&is.there, &was->there, sizeof is.there),
	       "%s: other addresses", name);
	EXPECT(is.agreed == was->agreed && is.scales == was->scales, "%s: agreed on %x %x, had on %x %x", name, is.agreed,
	       is.scales, was->agreed, was->scales);
}

/* ---- making them ------------------------------------------------------------------------------ */

static void set(int fd, int level, int name, int value)
{
	if (setsockopt(fd, level, name, &value, sizeof value))
		die("setsockopt %d", name);
}

static int connect_to(const struct sockaddr_storage *to)
{
	int fd = socket(to->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || connect(fd, (const struct sockaddr *)to, sizeof *to))
		die("connect");
	return fd;
}

static bool connect_pair(struct pair *p)
{
	struct sockaddr_in6 at6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	struct sockaddr_in at4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	struct sockaddr_storage at = {0};
	socklen_t len = sizeof at;
	int listener = socket(p->v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (listener < 0)
		return false;
	memcpy(&at, p->v6 ? (void *)&at6 : (void *)&at4, p->v6 ? sizeof at6 : sizeof at4);
	if (bind(listener, (struct sockaddr *)&at, p->v6 ? sizeof at6 : sizeof at4) || listen(listener, 1)) {
		close(listener);
		return false;
	}
	getsockname(listener, (struct sockaddr *)&at, &len);
	p->ends[0].fd = connect_to(&at);
	p->ends[1].fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (p->ends[1].fd < 0)
		die("accept");
	close(listener);
	return true;
}

static void set_options(const struct pair *p)
{
	struct timeval limit = {3, 500000};

	set(p->ends[0].fd, IPPROTO_TCP, TCP_NODELAY, 1);
	set(p->ends[0].fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	set(p->ends[0].fd, IPPROTO_TCP, TCP_KEEPIDLE, 77);
	set(p->ends[0].fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 123456);
	set(p->ends[1].fd, IPPROTO_TCP, TCP_CORK, p->kind != CLOSED);
	set(p->ends[1].fd, SOL_SOCKET, SO_REUSEADDR, 1);
	set(p->ends[1].fd, IPPROTO_IP, IP_TOS, 16);
	setsockopt(p->ends[1].fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	if (setsockopt(p->ends[1].fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4))
		die("reno");
	if (p->kind == FULL && !p->v6) {
		set(p->ends[0].fd, SOL_SOCKET, SO_SNDBUF, 200000);
		set(p->ends[1].fd, SOL_SOCKET, SO_RCVBUF, 50000);
	}
	if (p->v6)
		fcntl(p->ends[0].fd, F_SETFL, O_NONBLOCK);
}

/* Wait until the kernel has brought what was sent, and told the other end of a close. */
static void await_state(const struct end *e, int state)
{
	int64_t give_up = now_ns(CLOCK_MONOTONIC) + 10 * NS_PER_S;
	struct end seen = *e;

	do
		ask(&seen);
	while (seen.state != state && now_ns(CLOCK_MONOTONIC) < give_up);
	EXPECT(seen.state == state, "a socket is in state %d and not in %d", seen.state, state);
}

static void send_some(struct pair *p)
{
	struct end *one = &p->ends[0], *two = &p->ends[1];

	switch (p->kind) {
	case FLOWING:
	case DEAF:
		push(one, 1 + (mix64(one->written) & 0x3fff));
		if (p->kind == FLOWING)
			push(two, 1 + (mix64(two->written) & 0x3fff));
		break;
	case FULL:
		push(one, 64 << 20);
		break;
	default:
		push(two, 1 + (mix64(two->written) & 0xfff));
	}
}

static void prepare(struct pair *p)
{
	struct linger at_once = {1, 0};
	struct end *one = &p->ends[0], *two = &p->ends[1];

	for (int i = 0; i < 2; i++)
		p->ends[i].seed = mix64((uint64_t)(n_pairs * 2 + i + 1));
	set_options(p);
	if (p->kind == CLOSED || p->kind == RESET) {
		push(two, 3000);
		if (p->kind == RESET)
			setsockopt(two->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
	} else {
		send_some(p);
	}
	if (p->kind == HALF_CLOSED) {
		shutdown(one->fd, SHUT_WR);
		await_state(one, 5);	/* FIN_WAIT2 */
		await_state(two, TCP_CLOSE_WAIT);
	}
	if (p->kind == CLOSED) {
		shutdown(two->fd, SHUT_WR);
		await_state(one, TCP_CLOSE_WAIT);
		shutdown(one->fd, SHUT_WR);
		await_state(one, TCP_CLOSE);
		await_state(two, TCP_CLOSE);
	}
	if (p->kind == RESET) {
		/* Let it arrive: a reset would throw it away. */
		struct pollfd polled = {.fd = one->fd, .events = POLLIN};

		poll(&polled, 1, 10000);
		close(two->fd);
		two->fd = -1;
		await_state(one, TCP_CLOSE);
	}
	if (p->kind == DEAF)
		shutdown(two->fd, SHUT_RD);
	ask(one);
	if (two->fd >= 0)
		ask(two);
	/* Unless it was told, the kernel chooses anew while data flows. */
	if (p->kind != FULL || p->v6)
		memset(one->options[SNDBUF_AT], 0, sizeof one->options[0]);
	memset(two->options[SNDBUF_AT], 0, sizeof two->options[0]);
}

/* ---- checks ----------------------------------------------------------------------------------- */

static bool drain(struct pair *p, const char *name)
{
	struct end *one = &p->ends[0], *two = &p->ends[1];
	char byte;

	if (!pull(two, one->written - two->read, one->seed, name) || !pull(one, two->written - one->read, two->seed, name))
		return false;
	for (int i = 0; i < 2; i++)
		EXPECT(recv(p->ends[i].fd, &byte, 1, MSG_DONTWAIT | MSG_PEEK) <= 0, "%s: more came than was sent", name);
	return true;
}

/* The end of the stream is told, once and for ever. */
static void expect_end(const struct end *e, const char *name)
{
	char byte;

	EXPECT(recv(e->fd, &byte, 1, MSG_DONTWAIT) == 0, "%s: no end of the stream", name);
}

static void check_ended(struct pair *p, const char *name)
{
	struct end *one = &p->ends[0], *two = &p->ends[1];
	char byte;

	if (one->read < two->written) {
		pull(one, two->written - one->read, two->seed, name);
		if (p->kind == RESET)
			EXPECT(recv(one->fd, &byte, 1, MSG_DONTWAIT) < 0 && errno == ECONNRESET, "%s: no reset was told", name);
	}
	expect_end(one, name);
	EXPECT(send(one->fd, "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE, "%s: takes data", name);
	if (two->fd >= 0)
		expect_end(two, name);
}

static void check_pair(struct pair *p)
{
	char name[40];

	snprintf(name, sizeof name, "%s, %s", NAMES[p->kind], p->v6 ? "IPv6" : "IPv4");
	for (int i = 0; i < 2; i++)
		if (p->ends[i].fd >= 0)
			compare(&p->ends[i], name);
	if (atomic_load(&verdict.state))
		return;
	switch (p->kind) {
	case CLOSED:
	case RESET:
		check_ended(p, name);
		return;
	case DEAF:
		/* What comes is thrown away, and still there is an end. */
		pull(&p->ends[1], p->ends[0].written - p->ends[1].read, p->ends[0].seed, name);
		expect_end(&p->ends[1], name);
		break;
	case HALF_CLOSED:
		if (drain(p, name))
			expect_end(&p->ends[1], name);
		break;
	default:
		drain(p, name);
	}
	if (!atomic_load(&verdict.state))
		send_some(p);
}

static void check(void)
{
	for (int i = 0; i < n_pairs && !atomic_load(&verdict.state); i++)
		check_pair(&pairs[i]);
}

/* ---- steps, damages, and somebody else -------------------------------------------------------- */

static void step_send(void)
{
	for (int i = 0; i < n_pairs; i++)
		if (pairs[i].kind == FLOWING)
			send_some(&pairs[i]);
}

static void step_read(void)
{
	for (int i = 0; i < n_pairs; i++)
		if (pairs[i].kind == FLOWING || pairs[i].kind == FULL)
			pull(&pairs[i].ends[1], 1000, pairs[i].ends[0].seed, "a step");
	step_send();
}

static void damage_lost(void)
{
	char taken[100];

	if (recv(pairs[1].ends[1].fd, taken, sizeof taken, 0) < 1)
		die("recv");
}

static void damage_more(void) { send(pairs[0].ends[0].fd, "more", 4, MSG_NOSIGNAL); }
static void damage_option(void) { set(pairs[0].ends[0].fd, IPPROTO_TCP, TCP_KEEPIDLE, 78); }
static void damage_flags(void) { fcntl(pairs[0].ends[0].fd, F_SETFL, O_NONBLOCK); }
static void damage_closed(void) { shutdown(pairs[0].ends[0].fd, SHUT_WR); }
static void damage_address(void)
{
	struct pair fresh = {.kind = FLOWING, .v6 = false};

	connect_pair(&fresh);
	dup2(fresh.ends[0].fd, pairs[0].ends[0].fd);
	dup2(fresh.ends[1].fd, pairs[0].ends[1].fd);
}

static void call_port(char *argument)
{
	struct sockaddr_storage at = {0};
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((in_port_t)atoi(argument)),
				 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};

	memcpy(&at, &to, sizeof to);
	other = (struct end){.fd = connect_to(&at)};
	say("called");
}

static void say_bytes(char *argument)
{
	say("said %" PRIu64, push(&other, strtoull(argument, NULL, 10)));
}

static void hear_bytes(char *argument)
{
	pull(&other, strtoull(argument, NULL, 10), 0, "the other");
	answer_verdict("heard");
}

static void hear_end(char *argument)
{
	char byte;
	ssize_t n = recv(other.fd, &byte, 1, 0);

	(void)argument;
	say("%s", n < 0 ? strerror(errno) : n ? "more" : "end");
}

int main(void)
{
	static const struct named steps[] = {{"send", step_send}, {"read", step_read}, {NULL, NULL}};
	static const struct named damages[] = {{"lost", damage_lost}, {"more", damage_more}, {"option", damage_option},
		{"flags", damage_flags}, {"closed", damage_closed}, {"address", damage_address}, {NULL, NULL}};
	static const struct command others[] = {{"call", call_port}, {"say", say_bytes}, {"hear", hear_bytes},
		{"end", hear_end}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, others};

	for (int v6 = 0; v6 < 2; v6++)
		for (int kind = 0; kind < N_KINDS; kind++) {
			struct pair *p = &pairs[n_pairs];

			*p = (struct pair){.kind = (enum kind)kind, .v6 = v6};
			if (connect_pair(p)) {
				prepare(p);
				n_pairs++;
			}
		}
	return serve(&program);
}
