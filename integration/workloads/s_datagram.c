/*
 * s_datagram: sockets of datagrams: UDP of IPv4 and IPv6, netlink, packet and raw.
 *
 * Two senders send to one receiver, which has not read all; a third is connected to it. Each datagram says who sent it and
 * which it is, so one that is lost, doubled or out of order is noticed, and so is a wrong sender. The receiver of IPv4 has joined
 * a multicast group. A netlink socket listens to changes of links, and can be asked; a packet socket listens to a protocol of
 * nobody on the loopback; a raw socket filters. `check` compares addresses and options, reads what was sent, uses everything, and
 * sends anew. Without root there is neither packet nor raw.
 */
#include "workload.h"

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <sys/socket.h>

#define PROTOCOL 0x88b5
#define MAX_BYTES 9000

struct option {
	int level, name;
};
static const struct option OPTIONS[] = {
	{SOL_SOCKET, SO_TYPE}, {SOL_SOCKET, SO_PROTOCOL}, {SOL_SOCKET, SO_DOMAIN}, {SOL_SOCKET, SO_BROADCAST},
	{SOL_SOCKET, SO_RCVBUF}, {SOL_SOCKET, SO_RCVTIMEO}, {IPPROTO_IP, IP_TOS}, {IPPROTO_IP, IP_TTL},
	{IPPROTO_IP, IP_MULTICAST_LOOP}, {IPPROTO_IP, IP_MULTICAST_TTL}, {IPPROTO_IP, IP_PKTINFO},
	{IPPROTO_IPV6, IPV6_TCLASS}, {IPPROTO_IPV6, IPV6_RECVPKTINFO}, {IPPROTO_UDP, UDP_CORK},
	{SOL_NETLINK, NETLINK_EXT_ACK}, {SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS}, {SOL_PACKET, PACKET_AUXDATA}, {255, 1},
};

struct seen {
	int status_flags;
	struct sockaddr_storage here, there;
	char options[LEN(OPTIONS)][16];
};

static struct sock {
	const char *name;
	int fd;
	struct seen seen;
} socks[16];
static int n_socks;

enum { RECEIVER, FIRST, SECOND, CONNECTED, PER_FAMILY };
static struct sock *family[2][PER_FAMILY];
static struct sock *netlink, *packet, *raw;

struct message {
	uint32_t sender, number;
	uint8_t rest[MAX_BYTES];
};

static struct {
	uint32_t sender, number, len;
} queue[2][64];
static int n_queued[2];
static uint32_t n_sent;

static void look(int fd, struct seen *seen)
{
	socklen_t len = sizeof seen->here;

	memset(seen, 0, sizeof *seen);
	seen->status_flags = fcntl(fd, F_GETFL);
	if (getsockname(fd, (struct sockaddr *)&seen->here, &len))
		fail("getsockname: %s", strerror(errno));
	len = sizeof seen->there;
	getpeername(fd, (struct sockaddr *)&seen->there, &len);
	for (size_t i = 0; i < LEN(OPTIONS); i++) {
		len = sizeof seen->options[i];
		getsockopt(fd, OPTIONS[i].level, OPTIONS[i].name, seen->options[i], &len);
	}
}

static struct sock *make(const char *name, int domain, int type, int protocol)
{
	struct sock *s = &socks[n_socks];

	*s = (struct sock){.name = name, .fd = socket(domain, type | SOCK_CLOEXEC, protocol)};
	if (s->fd < 0)
		return NULL;
	n_socks++;
	return s;
}

static void set(const struct sock *s, int level, int name, int value)
{
	if (setsockopt(s->fd, level, name, &value, sizeof value))
		die("%s: setsockopt %d", s->name, name);
}

static bool bind_loopback(const struct sock *s, int v6)
{
	struct sockaddr_in6 at6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	struct sockaddr_in at4 = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};

	return !bind(s->fd, v6 ? (void *)&at6 : (void *)&at4, v6 ? sizeof at6 : sizeof at4);
}

/* ---- UDP -------------------------------------------------------------------------------------- */

static void fill(struct message *m, uint32_t sender, uint32_t number, size_t len)
{
	m->sender = sender;
	m->number = number;
	for (size_t i = 0; i < len; i++)
		m->rest[i] = (uint8_t)mix64(number * 65536u + i);
}

static void send_one(int v6, uint32_t sender)
{
	static struct message m;
	uint32_t len = (uint32_t)(mix64(n_sent) % MAX_BYTES);
	struct sockaddr_storage *to = &family[v6][RECEIVER]->seen.here;
	socklen_t to_len = v6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
	bool named = sender != CONNECTED;
	int at = n_queued[v6]++;

	fill(&m, sender, n_sent, len);
	queue[v6][at].sender = sender;
	queue[v6][at].number = n_sent++;
	queue[v6][at].len = len;
	if (sendto(family[v6][sender]->fd, &m, 8 + len, 0, named ? (struct sockaddr *)to : NULL, named ? to_len : 0) < 0)
		die("sendto");
}

static void send_some(int v6)
{
	for (uint32_t i = 0; i < 5 && n_queued[v6] < 60; i++)
		send_one(v6, FIRST + i % 3);
}

static void receive_all(int v6)
{
	static struct message got, wanted;

	for (int i = 0; i < n_queued[v6]; i++) {
		struct sockaddr_storage from = {0};
		socklen_t from_len = sizeof from;
		uint32_t sender = queue[v6][i].sender, len = queue[v6][i].len;
		ssize_t n = recvfrom(family[v6][RECEIVER]->fd, &got, sizeof got, MSG_DONTWAIT, (struct sockaddr *)&from,
				     &from_len);

		fill(&wanted, sender, queue[v6][i].number, len);
		if (n != (ssize_t)len + 8 || memcmp(&got, &wanted, (size_t)n)) {
			fail("IPv%d: datagram %d of %d is not what was sent (%zd bytes, %u wanted)", v6 ? 6 : 4, i, n_queued[v6],
			     n, len + 8);
			return;
		}
		/* The ports lie at the same place. */
		EXPECT(((struct sockaddr_in *)&from)->sin_port ==
		       ((struct sockaddr_in *)&family[v6][sender]->seen.here)->sin_port, "IPv%d: wrong sender", v6 ? 6 : 4);
	}
	EXPECT(recv(family[v6][RECEIVER]->fd, &got, 1, MSG_DONTWAIT | MSG_PEEK) < 0, "a datagram that nobody sent");
	n_queued[v6] = 0;
}

static bool prepare_udp(int v6)
{
	static const char *const names[2][PER_FAMILY] = {
		{"IPv4 receiver", "IPv4 first", "IPv4 second", "IPv4 connected"},
		{"IPv6 receiver", "IPv6 first", "IPv6 second", "IPv6 connected"}};
	struct timeval limit = {7, 500000};
	struct sockaddr_storage at;
	socklen_t len = sizeof at;

	for (int i = 0; i < PER_FAMILY; i++) {
		family[v6][i] = make(names[v6][i], v6 ? AF_INET6 : AF_INET, SOCK_DGRAM, 0);
		if (!family[v6][i])
			return false;
		if (!bind_loopback(family[v6][i], v6)) {
			n_socks -= i + 1;
			return false;
		}
	}
	getsockname(family[v6][RECEIVER]->fd, (struct sockaddr *)&at, &len);
	if (connect(family[v6][CONNECTED]->fd, (struct sockaddr *)&at, len))
		die("connect");
	set(family[v6][RECEIVER], SOL_SOCKET, SO_RCVBUF, 1 << 20);
	set(family[v6][FIRST], SOL_SOCKET, SO_BROADCAST, 1);
	if (v6)
		set(family[v6][FIRST], IPPROTO_IPV6, IPV6_TCLASS, 32);
	set(family[v6][SECOND], IPPROTO_IP, IP_TTL, 9);
	setsockopt(family[v6][SECOND]->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
	return true;
}

/* The group is left and joined: leaving is refused to who has not joined. */
static void check_group(void)
{
	struct ip_mreq group = {.imr_multiaddr.s_addr = htonl(0xef010101), .imr_interface.s_addr = htonl(INADDR_LOOPBACK)};
	int fd = family[0][RECEIVER]->fd;

	EXPECT(!setsockopt(fd, IPPROTO_IP, IP_DROP_MEMBERSHIP, &group, sizeof group), "the group is lost");
	if (setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof group))
		die("join");
}

/* ---- the others ------------------------------------------------------------------------------- */

static void check_netlink(void)
{
	struct {
		struct nlmsghdr head;
		struct rtgenmsg body;
	} asked = {{sizeof asked, RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, 7, 0}, {0}};
	static char answer[1 << 16];
	struct nlmsghdr *head = (struct nlmsghdr *)(void *)answer;
	bool links = false;

	if (send(netlink->fd, &asked, sizeof asked, 0) < 0)
		return fail("netlink cannot be asked: %s", strerror(errno));
	do {
		if (recv(netlink->fd, answer, sizeof answer, 0) < 0)
			return fail("netlink does not answer: %s", strerror(errno));
		links |= head->nlmsg_type == RTM_NEWLINK && head->nlmsg_seq == 7;
	} while (head->nlmsg_type != NLMSG_DONE);
	EXPECT(links, "netlink has told of no link");
}

static void check_packet(void)
{
	char frame[64] = {0}, got[64];
	struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex("lo")};
	int here = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);

	frame[12] = (char)(PROTOCOL >> 8);
	frame[13] = (char)(PROTOCOL & 0xff);
	memcpy(frame + 14, "heard", 5);
	if (here < 0 || sendto(here, frame, sizeof frame, 0, (struct sockaddr *)&to, sizeof to) < 0)
		die("send a frame");
	close(here);
	EXPECT(recv(packet->fd, got, sizeof got, 0) == sizeof got && !memcmp(got + 14, "heard", 5), "no packet was heard");
	/* It goes out, and comes in. */
	while (recv(packet->fd, got, sizeof got, MSG_DONTWAIT) > 0)
		;
}

static void prepare_others(void)
{
	struct sockaddr_nl at = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK};
	struct sockaddr_ll on = {.sll_family = AF_PACKET, .sll_protocol = htons(PROTOCOL),
				 .sll_ifindex = (int)if_nametoindex("lo")};
	uint32_t filter = ~(1u << 8);		/* echo requests, nothing else */

	netlink = make("netlink", AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	if (!netlink || bind(netlink->fd, (struct sockaddr *)&at, sizeof at))
		die("netlink");
	set(netlink, SOL_NETLINK, NETLINK_EXT_ACK, 1);
	set(netlink, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, RTNLGRP_IPV6_IFINFO);
	packet = make("packet", AF_PACKET, SOCK_RAW, 0);
	if (packet) {
		set(packet, SOL_PACKET, PACKET_AUXDATA, 1);
		if (bind(packet->fd, (struct sockaddr *)&on, sizeof on))
			die("bind packet");
	}
	raw = make("raw", AF_INET, SOCK_RAW, IPPROTO_ICMP);
	if (raw && setsockopt(raw->fd, 255, 1, &filter, sizeof filter))
		die("ICMP_FILTER");
}

/* ---- checks ----------------------------------------------------------------------------------- */

static void check_seen(const struct sock *s)
{
	const struct seen *was = &s->seen;
	struct seen is;

	look(s->fd, &is);
	EXPECT(!memcmp(&is.here, &was->here, sizeof is.here) && !memcmp(&is.there, &was->there, sizeof is.there),
	       "%s has other addresses", s->name);
	EXPECT(is.status_flags == was->status_flags, "%s has flags %o, had %o", s->name, (unsigned)is.status_flags,
	       (unsigned)was->status_flags);
	for (size_t i = 0; i < LEN(OPTIONS); i++)
		EXPECT(!memcmp(is.options[i], was->options[i], sizeof is.options[i]),
		       "%s: option %d of level %d is %d, was %d", s->name, OPTIONS[i].name, OPTIONS[i].level,
		       *(int *)(void *)is.options[i], *(const int *)(const void *)was->options[i]);
}

static void check(void)
{
	for (int i = 0; i < n_socks; i++)
		check_seen(&socks[i]);
	if (atomic_load(&verdict.state))
		return;
	for (int v6 = 0; v6 < 2; v6++)
		if (family[v6][RECEIVER]) {
			receive_all(v6);
			send_some(v6);
		}
	if (atomic_load(&verdict.state))
		return;
	check_group();
	check_netlink();
	if (packet)
		check_packet();
}

static void step_send(void)
{
	for (int v6 = 0; v6 < 2; v6++)
		if (family[v6][RECEIVER])
			send_some(v6);
}

static void damage_lost(void)
{
	char byte;

	if (recv(family[0][RECEIVER]->fd, &byte, 1, MSG_DONTWAIT) < 0)
		die("recv");
}

static void damage_more(void) { send(family[0][CONNECTED]->fd, "more", 4, 0); }
static void damage_peer(void)
{
	struct sockaddr nobody = {.sa_family = AF_UNSPEC};

	connect(family[0][CONNECTED]->fd, &nobody, sizeof nobody);
}

static void damage_group(void)
{
	struct ip_mreq group = {.imr_multiaddr.s_addr = htonl(0xef010101), .imr_interface.s_addr = htonl(INADDR_LOOPBACK)};

	setsockopt(family[0][RECEIVER]->fd, IPPROTO_IP, IP_DROP_MEMBERSHIP, &group, sizeof group);
}

static void damage_netlink(void) { set(netlink, SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, RTNLGRP_LINK); }
static void damage_option(void) { set(family[0][SECOND], IPPROTO_IP, IP_TTL, 10); }

int main(void)
{
	static const struct named steps[] = {{"send", step_send}, {NULL, NULL}};
	static const struct named damages[] = {{"lost", damage_lost}, {"more", damage_more}, {"peer", damage_peer},
		{"group", damage_group}, {"netlink", damage_netlink}, {"option", damage_option}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};
	struct ip_mreq group = {.imr_multiaddr.s_addr = htonl(0xef010101), .imr_interface.s_addr = htonl(INADDR_LOOPBACK)};

	for (int v6 = 0; v6 < 2; v6++)
		if (!prepare_udp(v6))
			family[v6][RECEIVER] = NULL;
	if (!family[0][RECEIVER])
		die("no IPv4");
	if (setsockopt(family[0][RECEIVER]->fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof group))
		die("join");
	prepare_others();
	for (int i = 0; i < n_socks; i++)
		look(socks[i].fd, &socks[i].seen);
	step_send();
	return serve(&program);
}
