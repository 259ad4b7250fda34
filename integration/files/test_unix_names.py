"""Unix sockets with names: files, backlogs, connections through listeners, datagrams."""

import contextlib
import os
import select
import socket
import stat
from socket import AF_UNIX, SOCK_DGRAM, SOCK_STREAM

import pytest

from ckpt.resources.base import Opening, RestoreOptions, run_all
from ckpt.resources.files.table import FILES
from integration.files.processes import (
    brought_back,
    capture,
    opened_by,
    rebuilt,
)
from integration.files.unix_sockets import (
    assert_same,
    bound,
    connected_kinds,
    every_kind,
    lent,
    peer_of,
    unix_of,
)


@every_kind
@pytest.mark.parametrize("name", ["absolute", "relative", "up", "abstract", "deleted"])
def test_names_come_back_with_their_files(kind, name, tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    path = folder / "socket"
    names = {
        "absolute": str(path),
        "relative": "socket",
        "up": "../place/./socket",
        "abstract": f"\0{os.getpid()} of ckpt\0",
        "deleted": str(path),
    }

    def prepare():
        os.chdir(folder)
        sock = bound(kind, names[name])
        if name == "deleted":
            path.unlink()
        elif name != "abstract":
            path.chmod(0o640)
            os.chown(path, 7, 8)
        if kind != SOCK_DGRAM:
            sock.listen(3)
        return sock

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        files = [] if name in ("abstract", "deleted") else ["socket"]
        assert os.listdir(folder) == files
        assert os.listdir(tmp_path) == ["place"]
        if files:
            status = path.stat()
            assert stat.S_IMODE(status.st_mode) == 0o640
            assert (status.st_uid, status.st_gid) == (7, 8)
        if name != "deleted":
            with lent(built.pid, 3) as sock, socket.socket(AF_UNIX, kind) as client:
                client.connect(names[name] if name == "abstract" else str(path))
                assert_takes(sock, client, kind)


def assert_takes(sock, client, kind):
    client.send(b"hello")
    if kind == SOCK_DGRAM:
        assert sock.recv(100) == b"hello"
        return
    accepted, _ = sock.accept()
    with accepted:
        assert accepted.recv(100) == b"hello"


def test_a_backlog_and_who_waits_in_it(tmp_path):
    """In their order, with the limit; and one more is taken afterwards."""
    path = str(tmp_path / "socket")

    def prepare():
        listener = bound(SOCK_STREAM, path)
        listener.listen(5)
        clients = [socket.socket(AF_UNIX) for _ in range(3)]
        for client in (clients[2], clients[0], clients[1]):
            client.connect(path)
        return listener, clients

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        assert unix_of(record)[0].waiting == (4, 2, 3)
        assert unix_of(record)[0].backlog == 5
        with lent(built.pid, 3, 4, 5, 6) as (listener, *clients):
            for client in (clients[2], clients[0], clients[1]):
                accepted, _ = listener.accept()
                with accepted:
                    assert peer_of(accepted) == (built.pid, 0, 0)
                    assert peer_of(client) == (built.pid, 0, 0)
                    client.send(b"it is me")
                    assert accepted.recv(100) == b"it is me"


@connected_kinds
@pytest.mark.parametrize("where", ["path", "abstract"])
@pytest.mark.parametrize("ends", ["listener", "no listener", "client gone", "server gone"])
def test_connections_through_a_listener(kind, where, ends, tmp_path):
    path = str(tmp_path / "socket") if where == "path" else f"\0{os.getpid()} of ckpt"

    def prepare():
        listener = bound(kind, path)
        listener.listen(5)
        client = socket.socket(AF_UNIX, kind)
        client.connect(path)
        server, _ = listener.accept()
        if ends != "server gone":
            client.send(b"to the server")
        if ends != "client gone":
            server.send(b"to the client")
        if ends == "no listener":
            listener.close()
        if ends == "client gone":
            client.close()
        if ends == "server gone":
            server.close()
        return listener, client, server

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        if "gone" not in ends:
            with lent(built.pid, 4, 5) as (client, server):
                assert client.recv(100) == b"to the client"
                assert server.recv(100) == b"to the server"
                assert client.getpeername() == server.getsockname() != ""
        elif ends == "client gone":
            with lent(built.pid, 5) as server:
                assert server.recv(100) == b"to the server"
                assert server.recv(100) == b""
    assert built.warnings == []


def test_who_listened_and_who_connected_is_told_as_before(tmp_path):
    """SO_PEERCRED and SO_PEERGROUPS name processes that have ended, too."""
    path = str(tmp_path / "socket")

    def as_user(uid, do):
        pid = os.fork()
        if pid == 0:
            os.setgroups([uid + 1, uid + 2])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            do()
            os._exit(0)
        os.waitpid(pid, 0)
        return pid

    def prepare():
        os.chmod(tmp_path, 0o777)
        for folder in list(tmp_path.parents)[:-2]:
            os.chmod(folder, 0o755)
        listener = socket.socket(AF_UNIX)
        listener.bind(path)
        os.chmod(path, 0o777)
        as_user(1000, lambda: listener.listen(5))
        client = socket.socket(AF_UNIX)
        as_user(2000, lambda: client.connect(path))
        server, _ = listener.accept()
        one, other = socket.socketpair()
        return listener, client, server, one, other

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        told = [(one.credentials.uid, one.credentials.groups) for one in unix_of(record)]
        assert told[:3] == [
            (1000, (1001, 1002)),
            (1000, (1001, 1002)),
            (2000, (2001, 2002)),
        ]
        assert told[3][0] == 0
        assert unix_of(record)[3].credentials.pid == built.pid


# ---- datagrams by name


def test_datagrams_know_their_senders_and_peers(tmp_path):
    """A star: two that have called one, which has called nobody; and senders that are gone."""

    def prepare():
        os.chdir(tmp_path)
        hub = bound(SOCK_DGRAM, "hub")
        one, two = bound(SOCK_DGRAM, "one"), socket.socket(AF_UNIX, SOCK_DGRAM)
        one.connect("hub")
        two.connect("hub")
        gone, nameless = bound(SOCK_DGRAM, "gone"), socket.socket(AF_UNIX, SOCK_DGRAM)
        for sock in (one, gone, two, nameless, one):
            sock.sendto(b"hello", "hub") if sock in (gone, nameless) else sock.send(b"hello")
        gone.close()
        os.unlink("gone")
        return hub, one, two

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        assert [m.source for m in unix_of(record)[0].messages] == [
            b"one",
            b"gone",
            b"",
            b"",
            b"one",
        ]
        with lent(built.pid, 3, 5) as (hub, two):
            two.send(b"still there")
            names = [hub.recvfrom(100)[1] for _ in range(5)]
            assert names == ["one", "gone", None, None, "one"]
            assert hub.recv(100) == b"still there"
    assert sorted(os.listdir(tmp_path)) == ["hub", "one"]


def test_datagrams_of_sockets_that_call_each_other(tmp_path):
    """Mutual, in a chain behind it, and one that got something before it called somebody else."""

    def prepare():
        os.chdir(tmp_path)
        a, b, c, d = (bound(SOCK_DGRAM, name) for name in "abcd")
        c.sendto(b"early", "a")
        d.sendto(b"early, too", "a")
        c.connect("a")
        a.connect("b")
        b.connect("a")
        b.send(b"late")
        a.send(b"to b")
        return a, b, c, d

    with brought_back(prepare) as (record, built):
        assert_same(built, record)
        with lent(built.pid, 3, 4, 5) as (a, b, c):
            got = [a.recvfrom(100) for _ in range(3)]
            assert got == [(b"early", "c"), (b"early, too", "d"), (b"late", "b")]
            assert b.recv(100) == b"to b"
            assert c.getpeername() == "a"


def test_a_datagram_socket_calls_again_who_is_outside(tmp_path):
    path = str(tmp_path / "log")

    def prepare():
        sock = socket.socket(AF_UNIX, SOCK_DGRAM)
        sock.connect(path)
        return sock

    log = bound(SOCK_DGRAM, path)
    with log, brought_back(prepare) as (record, built):
        assert_same(built, record)
        with lent(built.pid, 3) as sock:
            sock.send(b"a line")
        assert log.recv(100) == b"a line"


def test_who_was_called_outside_is_gone(tmp_path):
    path = str(tmp_path / "log")

    def prepare():
        sock = socket.socket(AF_UNIX, SOCK_DGRAM)
        sock.connect(path)
        return sock

    with bound(SOCK_DGRAM, path), opened_by(prepare) as pid:
        record = capture(pid)
    with rebuilt(record, pid) as built:
        assert built.warnings == [
            f"a unix socket was connected to {path}, and is not (Connection refused)"
        ]


def of_socket(opened):
    """Return the socket among what was opened; the rest is closed."""
    is_socket = {one.fd: stat.S_ISSOCK(os.fstat(one.fd).st_mode) for one in opened.values()}
    for fd, found in is_socket.items():
        if not found:
            os.close(fd)
    return socket.socket(fileno=next(fd for fd, found in is_socket.items() if found))


def reaches(path, sock):
    """Tell whether who calls a path comes to a socket that listens."""
    with socket.socket(AF_UNIX) as client:
        client.connect(str(path))
        if not select.select([sock], [], [], 0)[0]:
            return False
        sock.accept()[0].close()
        return True


def test_the_original_has_its_name_until_the_end_and_again_after_a_failure(tmp_path):
    """A tree that is moved to a host with the same file system, which fails at the last moment."""
    path = tmp_path / "socket"

    def prepare():
        sock = bound(SOCK_STREAM, str(path))
        sock.listen(5)
        return sock

    with opened_by(prepare) as original:
        record = capture(original)
        found = [str(one) for one in FILES.check_files(record, RestoreOptions())]
        assert len(found) == 1
        assert "where another process listens now" in found[0]
        options = RestoreOptions(original_stands=True)
        assert list(FILES.check_files(record, options)) == []
        with contextlib.ExitStack() as stack:
            opening = Opening(options, stack)
            opened = FILES.prepare(record, opening)
        made = of_socket(opened)
        with made, lent(original, 3) as theirs:
            assert reaches(path, theirs)
            run_all(opening.at_last)
            assert reaches(path, made)
            run_all(opening.at_failure)
            assert reaches(path, theirs)
            run_all(opening.at_end)
        assert os.listdir(tmp_path) == ["socket"]
        # It is one that somebody has touched.
        path.chmod(0o600)
        assert len(list(FILES.check_files(record, options))) == 1


def test_nobody_hears_of_a_name_before_the_end(tmp_path):
    path = tmp_path / "socket"
    with opened_by(lambda: bound(SOCK_STREAM, str(path))) as original:
        record = capture(original)
    path.unlink()
    with contextlib.ExitStack() as stack:
        opening = Opening(RestoreOptions(), stack)
        opened = FILES.prepare(record, opening)
    assert not path.exists()
    run_all(opening.at_last)
    assert path.is_socket()
    run_all([*opening.at_failure, *opening.at_end])
    assert os.listdir(tmp_path) == []
    of_socket(opened).close()
