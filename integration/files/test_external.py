"""Standard streams that lead out of the process, and what a restore puts in their place."""

import contextlib
import ctypes
import fcntl
import os
import pty
import socket
import termios

import pytest

from ckpt.resources.base import RestoreOptions
from ckpt.resources.files.table import FILES
from integration.files.processes import brought_back, capture, look, opened_by, rebuilt


@contextlib.contextmanager
def pipes(n):
    """Lend (read end, write end) pairs."""
    ends = [os.pipe() for _ in range(n)]
    try:
        yield ends
    finally:
        for fd in (fd for pair in ends for fd in pair):
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def our_streams(fds):
    """Make descriptors our own 0, 1, 2 (None: closed) for the length of the block."""
    saved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 500) for fd in (0, 1, 2)]
    try:
        for fd, here in enumerate(fds):
            if here is None:
                os.close(fd)
            else:
                os.dup2(here, fd)
        yield
    finally:
        for fd, here in enumerate(saved):
            os.dup2(here, fd)
            os.close(here)


@contextlib.contextmanager
def terminal():
    """Lend the two ends of a pseudo-terminal."""
    master, slave = pty.openpty()
    settings = termios.tcgetattr(slave)
    settings[1] &= ~termios.OPOST
    settings[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    try:
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


def test_pipes_become_the_pipes_of_the_restorer():
    def prepare():
        os.dup2(1, 40)

    with pipes(6) as ends:
        old = {0: ends[0][0], 1: ends[1][1], 2: ends[2][1]}
        new = (ends[3][0], ends[4][1], ends[5][1])
        with opened_by(prepare, fds=old) as pid:
            record = capture(pid)
        with our_streams(new), rebuilt(record, pid) as built:
            os.write(ends[3][1], b"in")
            assert built.read(0, 10) == b"in"
            for fd, text in ((1, b"out "), (2, b"err"), (40, b"duplicate")):
                built.write(fd, text)
        assert os.read(ends[4][0], 100) == b"out duplicate"
        assert os.read(ends[5][0], 100) == b"err"
        assert len(built.warnings) == 3
        assert built.warnings[1].startswith("fd 1 was pipe:[")
        assert "is standard output of this command now" in built.warnings[1]


def test_a_terminal_for_all_three_becomes_each_ones_own():
    def prepare():
        os.dup2(2, 255)

    with terminal() as (_, slave), pipes(3) as ends:
        with opened_by(prepare, fds={0: slave, 1: slave, 2: slave}) as pid:
            record = capture(pid)
        assert len(record.descriptions) == 1
        with our_streams((ends[0][0], ends[1][1], ends[2][1])), rebuilt(record, pid) as built:
            os.write(ends[0][1], b"typed")
            assert built.read(0, 10) == b"typed"
            built.write(1, b"out")
            built.write(2, b"err")
            built.write(255, b" too")
        assert os.read(ends[1][0], 100) == b"out too"
        assert os.read(ends[2][0], 100) == b"err"


def test_a_terminal_that_was_opened_again_goes_with_the_stream():
    def prepare():
        os.open("/proc/self/fd/1", os.O_WRONLY)

    with terminal() as (master, slave):
        with opened_by(prepare, fds={0: slave, 1: slave, 2: slave}) as pid:
            record = capture(pid)
        with our_streams((slave, slave, slave)), rebuilt(record, pid) as built:
            built.write(3, b"hello")
            assert os.read(master, 100) == b"hello"


def test_a_socket_as_standard_stream():
    ours, theirs = socket.socketpair()
    with ours, theirs, pipes(1) as [(reader, writer)]:
        with opened_by(fds={2: theirs.fileno()}) as pid:
            record = capture(pid)
        with our_streams((0, 1, writer)), rebuilt(record, pid) as built:
            built.write(2, b"to the journal")
        assert os.read(reader, 100) == b"to the journal"


def test_a_dead_pipe_as_standard_input_is_restored_as_it_was():
    def prepare():
        os.write(1, b"left over")
        os.dup2(2, 1)

    with pipes(1) as [(reader, writer)]:
        with opened_by(prepare, fds={0: reader, 1: writer}) as pid:
            os.close(writer)
            record = capture(pid)
        with rebuilt(record, pid) as built:
            assert built.read(0, 100) == b"left over"
            assert built.read(0, 100) == b""
            assert built.warnings == []


@pytest.mark.parametrize("blocking", [False, True])
def test_non_blocking_mode_is_kept_and_not_forced_upon_our_caller(blocking):
    with pipes(2) as ((old, _), (new, writer)):
        os.set_blocking(old, blocking)
        os.set_blocking(new, not blocking)
        with opened_by(fds={0: old}) as pid:
            record = capture(pid)
        with our_streams((new, 1, 2)), rebuilt(record, pid) as built:
            assert built.capture().descriptions[0].flags & os.O_NONBLOCK == (
                0 if blocking else os.O_NONBLOCK
            )
            os.write(writer, b"x")
            assert built.read(0, 10) == b"x"
            assert os.get_blocking(new) is not blocking


def test_inherit_puts_a_file_there(tmp_path):
    out, text = tmp_path / "out", tmp_path / "text"
    out.write_text("so far\n")
    text.write_text("typed before")
    with terminal() as (_, slave):
        chosen = {0: str(text), 1: str(out), 2: str(tmp_path / "new")}
        prepare_duplicate = {0: slave, 1: slave, 2: slave, 30: slave}
        with brought_back(fds=prepare_duplicate, inherit=chosen) as (_, built):
            assert built.read(0, 100) == b"typed before"
            built.write(1, b"and on\n")
            built.write(30, b"end\n")
            built.write(2, b"error")
            assert built.warnings == []
    assert out.read_text() == "so far\nand on\nend\n"
    assert (tmp_path / "new").read_text() == "error"


def test_inherit_replaces_any_descriptor_with_its_duplicates(tmp_path):
    log, other = tmp_path / "log", tmp_path / "other"
    log.touch()

    def prepare():
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 9)

    with brought_back(prepare, meanwhile=log.unlink, inherit={9: str(other)}) as (_, built):
        built.write(3, b"three ")
        built.write(9, b"nine")
    assert other.read_text() == "three nine"


def test_an_epoll_of_a_stream_that_cannot_be_watched_any_more(tmp_path):
    import select

    from integration.files.test_epoll import add, new_epoll

    text = tmp_path / "text"
    text.touch()
    with (
        pipes(1) as [(reader, _)],
        brought_back(
            lambda: add(new_epoll(50), 0, select.EPOLLIN, 0),
            fds={0: reader},
            inherit={0: str(text)},
        ) as (_, built),
    ):
        assert built.warnings == [
            "fd 0 cannot be watched by epoll any more: it is a regular file now"
        ]


def test_a_closed_stream_of_ours_is_named():
    with pipes(1) as [(reader, _)], opened_by(fds={0: reader}) as pid:
        record = capture(pid)
    with our_streams((None, 1, 2)):
        found = [str(finding) for finding in FILES.check_files(record, RestoreOptions())]
        chosen = RestoreOptions(inherit={0: "/dev/null"})
        assert list(FILES.check_files(record, chosen)) == []
    assert len(found) == 1
    assert "standard input of this command is closed (open standard input, or --inherit" in found[0]


def test_what_is_no_standard_stream_is_refused():
    ours, theirs = socket.socketpair()
    with ours, theirs, terminal() as (master, slave):
        fds = {3: slave, 4: master, 5: theirs.fileno()}
        with opened_by(fds=fds) as pid:
            found = look(pid)
            name = os.readlink(f"/proc/{pid}/fd/5")
    assert [line.split("): ")[1] for line in found] == [
        f"is a pseudo-terminal that process {os.getpid()}, outside the tree, has open too",
        f"is a pseudo-terminal that process {os.getpid()}, outside the tree, has open too",
        f"is a unix socket connected to process {os.getpid()}, which is outside the tree"
        f" (dump it with --external '{name}', and restore it with --inherit '{name}=FD')",
    ]


_NR_USERFAULTFD = 323


def test_what_has_no_likeness_is_refused_even_as_a_standard_stream():
    import signal

    def prepare():
        os.dup2(ctypes.CDLL(None).syscall(_NR_USERFAULTFD, os.O_CLOEXEC), 0)
        os.dup2(os.pidfd_open(os.getppid()), 1)
        signal.set_wakeup_fd(-1)

    with opened_by(prepare) as pid:
        found = look(pid)
    assert [line.split("): ")[-1] for line in found if line.startswith(("fd 0", "fd 1"))] == [
        "is a userfaultfd: the process handles page faults itself, which is not supported"
        " (end what uses it before the dump)",
        f"is a pidfd of process {os.getpid()}, which does not belong to what is dumped"
        " (dump a process that both descend from)",
    ]
