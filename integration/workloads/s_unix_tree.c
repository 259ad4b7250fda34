/*
 * s_unix_tree: unix sockets between the processes of a tree.
 *
 * A child has one end of each pair, the parent the other one; both have closed what is not theirs. A third pair belongs to
 * both. The child has called the parent's listener: one connection is accepted, one waits. A grandchild, made by
 * the child, has the end of a pair whose other end is the parent's. `check` has both look: what waits in
 * their queues, who made and who called, and a word on every socket in both directions.
 */
#include "workload.h"

#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#define PARENT 0
#define CHILD 1

static int orders[2];			/* the parent asks, the child answers */
static int queued[2];			/* a word waits in each end */
static int shared[2];			/* both have both ends */
static int far[2];			/* the grandchild has one end */
static int listener = -1, accepted = -1, called = -1, waits = -1;
static pid_t child, grandchild;
static const struct sockaddr_un ADDRESS = {.sun_family = AF_UNIX, .sun_path = "tree"};

static void make_pair(int pair[2], int type)
{
	if (socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, pair))
		die("socketpair");
}

static int call(void)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || connect(fd, (const struct sockaddr *)&ADDRESS, sizeof ADDRESS))
		die("connect");
	return fd;
}

static bool is_made_by(int fd, pid_t pid)
{
	struct ucred who;
	socklen_t len = sizeof who;

	return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &len) && who.pid == pid;
}

static bool takes(int fd, const char *text)
{
	char bytes[64];
	ssize_t n = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);

	return n == (ssize_t)strlen(text) && !memcmp(bytes, text, (size_t)n);
}

static bool gives(int fd, const char *text)
{
	return send(fd, text, strlen(text), MSG_NOSIGNAL) == (ssize_t)strlen(text);
}

/* ---- the others ------------------------------------------------------------------------------- */

static const char *judge(void)
{
	if (!takes(queued[CHILD], "to the child") || takes(queued[CHILD], "one more") || !gives(queued[CHILD], "to the parent"))
		return "the child's queue is wrong";
	if (!is_made_by(called, getppid()) || !is_made_by(orders[CHILD], getppid()))
		return "the child is told of another peer";
	if (!gives(called, "by the caller") || !gives(shared[0], "by the child"))
		return "the child cannot write";
	return "good";
}

static _Noreturn void run_grandchild(void)
{
	char byte;

	while (read(far[CHILD], &byte, 1) == 1)
		byte++, write_all(far[CHILD], &byte, 1);
	_exit(0);
}

static _Noreturn void run_child(void)
{
	char order;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(orders[PARENT]);
	close(queued[PARENT]);
	close(listener);
	close(far[PARENT]);
	called = call();
	waits = call();
	grandchild = fork();
	if (grandchild == 0) {
		close(orders[CHILD]);
		close(called);
		close(waits);
		run_grandchild();
	}
	close(far[CHILD]);
	write_all(orders[CHILD], &grandchild, sizeof grandchild);
	while (read(orders[CHILD], &order, 1) == 1) {
		if (order == 'c') {
			const char *verdict_of_child = judge();

			write_all(orders[CHILD], verdict_of_child, strlen(verdict_of_child));
		} else if (order == 'w') {		/* let another one wait */
			close(waits);
			waits = call();
			write_all(orders[CHILD], "done", 4);
		}
	}
	kill(grandchild, SIGKILL);
	_exit(0);
}

/* ---- setting up ------------------------------------------------------------------------------- */

static void prepare(void)
{
	unlink(ADDRESS.sun_path);
	listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(listener, (const struct sockaddr *)&ADDRESS, sizeof ADDRESS) || listen(listener, 4))
		die("listen");
	make_pair(orders, SOCK_STREAM);
	make_pair(queued, SOCK_DGRAM);
	make_pair(shared, SOCK_SEQPACKET);
	make_pair(far, SOCK_STREAM);
	child = fork();
	if (child == 0)
		run_child();
	close(orders[CHILD]);
	close(queued[CHILD]);
	close(far[CHILD]);
	if (read(orders[PARENT], &grandchild, sizeof grandchild) != sizeof grandchild)
		die("no child");
	accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (!gives(queued[PARENT], "to the child"))
		die("send");
}

/* ---- protocol --------------------------------------------------------------------------------- */

static void ask(char order, const char *good)
{
	char answer[128] = "";
	ssize_t n = -1;

	if (send(orders[PARENT], &order, 1, MSG_NOSIGNAL) == 1)
		n = recv(orders[PARENT], answer, sizeof answer - 1, 0);
	EXPECT(n > 0 && !strcmp(answer, good), "the child says '%s' to %c", answer, order);
}

static void check(void)
{
	static bool again;
	char byte = 'a';
	int one;

	if (again)
		EXPECT(takes(queued[PARENT], "to the parent"), "the parent's queue is wrong");
	again = true;
	ask('c', "good");
	EXPECT(gives(queued[PARENT], "to the child"), "the parent cannot write");
	EXPECT(takes(accepted, "by the caller"), "the connection is broken");
	EXPECT(takes(shared[1], "by the child"), "the shared pair is broken");
	EXPECT(is_made_by(accepted, child), "another one has called");
	EXPECT(is_made_by(orders[PARENT], getpid()), "another one has made the pairs");
	EXPECT(send(far[PARENT], &byte, 1, MSG_NOSIGNAL) == 1 && read(far[PARENT], &byte, 1) == 1 && byte == 'b', "the grandchild is far away");
	one = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	EXPECT(one >= 0 && is_made_by(one, child), "nobody waits, or another one");
	close(one);
	ask('w', "done");
}

static void change(void)
{
	ask('w', "done");
	close(accept4(listener, NULL, NULL, SOCK_CLOEXEC));	/* the one that has gone */
}

static void damage_child(void) { kill(child, SIGKILL); waitpid(child, NULL, 0); }
static void damage_grandchild(void) { shutdown(far[PARENT], SHUT_RDWR); }
static void damage_queue(void) { gives(queued[PARENT], "one more"); }
static void damage_connection(void) { close(accepted); accepted = listener; }
static void damage_waiting(void) { close(accept(listener, NULL, NULL)); fcntl(listener, F_SETFL, O_NONBLOCK); }
static void damage_shared(void) { int pair[2]; make_pair(pair, SOCK_SEQPACKET); dup3(pair[1], shared[1], O_CLOEXEC); }

int main(void)
{
	static const struct named steps[] = {{"change", change}, {NULL, NULL}};
	static const struct named damages[] = {
		{"child", damage_child}, {"grandchild", damage_grandchild}, {"queue", damage_queue},
		{"connection", damage_connection}, {"waiting", damage_waiting}, {"shared", damage_shared}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	prepare();
	return serve(&program);
}
