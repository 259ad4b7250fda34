#!/bin/sh
# address.sh take|leave ADDRESS INTERFACE [ANNOUNCE]
#
# Gives this host a service address, or takes it away; run by hooks of a move, on each host. Whoever takes it
# says so to the neighbours (ANNOUNCE is the program for that). Taking twice, or leaving twice, is no error.
set -eu
what=$1 address=$2 interface=$3
case $what in
take)
	ip address replace "$address/24" dev "$interface"
	"$4" "$interface" "$address"
	;;
leave)
	ip address delete "$address/24" dev "$interface" 2>/dev/null || [ -z "$(ip -o address show to "$address")" ]
	;;
*)
	exit 2
	;;
esac
