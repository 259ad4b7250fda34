/*
 * s_unix_named: unix sockets that have names, and who came by them.
 *
 * Listeners with a relative, an absolute, an abstract and a deleted name; connections through each of them with messages in
 * both queues, one whose listener is closed; clients that wait to be accepted, in an order that is not that of their numbers;
 * a datagram socket with messages of senders with and without names, two that have called it. `check` compares
 * names, files and queues, accepts who waits and lets others wait in their places.
 */
#include "workload.h"

#include <sys/socket.h>
#include <sys/un.h>

#define N_WAITING 3
#define N_LISTENERS 4

struct name {
	struct sockaddr_un address;
	socklen_t len;
};

static struct listener {
	const char *what;
	int type, fd, backlog;
	struct name name;
	mode_t mode;			/* of its file; 0: there is none */
	int client, server;		/* a connection through it */
} listeners[N_LISTENERS];
static int waiting[N_WAITING];		/* at the first one, in this order */
static int hub, spoke, nameless;
static char n_talked;

static struct name make_name(const char *path, size_t len)
{
	struct name name = {.address.sun_family = AF_UNIX};

	if (len > sizeof name.address.sun_path)
		die("the name %s is too long", path);
	memcpy(name.address.sun_path, path, len);
	name.len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len);
	return name;
}

/* The kernel counts the zero byte that ends a path. */
static struct name path_name(const char *path)
{
	return make_name(path, strlen(path) + 1);
}

static int new_socket(int type)
{
	int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	return fd;
}

static void call(int fd, const struct name *name)
{
	if (connect(fd, (const struct sockaddr *)&name->address, name->len))
		die("connect to %s", name->address.sun_path);
}

static void bind_to(int fd, const struct name *name)
{
	if (bind(fd, (const struct sockaddr *)&name->address, name->len))
		die("bind to %s", name->address.sun_path);
}

/* ---- setting up ------------------------------------------------------------------------------- */

static void make_listener(struct listener *l, const char *what, int type, struct name name, mode_t mode)
{
	*l = (struct listener){what, type, new_socket(type), 3 + (int)(l - listeners), name, mode, -1, -1};
	if (name.address.sun_path[0])
		unlink(name.address.sun_path);
	bind_to(l->fd, &name);
	if (listen(l->fd, l->backlog))
		die("listen");
	l->client = new_socket(type);
	call(l->client, &name);
	l->server = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC);
	if (send(l->client, "to server", 9, 0) != 9 || send(l->server, "to client", 9, 0) != 9)
		die("send");
	if (mode && chmod(name.address.sun_path, mode))
		die("chmod");
}

static void let_wait(void)
{
	for (int i = 0; i < N_WAITING; i++)
		waiting[N_WAITING - 1 - i] = new_socket(SOCK_STREAM);
	for (int i = 0; i < N_WAITING; i++)
		EXPECT(!connect(waiting[i], (struct sockaddr *)&listeners[0].name.address, listeners[0].name.len), "client %d cannot call", i);
}

static void fill_hub(void)
{
	struct name to = path_name("hub");
	int other = new_socket(SOCK_DGRAM);
	int n = 0;

	n += send(spoke, "one", 3, 0) == 3;
	n += sendto(other, "two", 3, 0, (struct sockaddr *)&to.address, to.len) == 3;
	n += send(nameless, "three", 5, 0) == 5;
	n += send(spoke, "four", 4, 0) == 4;
	EXPECT(n == 4, "not everybody can send to the hub");
	close(other);
}

static void make_hub(void)
{
	struct name hub_name = path_name("hub"), spoke_name = path_name("./spoke");

	unlink("hub");
	unlink("spoke");
	hub = new_socket(SOCK_DGRAM);
	spoke = new_socket(SOCK_DGRAM);
	nameless = new_socket(SOCK_DGRAM);
	bind_to(hub, &hub_name);
	bind_to(spoke, &spoke_name);
	call(spoke, &hub_name);
	call(nameless, &hub_name);
	fill_hub();
}

static void prepare(void)
{
	char path[4096 + 16], abstract[64] = "";

	if (!getcwd(path, 4096))
		die("getcwd");
	strcat(path, "/absolute");
	snprintf(abstract + 1, sizeof abstract - 1, "s_unix_named of %d", (int)getpid());
	make_listener(&listeners[0], "relative", SOCK_STREAM, path_name("relative"), 0640);
	make_listener(&listeners[1], "absolute", SOCK_SEQPACKET, path_name(path), 0700);
	make_listener(&listeners[2], "abstract", SOCK_STREAM, make_name(abstract, 1 + strlen(abstract + 1)), 0);
	make_listener(&listeners[3], "deleted", SOCK_STREAM, path_name("deleted"), 0);
	unlink("deleted");
	let_wait();
	make_hub();
}

/* ---- protocol --------------------------------------------------------------------------------- */

static void check_name(const char *what, int fd, bool of_peer, const struct name *must)
{
	struct sockaddr_un is;
	socklen_t len = sizeof is;
	int failed = of_peer ? getpeername(fd, (struct sockaddr *)&is, &len) : getsockname(fd, (struct sockaddr *)&is, &len);

	EXPECT(!failed, "%s: no name: %s", what, strerror(errno));
	EXPECT(failed || (len == must->len && !memcmp(&is, &must->address, len)), "%s is called %.*s (%u), not %s (%u)", what,
	       (int)sizeof is.sun_path, is.sun_path, len, must->address.sun_path, must->len);
}

static void check_queue(const char *what, int from, int to, const char *text)
{
	char bytes[64];
	ssize_t n = recv(to, bytes, sizeof bytes, MSG_DONTWAIT), len = (ssize_t)strlen(text);

	EXPECT(n == len && !memcmp(bytes, text, (size_t)len), "%s: '%.*s' in the queue, not '%s'", what, (int)(n < 0 ? 0 : n), bytes, text);
	EXPECT(send(from, text, (size_t)len, MSG_NOSIGNAL) == len, "%s: cannot send", what);
}

static void check_file(const struct listener *l)
{
	struct stat status;
	int failed = stat(l->name.address.sun_path, &status);

	EXPECT(!failed && status.st_mode == (S_IFSOCK | l->mode), "%s: its file has mode %o, not %o", l->what,
	       failed ? 0 : status.st_mode, S_IFSOCK | l->mode);
}

static void check_listener(struct listener *l)
{
	static const struct name none = {.address.sun_family = AF_UNIX, .len = sizeof(sa_family_t)};
	int listens = 0;
	socklen_t len = sizeof listens;

	if (l->mode)
		check_file(l);
	check_name(l->what, l->server, false, &l->name);
	check_name(l->what, l->client, true, &l->name);
	check_name(l->what, l->client, false, &none);
	check_name(l->what, l->server, true, &none);
	check_queue(l->what, l->client, l->server, "to server");
	check_queue(l->what, l->server, l->client, "to client");
	check_name(l->what, l->fd, false, &l->name);
	EXPECT(!getsockopt(l->fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) && listens, "%s does not listen", l->what);
}

/* A new client, and what it says; the deleted one cannot be found any more. */
static void talk(struct listener *l)
{
	int client = new_socket(l->type), server;
	char byte = 0, said = ++n_talked;

	if (fcntl(l->fd, F_SETFL, O_NONBLOCK))
		die("F_SETFL");
	EXPECT(!connect(client, (struct sockaddr *)&l->name.address, l->name.len), "%s cannot be called: %s", l->what, strerror(errno));
	server = accept(l->fd, NULL, NULL);
	EXPECT(server >= 0, "%s: nobody to be accepted", l->what);
	EXPECT(send(client, &said, 1, MSG_NOSIGNAL) == 1 && recv(server, &byte, 1, MSG_DONTWAIT) == 1 && byte == said,
	       "%s: a new connection does not work", l->what);
	fcntl(l->fd, F_SETFL, 0);
	close(client);
	close(server);
}

static void check_waiting(void)
{
	fcntl(listeners[0].fd, F_SETFL, O_NONBLOCK);
	for (int i = 0; i < N_WAITING; i++) {
		int server = accept(listeners[0].fd, NULL, NULL);
		char said = (char)('a' + i), byte = 0;

		EXPECT(server >= 0, "client %d does not wait any more", i);
		EXPECT(send(waiting[i], &said, 1, MSG_NOSIGNAL) == 1 && recv(server, &byte, 1, MSG_DONTWAIT) == 1 && byte == said,
		       "not client %d waits in place %d", i, i);
		close(server);
		close(waiting[i]);
	}
	EXPECT(accept(listeners[0].fd, NULL, NULL) < 0 && errno == EAGAIN, "more wait than have called");
	fcntl(listeners[0].fd, F_SETFL, 0);
}

/* The limit is the backlog: one more than that may wait. */
static void check_backlog(const struct listener *l)
{
	int clients[16], n = 0;

	while (n < 16) {
		clients[n] = socket(AF_UNIX, l->type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
		if (connect(clients[n++], (const struct sockaddr *)&l->name.address, l->name.len))
			break;
	}
	EXPECT(n == l->backlog + 2, "%s: %d can wait, not %d", l->what, n - 1, l->backlog + 1);
	fcntl(l->fd, F_SETFL, O_NONBLOCK);
	while (n--)
		close(clients[n]);
	for (int server; (server = accept(l->fd, NULL, NULL)) >= 0;)
		close(server);
	fcntl(l->fd, F_SETFL, 0);
}

static void check_hub(void)
{
	static const char *const texts[] = {"one", "two", "three", "four"};
	struct name hub_name = path_name("hub"), spoke_name = path_name("./spoke");

	check_name("hub", hub, false, &hub_name);
	check_name("spoke", spoke, false, &spoke_name);
	check_name("spoke's peer", spoke, true, &hub_name);
	check_name("peer of the nameless one", nameless, true, &hub_name);
	for (size_t i = 0; i < LEN(texts); i++) {
		struct sockaddr_un from;
		socklen_t len = sizeof from;
		char bytes[64];
		ssize_t n = recvfrom(hub, bytes, sizeof bytes, MSG_DONTWAIT, (struct sockaddr *)&from, &len);
		bool by_spoke = len == spoke_name.len && !memcmp(&from, &spoke_name.address, len);

		EXPECT(n == (ssize_t)strlen(texts[i]) && !memcmp(bytes, texts[i], (size_t)n), "message %zu to the hub is another one", i);
		EXPECT(by_spoke == (i == 0 || i == 3), "message %zu is from somebody else", i);
	}
	fill_hub();
}

static void check(void)
{
	for (struct listener *l = listeners; l < listeners + N_LISTENERS; l++)
		check_listener(l);
	check_waiting();
	for (struct listener *l = listeners; l < listeners + 3; l++) {
		talk(l);
		check_backlog(l);
	}
	let_wait();
	check_hub();
}

/* Others wait, and what is called last is called anew. */
static void exchange(void)
{
	for (int i = 0; i < N_WAITING; i++)
		close(accept(listeners[0].fd, NULL, NULL));
	for (int i = 0; i < N_WAITING; i++)
		close(waiting[i]);
	talk(&listeners[0]);
	let_wait();
}

static void damage_renamed(void) { rename("relative", "elsewhere"); }
static void damage_mode(void) { chmod(listeners[1].name.address.sun_path, 0755); }
static void damage_backlog(void) { listen(listeners[1].fd, 9); }
static void damage_waiting(void) { close(accept(listeners[0].fd, NULL, NULL)); }
static void damage_order(void) { int one = waiting[0]; waiting[0] = waiting[1]; waiting[1] = one; }
static void damage_queue(void) { char bytes[64]; EXPECT(recv(listeners[3].server, bytes, 64, 0) == 9, "recv"); }
static void damage_connection(void) { close(listeners[2].client); }
static void damage_message(void) { char bytes[64]; EXPECT(recv(hub, bytes, 64, 0) == 3, "recv"); }
static void damage_caller(void) { struct sockaddr nobody = {.sa_family = AF_UNSPEC}; EXPECT(!connect(nameless, &nobody, sizeof nobody), "connect"); }
static void damage_sender(void)
{
	char bytes[64];
	struct name name = path_name("hub");

	for (int i = 0; i < 4; i++)
		EXPECT(recv(hub, bytes, sizeof bytes, 0) > 0, "recv");
	close(spoke);
	unlink("spoke");
	spoke = new_socket(SOCK_DGRAM);
	call(spoke, &name);
	fill_hub();
}

int main(void)
{
	static const struct named steps[] = {{"exchange", exchange}, {NULL, NULL}};
	static const struct named damages[] = {
		{"renamed", damage_renamed}, {"mode", damage_mode}, {"backlog", damage_backlog}, {"waiting", damage_waiting},
		{"order", damage_order}, {"queue", damage_queue}, {"connection", damage_connection},
		{"message", damage_message}, {"caller", damage_caller}, {"sender", damage_sender}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
