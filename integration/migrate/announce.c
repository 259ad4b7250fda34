/*
 * announce INTERFACE ADDRESS
 *
 * Tells the neighbours that ADDRESS (of IPv4) is here now: one ARP request for it, from it, to all
 * (RFC 5227, section 3), as `arping -A` would. Bridges learn the port, whoever knew the address the new owner.
 */
#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/if_ether.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int fail(const char *what)
{
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	struct ifreq asked = {0};
	struct ether_arp packet = {0};
	struct sockaddr_ll everybody = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ARP),
					.sll_halen = ETH_ALEN};
	int fd = socket(AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, htons(ETH_P_ARP));

	if (fd < 0)
		return fail("socket");
	if (argc != 3 || inet_pton(AF_INET, argv[2], packet.arp_spa) != 1) {
		fprintf(stderr, "usage: announce INTERFACE ADDRESS\n");
		return 2;
	}
	strncpy(asked.ifr_name, argv[1], IFNAMSIZ - 1);
	if (ioctl(fd, SIOCGIFHWADDR, &asked) < 0)
		return fail(argv[1]);
	memcpy(packet.arp_sha, asked.ifr_hwaddr.sa_data, ETH_ALEN);
	memcpy(packet.arp_tpa, packet.arp_spa, sizeof packet.arp_tpa);
	packet.ea_hdr = (struct arphdr){htons(ARPHRD_ETHER), htons(ETH_P_IP), ETH_ALEN, 4,
					htons(ARPOP_REQUEST)};
	memset(everybody.sll_addr, 0xff, ETH_ALEN);
	everybody.sll_ifindex = (int)if_nametoindex(argv[1]);
	if (sendto(fd, &packet, sizeof packet, 0, (struct sockaddr *)&everybody, sizeof everybody) < 0)
		return fail("sendto");
	return 0;
}
