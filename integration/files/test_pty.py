"""Pseudo-terminals whose master the process has itself."""

import contextlib
import fcntl
import os
import pty
import select
import stat
import struct
import termios

import pytest

from ckpt.errors import RestoreFailed
from ckpt.kernel import tty
from ckpt.kernel.pidfd import pidfd_getfd
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.files.table import FILES
from integration.files.processes import brought_back, capture, look, opened_by, rebuilt

_NUMBER = 40
"""Tests that run beside this one take lower ones."""
_ABOVE = 700
TIOCVHANGUP = 0x5437


def open_master(number=_NUMBER, flags=os.O_RDWR):
    """Open a master whose number nobody else asks for, at the lowest descriptor."""
    others = []
    while tty.get_number(fd := os.open("/dev/ptmx", flags | os.O_NOCTTY)) < number:
        others.append(fcntl.fcntl(fd, fcntl.F_DUPFD, _ABOVE))
        os.close(fd)
    for other in others:
        os.close(other)
    tty.set_locked(fd, locked=False)
    return fd


def open_slave(master, flags=os.O_RDWR):
    return os.open(f"/dev/pts/{tty.get_number(master)}", flags | os.O_NOCTTY)


def make_raw(fd):
    settings = termios.tcgetattr(fd)
    settings[0] &= ~(termios.ICRNL | termios.IXON)
    settings[1] &= ~termios.OPOST
    settings[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)
    settings[6][termios.VMIN] = 5
    termios.tcsetattr(fd, termios.TCSANOW, settings)


@contextlib.contextmanager
def borrowed(pid, fd):
    """Lend a descriptor of ours on one of a process."""
    pidfd = os.pidfd_open(pid)
    ours = pidfd_getfd(pidfd, fd, pid=pid)
    os.close(pidfd)
    try:
        yield ours
    finally:
        os.close(ours)


def asked(pid, fd, question):
    with borrowed(pid, fd) as ours:
        return question(ours)


def link(pid, fd):
    return os.readlink(f"/proc/{pid}/fd/{fd}")


def info(pid, fd):
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        return [line for line in file if not line.startswith(("mnt_id", "ino"))]


def views(pid, *fds):
    return [(link(pid, fd), info(pid, fd)) for fd in fds]


def events(pid, fd):
    return asked(pid, fd, tty.poll_now)


def test_a_pair_comes_back_with_its_number_its_flags_and_works():
    def prepare():
        master = open_master(flags=os.O_RDWR | os.O_NONBLOCK)
        open_slave(master)
        open_slave(master, os.O_WRONLY | os.O_NONBLOCK)
        os.dup2(master, 60)

    with opened_by(prepare) as pid:
        record, before = capture(pid), views(pid, 3, 4, 5, 60)
    with rebuilt(record, pid) as built:
        assert views(built.pid, 3, 4, 5, 60) == before
        assert built.warnings == []
        built.write(60, b"typed\n")
        assert built.read(4, 100) == b"typed\n"
        assert built.read(3, 100) == b"typed\r\n"
        built.write(5, b"shown\n")
        assert built.read(3, 100) == b"shown\r\n"


def test_a_slave_that_openpty_made_has_the_same_flags_again():
    def prepare():
        master = open_master()
        tty.open_peer(master, os.O_RDWR)

    with opened_by(prepare) as pid:
        record, before = capture(pid), views(pid, 3, 4)
    with rebuilt(record, pid) as built:
        assert views(built.pid, 3, 4) == before


def test_settings_and_size_come_back():
    def prepare():
        slave = open_slave(open_master())
        make_raw(slave)
        tty.set_size(slave, (33, 121, 640, 480))
        tty.lock_settings(slave, bytes(range(4)) + bytes(tty.TERMIOS_BYTES - 4))

    def state(fd):
        return tty.get_settings(fd), tty.get_size(fd), tty.get_locked_settings(fd)

    with opened_by(prepare) as pid:
        record, before = capture(pid), asked(pid, 4, state)
    with rebuilt(record, pid) as built:
        assert asked(built.pid, 3, state) == asked(built.pid, 4, state) == before
        built.write(3, b"typed\r")
        assert built.read(4, 100) == b"typed\r"
        built.write(4, b"\n")
        assert built.read(3, 100) == b"\n"


def test_packet_mode_exclusive_mode_and_lock_come_back():
    def prepare():
        master = open_master()
        slave = open_slave(master)
        tty.set_packet_mode(master)
        tty.make_exclusive(slave)
        tty.set_locked(master, locked=True)
        tty.make_exclusive(open_master(_NUMBER + 1))

    with brought_back(prepare) as (_, built):
        assert asked(built.pid, 3, tty.is_in_packet_mode)
        assert asked(built.pid, 3, tty.is_locked)
        assert not asked(built.pid, 3, tty.is_exclusive)
        assert asked(built.pid, 4, tty.is_exclusive)
        assert asked(built.pid, 5, tty.is_exclusive)
        assert not asked(built.pid, 5, tty.is_in_packet_mode)
        assert not asked(built.pid, 5, tty.is_locked)
        built.write(4, b"x")
        assert built.read(3, 10) == b"\0x"


def test_owner_and_mode_of_the_name_come_back():
    def prepare():
        name = f"/dev/pts/{tty.get_number(open_master())}"
        os.chown(name, 1234, 77)
        os.chmod(name, 0o622)

    with brought_back(prepare) as (record, _):
        status = os.stat(f"/dev/pts/{record.descriptions[1].record.number}")
        assert (status.st_uid, status.st_gid) == (1234, 77)
        assert stat.S_IMODE(status.st_mode) == 0o622


def test_a_slave_that_was_closed_is_told_by_its_master():
    def prepare():
        os.close(open_slave(open_master()))
        open_master(_NUMBER + 1)

    with brought_back(prepare) as (_, built):
        with pytest.raises(OSError, match="Input/output"):
            built.read(3, 1)
        assert events(built.pid, 3) & select.POLLHUP
        assert not events(built.pid, 4) & select.POLLHUP


def test_a_slave_whose_master_is_gone_is_hung_up():
    def prepare():
        master = open_master()
        open_slave(master)
        os.dup2(tty.open_peer(master, os.O_RDWR), 20)
        os.close(master)

    with opened_by(prepare) as pid:
        record, before = capture(pid), views(pid, 4, 20)
        assert link(pid, 4).endswith("(deleted)")
    with rebuilt(record, pid) as built:
        assert views(built.pid, 4, 20) == before
        assert built.read(4, 1) == b""
        with pytest.raises(OSError, match="Input/output"):
            built.write(20, b"x")


def test_a_hung_up_slave_comes_back_even_if_its_number_is_taken():
    def prepare():
        master = open_master()
        open_slave(master)
        os.close(master)

    with opened_by(prepare) as pid:
        record = capture(pid)
    other = open_master()
    try:
        with rebuilt(record, pid) as built:
            assert built.read(4, 1) == b""
    finally:
        os.close(other)


def test_what_was_opened_as_dev_tty_is_that_terminal_again():
    def prepare():
        os.setsid()
        slave = open_slave(open_master())
        fcntl.ioctl(slave, tty.TIOCSCTTY, 0)
        os.open("/dev/tty", os.O_RDWR | os.O_NONBLOCK)

    with opened_by(prepare) as pid:
        record, before = capture(pid), views(pid, 3, 4, 5)
    assert before[2][0] == "/dev/tty"
    with rebuilt(record, pid) as built:
        assert views(built.pid, 3, 4, 5) == before
        built.write(5, b"x")
        assert built.read(3, 10) == b"x"


def test_a_number_that_is_taken_is_named_before_and_fails_the_restore():
    with opened_by(open_master) as pid:
        record = capture(pid)
    other = open_master()
    try:
        number = record.descriptions[1].record.number
        (finding,) = FILES.check_files(record, RestoreOptions())
        assert f"/dev/pts/{number}, which is another terminal now" in str(finding)
        with (
            contextlib.ExitStack() as stack,
            pytest.raises(RestoreFailed, match="another terminal"),
        ):
            FILES.prepare(record, Opening(RestoreOptions(), stack))
    finally:
        os.close(other)


def problems(pid):
    return [finding.split("): ")[1] for finding in look(pid)]


def read_all(fd):
    """Read by a description of ours what waits, one read after the other."""
    parts = []
    while tty.poll_now(fd) & select.POLLIN:
        parts.append(os.read(fd, 200_000))
    return parts


def taken(pid):
    """Read all that waits on the slave (4) and on the master (3) of a process."""
    return asked(pid, 4, read_all), asked(pid, 3, read_all)


def write_unread(master, slave, typed, shown):
    os.write(master, typed)
    assert tty.poll_now(slave) is not None  # waits until that is in the queue
    assert tty.get_settings(slave)[12] & 8 == 0, "an echo would be shown, too"
    os.write(slave, shown)


def without_echo(slave):
    settings = termios.tcgetattr(slave)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, settings)


CASES = {
    "raw": (make_raw, b"ab\x00\x03\x13\xff\r\n", b"shown\n\t\x00\xff", [b"ab\x00\x03\x13\xff\r\n"]),
    "raw, less than a read wants": (make_raw, b"ab", b"", [b"ab"]),
    "lines": (without_echo, b"one\rtwo\x04\x04three\n", b"x", [b"one\n", b"two", b"", b"three\n"]),
    "much": (make_raw, b"y" * 4000, b"z" * 8000, [b"y" * 4000]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packets", [False, True])
def test_what_nobody_has_read_waits_again_and_still(case, packets):
    change, typed, shown, reads = CASES[case]

    def prepare():
        master = open_master()
        slave = open_slave(master)
        change(slave)
        write_unread(master, slave, typed, shown)
        if packets:
            tty.set_packet_mode(master)

    def wait_in(pid):
        if case == "raw, less than a read wants":
            with borrowed(pid, 4) as slave:
                assert tty.count_readable(slave) == len(typed)
            return
        got, got_shown = taken(pid)
        assert got == reads
        assert b"".join(one[packets:] for one in got_shown).replace(b"\r", b"") == shown

    with opened_by(prepare) as pid:
        before = asked(pid, 4, tty.get_settings)
        record = capture(pid)
        assert asked(pid, 4, tty.get_settings) == before
        wait_in(pid)
    with rebuilt(record, pid) as built:
        assert asked(built.pid, 4, tty.get_settings) == before
        wait_in(built.pid)


def test_a_line_that_is_being_typed_behind_others_can_be_edited_further():
    def prepare():
        master = open_master()
        without_echo(open_slave(master))
        os.write(master, b"one\ntwx")

    with opened_by(prepare) as pid:
        record = capture(pid)
        with borrowed(pid, 3) as master:
            os.write(master, b"\x7fo\n")
        assert taken(pid) == ([b"one\n", b"two\n"], [])
    with rebuilt(record, pid) as built:
        built.write(3, b"\x7fo\n")
        assert taken(built.pid) == ([b"one\n", b"two\n"], [])


def test_output_that_was_stopped_is_refused():
    def prepare():
        os.write(open_master(), b"\x13")
        open_slave(3)

    with opened_by(prepare) as pid:
        (found,) = problems(pid)
    assert "output was stopped" in found


def test_an_unread_change_in_packet_mode_is_refused():
    def prepare():
        master = open_master()
        slave = open_slave(master)
        tty.set_packet_mode(master)
        make_raw(slave)

    with opened_by(prepare) as pid:
        (found,) = problems(pid)
    assert "change of state in packet mode" in found


def test_another_line_discipline_is_refused():
    n_null = 27

    def prepare():
        fcntl.ioctl(open_slave(open_master()), termios.TIOCSETD, struct.pack("i", n_null))

    with opened_by(prepare) as pid:
        (found,) = problems(pid)
    assert "line discipline" in found


def test_a_slave_that_was_hung_up_alone_is_refused():
    def prepare():
        master = open_master()
        fcntl.ioctl(open_slave(master), TIOCVHANGUP)

    with opened_by(prepare) as pid:
        (found,) = problems(pid)
    assert "hung up while its master goes on" in found


def test_a_pair_that_another_process_has_open_is_refused():
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    try:
        with opened_by(fds={3: slave, 4: master}) as pid:
            found = problems(pid)
        with opened_by(fds={3: slave}) as pid:
            found += problems(pid)
    finally:
        os.close(master)
        os.close(slave)
    elsewhere = f"is a pseudo-terminal that process {os.getpid()}, outside the tree, has open too"
    assert found == [
        elsewhere,
        elsewhere,
        "is a terminal whose other end is in no process of the tree"
        f" (dump it with --external '{name}', and restore it with --inherit '{name}=FD')",
    ]
