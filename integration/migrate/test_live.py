"""A tree moves from one host to the other while it runs, with its connections, and back."""

import os
import sys

import pytest

from integration.migrate.hosts import two_hosts
from integration.migrate.moving import Receiving, live
from integration.migrate.test_offline import CHECKS


@pytest.fixture
def hosts():
    with two_hosts() as made:
        yield made


PID_IN_USE = {"unix sockets"}
"""Only a process with the root's number can make what it made, and the embryo has that already."""


@pytest.mark.parametrize("name", sorted(CHECKS.keys() - PID_IN_USE))
def test_a_service_moves_there_and_back(name, hosts, tmp_path):
    check, options = CHECKS[name]
    figures = check(hosts, live(hosts, tmp_path), tmp_path, **options, moves=2)
    print(name, figures)
    assert hosts.a.tables() == hosts.b.tables() == []


LISTEN = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind("name")
server.listen()
print("listens", flush=True)
while True:
    taken, _ = server.accept()
    taken.sendall(taken.recv(100))
    taken.close()
"""
CALL = """
import socket
sock = socket.socket(socket.AF_UNIX)
sock.connect("name")
sock.sendall(b"hello")
assert sock.recv(100) == b"hello"
"""
FAILURES = {"there": ([], ["--on-arrival", "exit 3"]), "here": (["--on-departure", "exit 3"], [])}


@pytest.mark.parametrize("where", FAILURES)
def test_names_of_sockets_stay_where_they_were_if_the_hand_over_fails(where, hosts, tmp_path):
    at_source, at_destination = FAILURES[where]
    work = hosts.a.start([sys.executable, "-c", LISTEN], cwd=tmp_path)
    assert work.line() == "listens"
    before = (tmp_path / "name").stat()
    token = str(tmp_path / "token")
    with Receiving(hosts.b, tmp_path / "token", *at_destination) as there:
        words = ["migrate", "--pid", str(work.pid), "--to", there.listens, "--token-file", token]
        failed = hosts.a.ckpt(*words, "--max-downtime", "60000", *at_source)
        assert failed.returncode != 0
        assert "exit status 3" in failed.stderr
        there.wait()
    assert (tmp_path / "name").stat() == before
    assert sorted(os.listdir(tmp_path)) == ["name", "token"]
    hosts.a.must([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{CALL}"])
    # And it can go after all; then others find it there by its name.
    work = live(hosts, tmp_path)(work)
    hosts.b.must([sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{CALL}"])
    assert sorted(os.listdir(tmp_path)) == ["name", "token"]
    work.close()
