/*
 * s_listen [bound]: TCP sockets that listen and have no connection.
 *
 * IPv4 and IPv6, of one address and of all, IPv6 only and for both, with and without address reuse, two sockets
 * at one port (SO_REUSEPORT), non-blocking, small and large backlogs, options that connections inherit, one duplicated,
 * and for `bound` one that has an address but does not listen. `check` compares addresses and options with those at the start, connects to every
 * listener and exchanges a few bytes; after it no connection is left. A host without IPv6 has the IPv4 ones.
 */
#include "workload.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#define MAX_SOCKETS 16

struct option {
	int level, name;
};
static const struct option OPTIONS[] = {
	{SOL_SOCKET, SO_TYPE}, {SOL_SOCKET, SO_PROTOCOL}, {SOL_SOCKET, SO_DOMAIN}, {SOL_SOCKET, SO_ACCEPTCONN},
	{SOL_SOCKET, SO_REUSEADDR}, {SOL_SOCKET, SO_REUSEPORT}, {SOL_SOCKET, SO_KEEPALIVE},
	{SOL_SOCKET, SO_RCVBUF}, {SOL_SOCKET, SO_SNDBUF}, {SOL_SOCKET, SO_LINGER}, {SOL_SOCKET, SO_PRIORITY},
	{SOL_SOCKET, SO_RCVTIMEO}, {IPPROTO_TCP, TCP_NODELAY}, {IPPROTO_TCP, TCP_DEFER_ACCEPT},
	{IPPROTO_TCP, TCP_KEEPIDLE}, {IPPROTO_TCP, TCP_MAXSEG}, {IPPROTO_IPV6, IPV6_V6ONLY},
};

struct seen {
	int status_flags, fd_flags, backlog;
	socklen_t address_len;
	struct sockaddr_storage address;
	char options[LEN(OPTIONS)][16];
};

static struct socket {
	const char *name;
	int fd;
	bool listens;
	struct seen seen;
} sockets[MAX_SOCKETS];
static int n_sockets;

/* Of a listening socket, tcpi_sacked is the backlog. */
static int backlog_of(int fd)
{
	struct tcp_info info;
	socklen_t len = sizeof info;

	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) ? -1 : (int)info.tcpi_sacked;
}

static void look(int fd, struct seen *seen)
{
	memset(seen, 0, sizeof *seen);
	seen->status_flags = fcntl(fd, F_GETFL);
	seen->fd_flags = fcntl(fd, F_GETFD);
	seen->backlog = backlog_of(fd);
	seen->address_len = sizeof seen->address;
	if (getsockname(fd, (struct sockaddr *)&seen->address, &seen->address_len))
		fail("getsockname: %s", strerror(errno));
	for (size_t i = 0; i < LEN(OPTIONS); i++) {
		socklen_t len = sizeof seen->options[i];

		getsockopt(fd, OPTIONS[i].level, OPTIONS[i].name, seen->options[i], &len);
	}
}

/* ---- making them ------------------------------------------------------------------------------ */

static void set(int fd, int level, int name, int value)
{
	if (setsockopt(fd, level, name, &value, sizeof value))
		die("setsockopt %d", name);
}

static struct socket *make(const char *name, int family, int type)
{
	struct socket *s = &sockets[n_sockets++];

	s->name = name;
	s->fd = socket(family, SOCK_STREAM | type, 0);
	if (s->fd < 0)
		die("socket");
	return s;
}

/* port in network order, 0: any */
static void bind4(struct socket *s, uint32_t address, in_port_t port)
{
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(address)};

	if (bind(s->fd, (struct sockaddr *)&at, sizeof at))
		die("bind %s", s->name);
}

static void bind6(struct socket *s, struct in6_addr address)
{
	struct sockaddr_in6 at = {.sin6_family = AF_INET6, .sin6_addr = address};

	if (bind(s->fd, (struct sockaddr *)&at, sizeof at))
		die("bind %s", s->name);
}

static void start(struct socket *s, int backlog)
{
	if (listen(s->fd, backlog))
		die("listen %s", s->name);
	s->listens = true;
}

static in_port_t port_of(const struct socket *s)
{
	struct seen seen;

	look(s->fd, &seen);
	return ((struct sockaddr_in *)&seen.address)->sin_port;
}

static void prepare4(bool bound)
{
	struct linger linger = {1, 7};
	struct timeval limit = {3, 500000};
	struct socket *s, *first;

	s = make("IPv4 loopback", AF_INET, SOCK_CLOEXEC);
	bind4(s, INADDR_LOOPBACK, 0);
	start(s, 1);
	s = make("IPv4 any, reused address", AF_INET, SOCK_NONBLOCK);
	set(s->fd, SOL_SOCKET, SO_REUSEADDR, 1);
	bind4(s, INADDR_ANY, 0);
	start(s, 511);
	first = make("IPv4 shared port", AF_INET, SOCK_CLOEXEC | SOCK_NONBLOCK);
	set(first->fd, SOL_SOCKET, SO_REUSEPORT, 1);
	bind4(first, INADDR_LOOPBACK, 0);
	start(first, 16);
	s = make("IPv4 shared port, second", AF_INET, SOCK_CLOEXEC | SOCK_NONBLOCK);
	set(s->fd, SOL_SOCKET, SO_REUSEPORT, 1);
	bind4(s, INADDR_LOOPBACK, port_of(first));
	start(s, 17);
	s = make("IPv4 with options", AF_INET, 0);
	set(s->fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	set(s->fd, SOL_SOCKET, SO_RCVBUF, 50000);
	set(s->fd, SOL_SOCKET, SO_SNDBUF, 60000);
	set(s->fd, SOL_SOCKET, SO_PRIORITY, 3);
	set(s->fd, IPPROTO_TCP, TCP_NODELAY, 1);
	set(s->fd, IPPROTO_TCP, TCP_KEEPIDLE, 77);
	setsockopt(s->fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
	setsockopt(s->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	bind4(s, INADDR_LOOPBACK + 5, 0);		/* 127.0.0.6 */
	start(s, 128);
	sockets[n_sockets] = *s;
	sockets[n_sockets].name = "duplicate of IPv4 with options";
	sockets[n_sockets++].fd = fcntl(s->fd, F_DUPFD_CLOEXEC, 40);
	if (bound) {
		s = make("IPv4 bound, not listening", AF_INET, SOCK_CLOEXEC);
		bind4(s, INADDR_LOOPBACK, 0);
	}
}

static void prepare6(void)
{
	int probe = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in6 loopback = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	bool usable = probe >= 0 && !bind(probe, (struct sockaddr *)&loopback, sizeof loopback);
	struct socket *s;

	if (probe >= 0)
		close(probe);
	if (!usable)
		return;
	s = make("IPv6 loopback", AF_INET6, SOCK_CLOEXEC);
	bind6(s, in6addr_loopback);
	start(s, 5);
	s = make("IPv6 any, only IPv6", AF_INET6, SOCK_NONBLOCK);
	set(s->fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	set(s->fd, SOL_SOCKET, SO_REUSEADDR, 1);
	bind6(s, in6addr_any);
	start(s, 100);
	s = make("IPv6 any, IPv4 too", AF_INET6, 0);
	set(s->fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
	bind6(s, in6addr_any);
	start(s, 100);
}

/* ---- checks ----------------------------------------------------------------------------------- */

static void check_seen(const struct socket *s)
{
	const struct seen *was = &s->seen;
	struct seen is;

	look(s->fd, &is);
	EXPECT(is.address_len == was->address_len && !memcmp(&is.address, &was->address, sizeof is.address),
	       "%s has another address or port (%d, was %d)", s->name,
	       ntohs(((const struct sockaddr_in *)&is.address)->sin_port),
	       ntohs(((const struct sockaddr_in *)&was->address)->sin_port));
	EXPECT(is.status_flags == was->status_flags && is.fd_flags == was->fd_flags,
	       "%s has flags %o and %d, had %o and %d", s->name, (unsigned)is.status_flags, is.fd_flags,
	       (unsigned)was->status_flags, was->fd_flags);
	EXPECT(!s->listens || is.backlog == was->backlog, "%s has a backlog of %d, had %d", s->name, is.backlog,
	       was->backlog);
	for (size_t i = 0; i < LEN(OPTIONS); i++)
		EXPECT(!memcmp(is.options[i], was->options[i], sizeof is.options[i]),
		       "%s: option %d of level %d is %d, was %d", s->name, OPTIONS[i].name, OPTIONS[i].level,
		       *(int *)(void *)is.options[i], *(const int *)(const void *)was->options[i]);
}

/* The listener of this port that has somebody waiting; with a shared port it may be either. */
static int accept_any(in_port_t port)
{
	struct pollfd polled[MAX_SOCKETS];

	for (int i = 0; i < n_sockets; i++)
		polled[i] = (struct pollfd){.fd = sockets[i].listens && port_of(&sockets[i]) == port ? sockets[i].fd : -1,
					    .events = POLLIN};
	while (poll(polled, (nfds_t)n_sockets, 20000) < 0 && errno == EINTR)
		;
	for (int i = 0; i < n_sockets; i++)
		if (polled[i].revents & POLLIN)
			return accept4(sockets[i].fd, NULL, NULL, SOCK_CLOEXEC);
	return -1;
}

static void connect_to(const struct socket *s, struct sockaddr_storage to)
{
	int here = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0), there;
	struct linger at_once = {1, 0};		/* leave nothing in TIME_WAIT */
	char text[8] = "";

	if (connect(here, (struct sockaddr *)&to, sizeof(struct sockaddr_in6))) {
		fail("cannot connect to %s: %s", s->name, strerror(errno));
		close(here);
		return;
	}
	there = accept_any(((struct sockaddr_in *)&to)->sin_port);
	EXPECT(there >= 0 && write(here, "question", 8) == 8 && recv(there, text, 8, MSG_WAITALL) == 8 &&
	       !memcmp(text, "question", 8) && write(there, "answer", 6) == 6 &&
	       recv(here, text, 6, MSG_WAITALL) == 6 && !memcmp(text, "answer", 6),
	       "a connection to %s does not work", s->name);
	setsockopt(here, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
	close(here);
	if (there >= 0) {
		setsockopt(there, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
		close(there);
	}
}

/* The same port by way of the other family: works exactly where IPV6_V6ONLY is off. */
static void check_family(const struct socket *s)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = port_of(s),
				 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	struct sockaddr_storage other = {0};
	int only = 0, here;
	socklen_t len = sizeof only;

	if (s->seen.address.ss_family != AF_INET6 ||
	    memcmp(&((const struct sockaddr_in6 *)&s->seen.address)->sin6_addr, &in6addr_any, 16))
		return;
	getsockopt(s->fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, &len);
	memcpy(&other, &to, sizeof to);
	if (!only) {
		connect_to(s, other);
		return;
	}
	here = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	EXPECT(connect(here, (struct sockaddr *)&to, sizeof to) && errno == ECONNREFUSED,
	       "%s takes IPv4 connections", s->name);
	close(here);
}

static void check(void)
{
	for (int i = 0; i < n_sockets; i++)
		check_seen(&sockets[i]);
	for (int i = 0; i < n_sockets && !atomic_load(&verdict.state); i++) {
		if (!sockets[i].listens)
			continue;
		connect_to(&sockets[i], sockets[i].seen.address);
		check_family(&sockets[i]);
	}
}

/* A listener more, and one less. */
static void reopen(void)
{
	struct socket *s = &sockets[0];

	close(s->fd);
	s->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	bind4(s, INADDR_LOOPBACK, 0);
	start(s, 1 + (s->seen.backlog + 1) % 50);
	look(s->fd, &s->seen);
}

static void damage_closed(void) { close(sockets[1].fd); }
static void damage_flags(void) { fcntl(sockets[1].fd, F_SETFL, 0); }
static void damage_backlog(void) { listen(sockets[2].fd, 3); }
static void damage_option(void) { set(sockets[4].fd, IPPROTO_TCP, TCP_NODELAY, 0); }
static void damage_deaf(void) { shutdown(sockets[4].fd, SHUT_RD); }
static void damage_port(void) { struct seen kept = sockets[0].seen; reopen(); sockets[0].seen = kept; }

int main(int argc, char **argv)
{
	static const struct named steps[] = {{"reopen", reopen}, {NULL, NULL}};
	static const struct named damages[] = {
		{"closed", damage_closed}, {"flags", damage_flags}, {"backlog", damage_backlog},
		{"option", damage_option}, {"deaf", damage_deaf}, {"port", damage_port}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare4(argc > 1 && !strcmp(argv[1], "bound"));
	prepare6();
	for (int i = 0; i < n_sockets; i++)
		look(sockets[i].fd, &sockets[i].seen);
	return serve(&program);
}
