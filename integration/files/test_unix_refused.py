"""Unix sockets that cannot be captured, and descriptors in flight, which sometimes can."""

import contextlib
import os
import socket
from socket import AF_UNIX, SOCK_SEQPACKET, SOCK_STREAM

import pytest

from ckpt.errors import UnsupportedState
from ckpt.resources.base import RestoreOptions
from ckpt.resources.files.table import FILES
from integration.files.processes import (
    FEATURES,
    capture,
    look,
    opened_by,
    rebuilt,
)
from integration.files.unix_sockets import (
    assert_same,
    bound,
    every_kind,
    lent,
    pair,
)


def refusal_of(prepare, fds=None):
    with opened_by(prepare, fds=fds) as pid:
        return " | ".join(look(pid))


@every_kind
def test_an_end_outside_is_refused(kind):
    here, there = pair(kind)
    with here, there:
        found = refusal_of(lambda: None, {7: there.fileno()})
    assert "fd 7 (socket:[" in found
    assert (
        f"is a unix socket connected to process {os.getpid()}, which is outside the tree" in found
    )
    assert "dump it with --external 'socket:[" in found


def test_a_connection_that_nobody_outside_has_accepted_is_refused(tmp_path):
    path = str(tmp_path / "socket")

    def prepare():
        client = socket.socket(AF_UNIX)
        client.connect(path)
        return client

    with bound(SOCK_STREAM, path) as listener:
        listener.listen(3)
        found = refusal_of(prepare)
    assert "is a unix connection that a process outside has not accepted yet" in found


@pytest.mark.parametrize("client_stays", [True, False])
def test_a_client_outside_that_waits_is_refused(client_stays, tmp_path):
    path = str(tmp_path / "socket")

    def prepare():
        listener = bound(SOCK_STREAM, path)
        listener.listen(3)
        return listener

    with opened_by(prepare) as pid, socket.socket(AF_UNIX) as client:
        client.connect(path)
        if not client_stays:
            client.close()
        (found,) = look(pid)
    who = f"process {os.getpid()}, which is outside" if client_stays else "a client that has gone"
    assert f"is a listening unix socket, and 1 connection waits to be accepted, of {who}" in found


def test_data_sent_before_the_connection_is_accepted_is_refused(tmp_path):
    path = str(tmp_path / "socket")

    def prepare():
        listener = bound(SOCK_STREAM, path)
        listener.listen(3)
        client = socket.socket(AF_UNIX)
        client.connect(path)
        client.send(b"too early")
        return listener, client

    found = refusal_of(prepare)
    assert "is a unix connection that was not accepted yet, and has sent data" in found


@every_kind
def test_descriptors_that_only_a_message_has_come_back(kind, tmp_path):
    """A file with its offset, a counter, and a device; at the message that brought them."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")

    def prepare():
        one, other = pair(kind)
        file, counter, null = os.open(path, os.O_RDONLY), os.eventfd(7), os.open("/dev/null", 1)
        os.lseek(file, 4, os.SEEK_SET)
        socket.send_fds(one, [b"with two"], [file, counter])
        socket.send_fds(one, [b"with one"], [null])
        one.send(b"plain")
        for fd in (file, counter, null):
            os.close(fd)
        return one, other

    with opened_by(prepare) as pid:
        record = capture(pid)
        record = capture(pid)
        with lent(pid, 4) as other:
            assert [fds for fds in received(other, kind) if fds]
    with rebuilt(record, pid) as built:
        assert_same(built, record)
        with lent(built.pid, 4) as other:
            (file, counter), (null,), none = received(other, kind)
            assert none == []
            assert os.read(file, 100) == b"456789"
            assert os.eventfd_read(counter) == 7
            assert os.readlink(f"/proc/self/fd/{null}") == "/dev/null"


def received(sock, kind):
    """Return the descriptors of the three messages, each read as long as its sender made it."""
    seen = [socket.recv_fds(sock, n if kind == SOCK_STREAM else 100, 10) for n in (8, 8, 5)]
    assert [data for data, *_ in seen] == [b"with two", b"with one", b"plain"]
    return [fds for _, fds, _, _ in seen]


def test_descriptors_in_a_stream_behind_other_bytes_are_refused():
    """Nobody tells where the bytes end that come without them."""

    def prepare():
        one, other = pair()
        one.send(b"without")
        null = os.open("/dev/null", os.O_RDONLY)
        socket.send_fds(one, [b"with"], [null])
        os.close(null)
        return one, other

    with opened_by(prepare) as pid, pytest.raises(UnsupportedState, match="behind other bytes"):
        capture(pid)


def test_descriptors_in_flight_that_a_process_has_open_too_are_refused():
    def prepare():
        one, other = pair()
        socket.send_fds(one, [b"with"], [0])
        return one, other

    with opened_by(prepare) as pid, pytest.raises(UnsupportedState, match="open too, as fd 0"):
        capture(pid)


def test_descriptors_in_flight_that_belong_to_others_are_refused():
    """A message has no room for what several descriptors have in common, a pipe for one."""

    def prepare():
        one, other = pair()
        reader, writer = os.pipe()
        socket.send_fds(one, [b"take it"], [reader, writer])
        os.close(reader)
        os.close(writer)
        return one, other

    with opened_by(prepare) as pid:
        with pytest.raises(UnsupportedState, match=r"\(SCM_RIGHTS\) that is of a kind"):
            capture(pid)
        with lent(pid, 4) as other:
            assert len(socket.recv_fds(other, 100, 10)[1]) == 2


def test_out_of_band_data_is_refused():
    def prepare():
        one, other = pair()
        one.send(b"x", socket.MSG_OOB)
        return one, other

    assert "is a unix socket with out-of-band data" in refusal_of(prepare)


def test_an_error_that_would_be_lost_is_refused():
    def prepare():
        one, other = pair(SOCK_SEQPACKET)
        other.send(b"unread")
        one.send(b"to be read")
        one.close()
        return other

    assert "with an error that was not told yet, and packets to read" in refusal_of(prepare)


@pytest.mark.parametrize("where", ["path", "abstract", "no folder", "no socket"])
def test_a_name_that_somebody_else_has_now_is_found_before_anything_starts(where, tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    path = str(folder / "socket")
    name = f"\0{os.getpid()} of ckpt" if where == "abstract" else path

    def prepare():
        listener = bound(SOCK_STREAM, name)
        listener.listen(3)
        return listener

    with opened_by(prepare) as pid:
        record = capture(pid)
    if where != "abstract":
        os.unlink(path)
    with contextlib.ExitStack() as stack:
        if where in ("path", "abstract"):
            stack.enter_context(bound(SOCK_STREAM, name))
        elif where == "no folder":
            folder.rmdir()
        else:
            (folder / "socket").write_text("")
        options = RestoreOptions()
        found = [*FILES.check_host(record, FEATURES), *FILES.check_files(record, options)]
    assert len(found) == 1
    assert {
        "path": "where another process listens now",
        "abstract": "cannot have the abstract name",
        "no folder": "is not there",
        "no socket": "which is no socket now",
    }[where] in str(found[0])
