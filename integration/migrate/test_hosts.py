"""The hosts are two: own pids, own network, own firewall, one wire; and nothing of them is left."""

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from integration.migrate.hosts import SERVICE, move_address, two_hosts
from integration.workloads.driver import ANSWER_S

ECHO = """
import socket
server = socket.create_server(("", 5000))
print("listens", flush=True)
taken, _ = server.accept()
while word := taken.recv(100):
    taken.sendall(word)
"""
DEAF = """
table inet deaf {
    chain in {
        type filter hook input priority 0
        tcp dport 5000 drop
    }
}
"""
FEATURES = """
from ckpt.kernel.features import probe_features
found = probe_features()
print(found.set_tid, found.uffd_wp_async, "sys_admin" in found.capabilities)
"""


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as made:
        yield made


def can_reach(here, address):
    """Tell whether a connection comes about, to a port that nobody listens at."""
    with here.network(), socket.socket() as sock:
        sock.settimeout(ANSWER_S)
        return sock.connect_ex((address, 9)) == 111


def test_all_reach_all(hosts):
    for here in hosts:
        for there in hosts:
            assert can_reach(here, there.address)


def test_each_has_its_own_pids_network_and_names(hosts):
    with hosts.a.start(["cat"]) as cat:
        assert hosts.a.pids() == {cat.pid}
        assert hosts.b.pids() == set()
        assert os.path.exists(f"/proc/{cat.outer_pid}")
    for kind in ("net", "pid", "mnt", "ipc", "uts"):
        links = {
            os.readlink(f"/proc/{pid}/ns/{kind}") for pid in ("self", *(h.init for h in hosts))
        }
        assert len(links) == 4, kind
    assert hosts.b.must(["hostname"]).strip() == "b"


def test_each_has_a_state_directory_of_its_own(hosts):
    hosts.a.must(["touch", "/run/ckpt/here"])
    assert hosts.b.must(["ls", "/run/ckpt"]) == ""
    assert not Path("/run/ckpt/here").exists()
    hosts.a.must(["rm", "/run/ckpt/here"])


def test_each_has_a_firewall_of_its_own(hosts):
    hosts.a.must(["nft", "add", "table", "inet", "ckpt_of_a"])
    assert hosts.a.tables() == ["table inet ckpt_of_a"]
    assert hosts.b.tables() == []
    hosts.a.must(["nft", "delete", "table", "inet", "ckpt_of_a"])


def test_all_that_ckpt_needs_works_inside(hosts):
    found = hosts.a.must([sys.executable, "-c", FEATURES]).split()
    here = subprocess.run(
        [sys.executable, "-c", FEATURES], capture_output=True, text=True, check=True
    )
    assert found == here.stdout.split()
    assert found[0] == "True"


def test_an_address_moves_and_whoever_is_connected_only_waits(hosts):
    """To `b`, where nobody must answer, and back: what was sent meanwhile arrives."""
    with hosts.a.start([sys.executable, "-c", ECHO]) as echo:
        assert echo.line() == "listens"
        with hosts.client.network():
            sock = socket.create_connection((SERVICE, 5000), ANSWER_S)
        with sock:
            sock.sendall(b"before")
            assert sock.recv(100) == b"before"
            hosts.b.must(["nft", DEAF])
            move_address(hosts.a, hosts.b)
            assert (hosts.a.has(SERVICE), hosts.b.has(SERVICE)) == (False, True)
            sock.sendall(b"meanwhile")
            assert can_reach(hosts.client, SERVICE), "nobody has taken the address"
            move_address(hosts.b, hosts.a)
            assert sock.recv(100) == b"meanwhile"
    hosts.b.must(["nft", "delete", "table", "inet", "deaf"])


def test_a_link_is_as_wide_as_it_was_made(hosts):
    hosts.shape("1gbit")
    for pid, interface in ((hosts.a.init, "eth0"), (hosts.switch, "port-b")):
        shown = ["nsenter", "-t", str(pid), "-n", "tc", "qdisc", "show", "dev", interface]
        assert "tbf" in (said := subprocess.check_output(shown, text=True))
        assert "1Gbit" in said
    hosts.shape("")
    assert "tbf" not in hosts.a.must(["tc", "qdisc", "show", "dev", "eth0"])


HOLDING = """
import signal
from integration.migrate.hosts import two_hosts
with two_hosts() as hosts:
    cat = hosts.a.start(["cat"])
    print(hosts.a.init, hosts.b.init, hosts.switch, cat.outer_pid, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_however_the_test_ends(number):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING], stdout=subprocess.PIPE, text=True
    ) as test:
        assert test.stdout is not None
        pids = [int(pid) for pid in test.stdout.readline().split()]
        ends = [os.pidfd_open(pid) for pid in pids]
        test.send_signal(number)
    for end in ends:
        ready, _, _ = select.select([end], [], [], ANSWER_S)
        assert ready, "a process of a host is left"
        os.close(end)
