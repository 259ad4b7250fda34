"""A tree is stopped on one host and brought back on the other, with its connections, and back.

Each service is first killed and brought back in its place: what fails there is no matter of hosts.
"""

import re
import socket
import sys

import pytest

from integration.harness import CKPT
from integration.migrate.hosts import SERVICE, leave_address, take_address
from integration.migrate.moving import dump, offline, restore, within
from integration.migrate.services import nginx, postgres, redis, tree, writer
from integration.workloads.driver import ANSWER_S

PORT = 5000
ECHO = f"""
import socket
server = socket.create_server(("", {PORT}))
print("listens", flush=True)
taken, _ = server.accept()
while word := taken.recv(100):
    taken.sendall(word)
print("ended", flush=True)
"""
CHECKS = {
    "writer, 1,000 a second": (writer.check, {"rate": 1000}),
    "writer, 10,000 a second": (writer.check, {"rate": 10_000}),
    "writer, 100,000 a second": (writer.check, {"rate": 100_000}),
    "redis": (redis.check, {"mib": 64}),
    "nginx": (nginx.check, {}),
    "postgres": (postgres.check, {}),
    "unix sockets": (tree.check, {}),
    "shell": (tree.check_shell, {}),
}
SLOW = ("redis", "postgres", "writer, 1,000 a second")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CHECKS]


@pytest.fixture
def echo(hosts):
    """A server on `a`, and a client's connection to it."""
    work = hosts.a.start([sys.executable, "-c", ECHO])
    assert work.line() == "listens"
    with hosts.client.network():
        sock = socket.create_connection((SERVICE, PORT), ANSWER_S)
    with sock:
        say(sock, b"before")
        yield work, sock


def say(sock, word):
    sock.sendall(word)
    assert hear(sock, len(word)) == word


def hear(sock, n_bytes):
    held = b""
    while len(held) < n_bytes:
        part = sock.recv(n_bytes - len(held))
        assert part, "the connection has ended"
        held += part
    return held


@pytest.mark.parametrize("name", NAMES)
def test_a_service_comes_back_in_its_place(name, hosts, tmp_path):
    check, options = CHECKS[name]
    check(hosts, within(tmp_path / "image"), tmp_path, **options, moves=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_service_moves_there_and_back(name, hosts, tmp_path):
    check, options = CHECKS[name]
    figures = check(hosts, offline(hosts, tmp_path / "image"), tmp_path, **options, moves=2)
    print(name, figures)
    assert hosts.a.tables() == hosts.b.tables() == []


@pytest.mark.slow
def test_a_connection_goes_there_and_back_ten_times(echo, hosts, tmp_path):
    work, sock = echo
    move = offline(hosts, tmp_path / "image")
    for nth in range(20):
        sock.sendall(b"%10d" % nth)
        work = move(work)
        assert hear(sock, 10) == b"%10d" % nth
    assert work.host is hosts.a
    sock.close()
    assert work.line() == "ended"
    assert work.wait() == 0
    work.close()


def received(host):
    """Return how many IP packets have reached a host."""
    snmp = host.must(["cat", "/proc/net/snmp"])
    names, values = re.findall(r"^Ip: (.*)$", snmp, re.MULTILINE)
    return int(dict(zip(names.split(), values.split(), strict=True))["InReceives"])


def test_a_packet_that_comes_before_the_sockets_is_not_answered(echo, hosts, tmp_path):
    """Else the peer would hear a reset."""
    work, sock = echo
    image, gate = tmp_path / "image", tmp_path / "gate"
    hosts.b.must(["mkfifo", gate])
    dump(work, image, "--on-departure", " ".join(leave_address()))
    assert hosts.a.tables() == []
    hook = " ".join([*take_address(), f"; echo taken >{gate}; read word <{gate}"])
    restoring = hosts.b.start([*CKPT, "restore", "--json", "--on-arrival", hook, image])
    with gate.open() as told:
        assert told.readline() == "taken\n"
    before = received(hosts.b)
    sock.sendall(b"early")
    while received(hosts.b) == before:
        pass
    assert len(hosts.b.tables()) == 1
    gate.write_text("on\n")
    assert hear(sock, 5) == b"early"
    restoring.close()


def test_a_command_that_fails_at_departure_harms_nobody(echo, hosts, tmp_path):
    work, sock = echo
    words = ["dump", "--pid", str(work.pid), "--kill", tmp_path / "image"]
    failed = hosts.a.ckpt(*words, "--on-departure", "echo $CKPT_PID; exit 3")
    assert failed.returncode == 14
    assert f"{work.pid}\n" in failed.stderr
    assert (
        "--on-departure failed: it ended with exit status 3; the process goes on here"
        in failed.stderr
    )
    assert hosts.a.tables() == []
    say(sock, b"after")
    # And its checkpoint is none that a delta could be made on by mistake.
    work = offline(hosts, tmp_path / "image")(work)
    say(sock, b"moved")
    work.close()


def test_a_command_that_fails_at_arrival_makes_nobody(echo, hosts, tmp_path):
    work, sock = echo
    image = tmp_path / "image"
    dump(work, image, "--on-departure", " ".join(leave_address()))
    failed = hosts.b.ckpt("restore", "--on-arrival", "kill -9 $$", image)
    assert failed.returncode == 14
    assert "--on-arrival failed: signal 9 ended it; nothing was restored" in failed.stderr
    assert hosts.b.pids() == set()
    assert hosts.b.tables() == []
    back = restore(hosts.a, image, work.pid, "--on-arrival", " ".join(take_address()))
    say(sock, b"after")
    back.close()


def test_who_does_not_leave_has_no_departure(hosts, tmp_path):
    with hosts.a.start(["cat"]) as cat:
        words = ["dump", "--pid", str(cat.pid), "--on-departure", "true", tmp_path / "image"]
        refused = hosts.a.ckpt(*words)
        assert refused.returncode == 2
        assert "--kill" in refused.stderr
        assert cat.ask("still here") == "still here"
