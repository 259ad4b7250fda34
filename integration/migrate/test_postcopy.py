"""A tree runs at the destination before its memory has come, and never sees anything but that.

Where something is killed or cut, the link is slow, and the tree has answered from over there: so
most of its memory is still to come.
"""

import contextlib
import signal

import pytest

from integration.harness import CKPT
from integration.migrate.hosts import last_json
from integration.migrate.moving import Receiving, live
from integration.migrate.services import redis, writer
from integration.workloads.build import build

SLOW, LASTING = "20MB", "1MB"
"""Bytes a second: memory comes for some seconds, or for as long as a test can take."""
TREE_LOST = 57


def test_a_writer_finds_every_byte_while_they_come(hosts, tmp_path):
    writer.check(hosts, live(hosts, tmp_path, "--lazy"), tmp_path, rate=10_000, moves=2)


@pytest.mark.slow
def test_redis_keeps_its_connections_and_its_data(hosts, tmp_path):
    figures = redis.check(hosts, live(hosts, tmp_path, "--lazy"), tmp_path, mib=64, moves=2)
    assert figures["verified"]["lost"] == 0
    assert hosts.a.tables() == hosts.b.tables() == []


class Underway:
    """A program that runs on `b` already, while its memory comes at some rate."""

    def __init__(self, hosts, folder, rate):
        self.hosts = hosts
        self.work = hosts.a.start([build("heartbeat"), "--mib", "64"], cwd=folder)
        assert self.work.line() == "ready"
        self.there = Receiving(hosts.b, folder / "token")
        words = ["migrate", "--pid", str(self.work.pid), "--to", self.there.listens, "--json"]
        words += ["--token-file", str(folder / "token"), "--lazy", "--compress", "off"]
        self.migrating = hosts.a.start([*CKPT, *words, "--bandwidth", rate])
        # It hears this only when it runs there.
        assert self.there.ask("gap").startswith("gap")

    def find(self, name):
        """Return a process on `b` by its name."""
        words = ["sh", "-c", f"grep -lx {name} /proc/[0-9]*/comm | cut -d/ -f3"]
        (pid,) = self.hosts.b.must(words).split()
        return int(pid)

    def assert_lost(self):
        """Nothing of it runs anywhere, and nothing of ours is left."""
        self.work.wait()
        self.there.wait()
        self.migrating.wait()
        for host in (self.hosts.a, self.hosts.b):
            wait_until_empty(host)

    def close(self):
        for one in (self.migrating, self.there, self.work):
            one.close()


@pytest.fixture
def underway(hosts, tmp_path):
    with contextlib.ExitStack() as stack:

        def begin(rate):
            made = Underway(hosts, tmp_path, rate)
            stack.callback(made.close)
            return made

        yield begin


def wait_until_empty(host):
    """Wait for the end of all that runs on a host."""
    for pid in sorted(host.pids()):
        host.run(["tail", f"--pid={pid}", "-s", "0.05", "-f", "/dev/null"])
    assert host.pids() == set()


def test_after_a_cut_it_comes_over_new_connections(underway, hosts):
    moved = underway(SLOW)
    for host in (hosts.b, hosts.a):
        cut = host.must(["ss", "-K", "-t", "-n", "-H", "state", "established"])
        assert hosts.b.address in cut, "there was nothing to cut"
        assert moved.there.ask("touch 5 100").startswith("touched"), "no page comes any more"
    moved.there.tell("check")
    assert last_json(moved.migrating.line())["fetched_bytes"] > 60 << 20
    assert moved.migrating.wait() == 0
    moved.there.arrive(moved.work.pid)
    assert moved.there.line() == "ok"
    moved.there.tell("quit")
    assert moved.there.wait() == 0
    moved.work.wait()


def test_a_killed_source_takes_the_tree_with_it(underway):
    moved = underway(LASTING)
    moved.migrating.kill(signal.SIGKILL)
    moved.assert_lost()
    assert moved.there.wait() == TREE_LOST


@pytest.mark.parametrize("name", ["ckpt-pages", "ckpt-guard"])
def test_what_serves_pages_is_killed(underway, hosts, name):
    """The server's end is the tree's; of a guard's end nobody takes notice."""
    moved = underway(LASTING if name == "ckpt-pages" else SLOW)
    hosts.b.must(["kill", "-9", str(moved.find(name))])
    if name == "ckpt-pages":
        moved.assert_lost()
        assert moved.migrating.wait() == moved.there.wait() == TREE_LOST
        return
    moved.there.tell("check")
    assert moved.migrating.wait() == 0
    moved.there.arrive(moved.work.pid)
    assert moved.there.line() == "ok"


def test_a_killed_receiver_takes_the_tree_with_it(underway, hosts):
    moved = underway(LASTING)
    status = hosts.b.must(["cat", f"/proc/{moved.find('ckpt-guard')}/status"])
    (worker,) = (line.split()[1] for line in status.splitlines() if line.startswith("PPid"))
    hosts.b.must(["kill", "-9", worker])
    moved.assert_lost()
    assert moved.migrating.wait() == TREE_LOST


def test_it_is_not_kept_as_an_image(hosts, tmp_path):
    work = hosts.a.start([build("heartbeat"), "--mib", "8"], cwd=tmp_path)
    assert work.line() == "ready"
    there = Receiving(hosts.b, tmp_path / "token", "--image-dir", tmp_path / "image")
    words = ["--pid", str(work.pid), "--to", there.listens, "--token-file", tmp_path / "token"]
    refused = hosts.a.ckpt("migrate", *words, "--lazy")
    assert refused.returncode == 55
    assert "--image-dir" in refused.stderr
    assert there.wait() == 2
    assert work.ask("check") == "ok"
    there.close()


def test_it_is_not_slowed_in_rounds_that_there_are_not(hosts):
    refused = hosts.a.ckpt("migrate", "--pid", "1", "--to", "b:1", "--lazy", "--throttle")
    assert refused.returncode == 2
    assert "--throttle" in refused.stderr
