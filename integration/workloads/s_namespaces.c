/*
 * s_namespaces [down]: namespaces of the program's own: a host name and a domain name that nobody else has, and a
 * loopback interface that is up (with `down`: is not). It makes them itself, so it needs root.
 */
#include "workload.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/utsname.h>

static char hostname[65] = "a-host-of-its-own", domainname[65] = "a.domain";
static bool up = true;

static struct utsname names(void)
{
	struct utsname now;

	if (uname(&now))
		die("uname");
	return now;
}

static short loopback(unsigned long request, short flags)
{
	struct ifreq ask = {.ifr_name = "lo"};
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	ask.ifr_flags = flags;
	if (fd < 0 || ioctl(fd, request, &ask))
		die("loopback");
	close(fd);
	return ask.ifr_flags;
}

/* A datagram to oneself arrives if the interface is up. */
static bool reaches_itself(void)
{
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	socklen_t len = sizeof to;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	char letter = 'x';
	bool arrived;

	arrived = !bind(fd, (struct sockaddr *)&to, sizeof to) && !getsockname(fd, (struct sockaddr *)&to, &len) &&
		  sendto(fd, "y", 1, 0, (struct sockaddr *)&to, len) == 1 &&
		  recv(fd, &letter, 1, MSG_DONTWAIT) == 1 && letter == 'y';
	close(fd);
	return arrived;
}

static void check(void)
{
	struct utsname now = names();

	EXPECT(!strcmp(now.nodename, hostname), "the host is called %s, not %s", now.nodename, hostname);
	EXPECT(!strcmp(now.domainname, domainname), "the domain is called %s, not %s", now.domainname, domainname);
	EXPECT(!!(loopback(SIOCGIFFLAGS, 0) & IFF_UP) == up, "loopback is not as it was");
	EXPECT(reaches_itself() == up, "a datagram to oneself does what it should not");
}

static void step_rename(void)
{
	static int n;

	snprintf(hostname, sizeof hostname, "host-%d", ++n);
	if (sethostname(hostname, strlen(hostname)))
		die("sethostname");
}

static void damage_host(void) { sethostname("other", 5); }
static void damage_domain(void) { setdomainname("other", 5); }
static void damage_loopback(void) { loopback(SIOCSIFFLAGS, (short)(up ? 0 : IFF_UP)); }

int main(int argc, char **argv)
{
	static const struct named steps[] = {{"rename", step_rename}, {NULL, NULL}};
	static const struct named damages[] = {
		{"host", damage_host}, {"domain", damage_domain}, {"loopback", damage_loopback}, {NULL, NULL}};
	static const struct program program = {check, steps, damages, NULL};

	up = argc < 2 || strcmp(argv[1], "down");
	if (unshare(CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET))
		die("unshare");
	if (sethostname(hostname, strlen(hostname)) || setdomainname(domainname, strlen(domainname)))
		die("names");
	if (up)
		loopback(SIOCSIFFLAGS, IFF_UP);
	return serve(&program);
}
