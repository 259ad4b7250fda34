"""Many options at once say what one call each would say."""

import os
import socket

import pytest

from ckpt.kernel.getsockopts import Getsockopts

NUMBERS = [
    socket.SO_TYPE,
    socket.SO_SNDBUF,
    socket.SO_PASSCRED,
    12345,  # no option
    socket.SO_RCVLOWAT,
]


def test_numbers_and_what_there_is_not():
    asked = Getsockopts([(socket.SOL_SOCKET, number, 4) for number in NUMBERS])
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, kind == socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 7)
            size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            passes = int(kind == socket.SOCK_DGRAM)
            assert asked.read_ints(sock.fileno()) == [kind, size, passes, None, 7]


@pytest.mark.parametrize("name", [b"lo", b""])
def test_a_value_is_as_long_as_the_kernel_says(name):
    options = [(socket.SOL_SOCKET, socket.SO_LINGER, 8), (socket.IPPROTO_TCP, 13, 16)]
    asked = Getsockopts([*options, (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)])
    with socket.socket() as sock:
        if name:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name)
        one_by_one = [sock.getsockopt(*option) for option in options]
        bound = name + b"\0" if name else b""
        assert asked.read(sock.fileno()) == [*one_by_one, bound]


def test_a_socket_is_let_go_of():
    asked = Getsockopts([(socket.SOL_SOCKET, socket.SO_TYPE, 4)])
    one, other = socket.socketpair()
    with other:
        asked.read_ints(one.fileno())
        one.close()
        assert other.recv(1) == b""


def test_no_options_at_all():
    with open(os.devnull) as file:
        assert Getsockopts([]).read(file.fileno()) == []
