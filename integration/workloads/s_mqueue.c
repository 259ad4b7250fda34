/*
 * s_mqueue: a POSIX message queue that nobody else can find any more: its name is gone. It is open twice, once without
 * waiting. Messages go in and come out by their priorities; between two commands it is empty.
 */
#include "workload.h"

#include <mqueue.h>

static int queue, other;
static struct mq_attr was;
static struct stat stat_was;

static void exchange(void)
{
	static const char *const texts[] = {"low", "high", "middle"};
	static const unsigned priorities[] = {1, 9, 5};
	char text[64];
	unsigned priority;

	for (int i = 0; i < 3; i++)
		if (mq_send(queue, texts[i], strlen(texts[i]) + 1, priorities[i]))
			return fail("sending: %s", strerror(errno));
	for (int i = 0; i < 3; i++) {
		static const int order[] = {1, 2, 0};
		ssize_t n = mq_receive(other, text, sizeof text, &priority);

		EXPECT(n > 0 && priority == priorities[order[i]] && !strcmp(text, texts[order[i]]),
		       "message %d is another", i);
	}
	EXPECT(mq_receive(other, text, sizeof text, NULL) < 0 && errno == EAGAIN, "there is one more message");
}

static void check(void)
{
	struct mq_attr now, now_other;
	struct stat status;

	if (mq_getattr(queue, &now) || mq_getattr(other, &now_other) || fstat(queue, &status))
		return fail("the queue cannot be examined: %s", strerror(errno));
	EXPECT(now.mq_maxmsg == was.mq_maxmsg && now.mq_msgsize == was.mq_msgsize, "it holds %ld of %ld bytes",
	       now.mq_maxmsg, now.mq_msgsize);
	EXPECT(now.mq_curmsgs == 0, "there are %ld messages", now.mq_curmsgs);
	EXPECT(!(now.mq_flags & O_NONBLOCK) && now_other.mq_flags & O_NONBLOCK, "who waits has changed");
	EXPECT(status.st_mode == stat_was.st_mode && status.st_uid == stat_was.st_uid && !status.st_nlink,
	       "its mode is %o", status.st_mode);
	exchange();
}

static void damage_flag(void)
{
	struct mq_attr set = {.mq_flags = O_NONBLOCK};

	mq_setattr(queue, &set, NULL);
}

static void damage_message(void) { mq_send(queue, "x", 1, 0); }
static void damage_mode(void) { fchmod(queue, 0604); }
static void damage_closed(void) { mq_close(other); }

int main(void)
{
	static const struct named steps[] = {{"exchange", exchange}, {NULL, NULL}};
	static const struct named damages[] = {
		{"flag", damage_flag}, {"message", damage_message}, {"mode", damage_mode},
		{"closed", damage_closed}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};
	char name[64];

	was.mq_maxmsg = 5;
	was.mq_msgsize = 64;
	snprintf(name, sizeof name, "/s_mqueue-%d", (int)getpid());
	queue = mq_open(name, O_RDWR | O_CREAT | O_EXCL, 0600, &was);
	other = mq_open(name, O_RDWR | O_NONBLOCK);
	if (queue < 0 || other < 0 || fchmod(queue, 0640) || mq_unlink(name) || fstat(queue, &stat_was))
		die("message queue");
	return serve(&program);
}
