"""The ioctls of terminals: their numbers, and what they do on a pair of ours."""

import os
import pty
import select

import pytest

from ckpt.kernel import tty
from tests.kernel.c_headers import read_numbers, run_c

HEADERS = ["asm/termbits.h", "asm/ioctls.h", "linux/tty.h"]


@pytest.fixture
def pair():
    """Master and slave."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


def test_numbers():
    # Those of termios2 are made of a struct that the program must know.
    names = {name: name.lstrip("_") for name in vars(tty) if "TIOC" in name or "FIONREAD" in name}
    ours = {public: getattr(tty, name) for name, public in names.items()}
    ours |= {"TCGETS2": tty._TCGETS2, "TCSETS2": tty.TCSETS2, "N_TTY": tty.N_TTY}
    assert len(ours) == 22
    assert read_numbers(HEADERS, ours) == ours


def test_sizes():
    sizes = run_c(
        ["asm/termbits.h"],
        'printf("%zu %zu", sizeof(struct termios2), sizeof(struct termios));',
    )
    assert sizes.split() == [str(tty.TERMIOS2_BYTES), str(tty.TERMIOS_BYTES)]


def test_settings_and_size_are_those_of_the_slave(pair):
    master, slave = pair
    settings = bytearray(tty.get_settings(slave))
    settings[0] ^= 1
    tty.set_settings(master, bytes(settings))
    assert tty.get_settings(slave) == tty.get_settings(master) == settings
    tty.set_size(master, (1, 2, 3, 4))
    assert tty.get_size(slave) == (1, 2, 3, 4)


def test_modes(pair):
    master, slave = pair
    assert not tty.is_locked(master)
    tty.set_locked(master, locked=True)
    assert tty.is_locked(master)
    assert not tty.is_in_packet_mode(master)
    tty.set_packet_mode(master)
    assert tty.is_in_packet_mode(master)
    tty.make_exclusive(slave)
    assert (tty.is_exclusive(master), tty.is_exclusive(slave)) == (False, True)
    assert (tty.get_discipline(master), tty.get_discipline(slave)) == (tty.N_TTY, tty.N_TTY)


def test_number_and_device(pair):
    master, slave = pair
    number = tty.get_number(master)
    assert os.ttyname(slave) == f"/dev/pts/{number}"
    device = os.makedev(tty.SLAVE_MAJOR, number)
    assert tty.get_device(master) == tty.get_device(slave) == device
    assert os.fstat(slave).st_rdev == device
    assert os.fstat(master).st_rdev == tty.PTMX_DEVICE


def test_the_peer_is_opened_with_flags_as_they_are(pair):
    peer = tty.open_peer(pair[0], os.O_WRONLY | os.O_NONBLOCK)
    os.write(peer, b"x")
    assert tty.poll_now(pair[0]) & select.POLLIN
    assert tty.count_readable(pair[0]) == 1
    os.close(peer)


def test_what_is_no_terminal_says_so():
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="ioctl"):
        tty.get_settings(reader)
    os.close(reader)
    os.close(writer)
