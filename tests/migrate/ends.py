"""Both ends of a channel within the test: a socket pair, with a raw end where a peer shall lie."""

import contextlib
import socket

from ckpt.migrate.channel import Channel, Patience
from ckpt.migrate.transport import FdTransport

SHORT = Patience(silence_s=0.2, stall_s=0.2, message_s=0.2, handshake_s=0.5, keep_alive_s=0.1)
"""For tests whose peer does nothing: the only way to see that a limit holds is to reach it."""


def channel_on(end, peer="the peer", **options):
    fd = end.detach()
    return Channel(FdTransport(fd, fd, peer), **options)


@contextlib.contextmanager
def channels(**options):
    left, right = socket.socketpair()
    with channel_on(left, "right", **options) as one, channel_on(right, "left", **options) as other:
        yield one, other


@contextlib.contextmanager
def channel_and_socket(**options):
    left, right = socket.socketpair()
    with channel_on(left, **options) as channel, right:
        yield channel, right
