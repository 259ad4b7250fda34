"""A tree moves from one host to the other while it runs, with its connections, and back."""

import os
import sys

import pytest

from integration.migrate.cutting import EVERY
from integration.migrate.moving import Receiving, live
from integration.migrate.services import writer
from integration.migrate.test_offline import CHECKS


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_service_moves_there_and_back(name, hosts, tmp_path):
    check, options = CHECKS[name]
    figures = check(hosts, live(hosts, tmp_path), tmp_path, **options, moves=2)
    print(name, figures)
    assert hosts.a.tables() == hosts.b.tables() == []


@pytest.mark.slow
@pytest.mark.parametrize("n_times", [10] if EVERY else [2])
def test_a_writer_goes_there_and_back_again_and_again(n_times, hosts, tmp_path):
    move = live(hosts, tmp_path)
    writer.check(hosts, move, tmp_path, rate=10_000, mib=16, moves=2 * n_times)
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


PEERS = """
import os, socket, struct
os.setgroups([5, 6])
os.setegid(8)
os.seteuid(7)
pair = socket.socketpair()
server = socket.socket(socket.AF_UNIX)
server.bind("\\0peers")
server.listen()
waits, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
client.connect("\\0peers")
taken, _ = server.accept()
waits.connect("\\0peers")
os.seteuid(0)
os.setegid(0)
os.setgroups([])
print("ready", flush=True)
while input():
    found = [os.getresuid(), os.getresgid(), os.getgroups()]
    for one in (*pair, client, taken, waits):
        found.append(struct.unpack("iII", one.getsockopt(socket.SOL_SOCKET, 17, 12)))
        found.append(one.getsockopt(socket.SOL_SOCKET, 59, 100).hex())
    print(found, flush=True)
"""


def test_what_the_root_made_itself_says_so_there(hosts, tmp_path):
    work = hosts.a.start([sys.executable, "-c", PEERS])
    assert work.line() == "ready"
    before = work.ask("who?")
    assert f"({work.pid}, 7, 8)" in before
    work = live(hosts, tmp_path)(work)
    assert work.ask("who?") == before
    work.close()


HOLDING = {
    "flock": ("fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)", ""),
    "exclusive flock": ("fcntl.flock(file, fcntl.LOCK_EX)", "had a lock on it that is held"),
    "POSIX": ("fcntl.lockf(file, fcntl.LOCK_EX, 5, 3)", "had a lock on it that is held"),
    "OFD": (
        "fcntl.fcntl(file, 37, struct.pack('hhqqi', fcntl.F_WRLCK, 0, 3, 4, 0))",
        "had a lock on it that is held",
    ),
    "lease": ("fcntl.fcntl(os.open('file', 0), 1024, fcntl.F_RDLCK)", "had a lease on it"),
    "fifo": ("os.mkfifo('fifo'); fifo = os.open('fifo', os.O_RDWR)", "on this very kernel"),
}
HOLD = """
import fcntl, os, struct
open("file", "w").write("content")
file = open("file", "r{}")
{}
print("ready", flush=True)
while word := input():
    print(word, flush=True)
"""


@pytest.mark.parametrize("what", HOLDING)
def test_what_the_original_holds_until_its_end_is_named(what, hosts, tmp_path):
    """Where both hosts have one file system, or one kernel."""
    hold, refusal = HOLDING[what]
    program = HOLD.format("" if what == "lease" else "+", hold)
    work = hosts.a.start([sys.executable, "-c", program], cwd=tmp_path)
    assert work.line() == "ready"
    if not refusal:
        work = live(hosts, tmp_path)(work)
    else:
        with Receiving(hosts.b, tmp_path / "token") as there:
            words = ["migrate", "--pid", str(work.pid), "--to", there.listens]
            refused = hosts.a.ckpt(*words, "--token-file", tmp_path / "token")
            assert refused.returncode == 55
            assert refusal in refused.stderr
            there.wait()
    assert work.ask("still here") == "still here"
    work.close()
