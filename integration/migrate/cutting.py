"""A migration that meets with a fault, and what must be true afterwards, whatever it was.

with counted(hosts, folder) as tree:
    failed = tree.migrate(Fault(source="sent:Go=cut"))
    tree.verify(failed)         exactly one copy, its steps without a gap or a double
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from integration.harness import CKPT
from integration.migrate.hosts import (
    SERVICE,
    Host,
    Hosts,
    Started,
    last_json,
    leave_address,
    take_address,
)
from integration.workloads.driver import ANSWER_S

PROGRAM = Path(__file__).with_name("counting.py")
PORT = 5000
END_S = 60.0
MORE_STEPS = 20
EVERY = bool(os.environ.get("CKPT_EVERY_CUT"))
"""Try every point, not only those around the hand-over."""


@attrs.frozen
class Ended:
    """How the two commands ended; None: the test has killed it."""

    migrate: int
    receive: int
    said: str
    """By the source, on standard error."""
    heard: str
    """By the destination."""


def until(what: Callable[[], bool], why: str) -> None:
    """Look again and again, for a minute."""
    ends_s = time.monotonic() + END_S
    while not what():
        assert time.monotonic() < ends_s, why
        # Of what ends by itself nobody tells us.
        select.select([], [], [], 0.01)


def children_of(host: Host, pid: int) -> list[int]:
    """Return the children of a process, in the numbers of its host."""
    listed = host.must(["cat", f"/proc/{pid}/task/{pid}/children"])
    return [int(one) for one in listed.split()]


def receivers(host: Host, listener: Started) -> list[int]:
    """Return the listener, the heir and the worker of its one session."""
    heir = children_of(host, listener.pid)[0]
    return [listener.pid, heir, children_of(host, heir)[0]]


class Gate:
    """A FIFO at which a process of ckpt waits for us."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def wait(self) -> int:
        """Return the pid of who waits there now, in its own numbers."""
        with self.path.open() as told:
            return int(told.readline())

    def open(self) -> None:
        """Let it go on."""
        self.path.write_text("on\n")


@attrs.define
class Counted:
    """The tree, wherever it is."""

    hosts: Hosts
    folder: Path
    work: Started
    sock: socket.socket
    pid: int
    at: Host
    after_arrival: str = ""
    """Behind the command of `--on-arrival`."""
    hooks: bool = True
    _n_said: int = 0

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def receiver(self, fault: str = "", *more: str, before: tuple[str, ...] = ()) -> Started:
        """Start `ckpt receive` on the other host."""
        there = self.hosts.other(self.at)
        words = ["receive", "--listen", f"{there.address}:0", "--once", "--detach", "--json"]
        words += ["--token-file", str(self.folder / "token"), *more]
        if self.hooks:
            words += ["--on-arrival", " ".join(take_address()) + self.after_arrival]
            words += ["--on-return", " ".join(leave_address())]
        return self._start(there, [*before, *CKPT, *words], fault, "heard")

    def migrating(self, listens: str, fault: str = "", *more: str) -> Started:
        """Start `ckpt migrate` where the tree is."""
        words = ["migrate", "--pid", str(self.pid), "--to", listens, "--json", *more]
        words += ["--token-file", str(self.folder / "token"), "--max-downtime", "60000"]
        if self.hooks:
            words += ["--on-departure", " ".join(leave_address())]
            words += ["--on-return", " ".join(take_address())]
        return self._start(self.at, [*CKPT, *words], fault, "said")

    def _start(self, host: Host, words: list[str], fault: str, log: str) -> Started:
        with (self.folder / log).open("w") as errors:
            return host.start(words, env=os.environ | {"CKPT_FAULT": fault}, stderr=errors)

    def migrate(
        self,
        source: str = "",
        destination: str = "",
        meanwhile: Callable[[Started, Started], None] | None = None,
        before: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
        ends_alone: bool = True,
    ) -> Ended:
        """Try to move it, with a fault on one of the sides; return how that ended.

        Args:
            source: `CKPT_FAULT` there.
            destination: `CKPT_FAULT` there.
            meanwhile: called with both commands, source first, as they run.
            before: words to put before `ckpt receive`.
            more: and behind.
            ends_alone: `ckpt receive` has had its session; else it waits for one, and we end it.
        """
        receiving = self.receiver(destination, *more, before=before)
        migrating = self.migrating(last_json(receiving.line())["listening"], source)
        if meanwhile:
            meanwhile(migrating, receiving)
        status = _end(migrating)
        if not ends_alone:
            receiving.kill(signal.SIGINT)
        codes = status, _end(receiving)
        self.settle()
        said, heard = ((self.folder / name).read_text() for name in ("said", "heard"))
        return Ended(codes[0], codes[1], said, heard)

    def settle(self, *but: int) -> None:
        """Wait until nothing but the tree is left on both hosts, and who belongs there."""
        a, b = self.hosts.a, self.hosts.b
        left = sorted([self.pid, *but])
        until(lambda: sorted([*a.pids(), *b.pids()]) == left, f"{_listed(a)}\n{_listed(b)}")
        self.at = a if self.pid in a.pids() else b

    def verify(self) -> None:
        """See that exactly one copy runs, that it was never two, and that nothing else is left."""
        for host in (self.hosts.a, self.hosts.b):
            assert host.tables() == [], host.name
            assert host.must(["ls", "/dev/shm"]) == "", host.name
            left = host.must(["find", "/run/ckpt", "-name", "*.session"])
            assert left == "", host.name
            if self.hooks:
                assert host.has(SERVICE) == (host is self.at), f"the address and {host.name}"
        n_steps = len(self.log.read_text().splitlines())
        until(lambda: self.log.read_text().count("\n") > n_steps + MORE_STEPS, "it stands still")
        lines = [line.split() for line in self.log.read_text().splitlines(keepends=False)]
        assert [int(one[0]) for one in lines[:-1]] == list(range(1, len(lines)))
        assert {one[2] for one in lines[:-1]} == {"ok"}
        assert lines[-2][1] == self.at.name
        self._n_said += 1
        word = b"%8d" % self._n_said
        self.sock.sendall(word)
        heard = b""
        while len(heard) < len(word):
            part = self.sock.recv(len(word) - len(heard))
            assert part, "the connection has ended"
            heard += part
        assert heard == word

    def hosts_so_far(self) -> str:
        """Return where it ran, in order: `a`, `ab`, `aba`, ..."""
        names = [line.split()[1] for line in self.log.read_text().splitlines()[:-1]]
        return "".join(n for n, before in zip(names, ["", *names], strict=False) if n != before)


def _end(one: Started) -> int:
    """Wait for the end of a command, and close our ends of its pipes."""
    try:
        return one.process.wait(END_S)
    except subprocess.TimeoutExpired:
        one.process.kill()
        raise
    finally:
        for pipe in (one.process.stdin, one.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _listed(host: Host) -> str:
    return host.must(["ps", "-e", "-o", "pid,ppid,stat,args"])


@contextlib.contextmanager
def counted(hosts: Hosts, folder: Path, *, mib: int = 0, **more: object) -> Iterator[Counted]:
    """Start the workload on host `a`, so much heavier, with a connection of the client to it."""
    (folder / "log").touch()
    command = " ".join(
        [sys.executable, "-S", str(PROGRAM), str(folder / "log"), str(PORT), str(mib)]
    )
    work = hosts.a.start(["sh", "-c", f"exec {command} </dev/null >/dev/null 2>&1"])

    def listens() -> bool:
        return f":{PORT} " in hosts.a.must(["ss", "-Hltn"])

    until(listens, "it does not listen")
    with hosts.client.network():
        sock = socket.create_connection((SERVICE, PORT), ANSWER_S)
    with sock:
        sock.settimeout(ANSWER_S)
        tree = Counted(hosts, folder, work, sock, work.pid, hosts.a, **more)
        until(lambda: tree.log.read_text().count("\n") > 1, "it does not begin")
        try:
            yield tree
        finally:
            for host in (hosts.a, hosts.b):
                for pid in host.pids():
                    host.run(["kill", "-9", str(pid)])
            if not hosts.a.has(SERVICE):
                hosts.b.run(leave_address())
                hosts.a.must(take_address())
            _end(work)


def kill(host: Host, pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process of a host, by its number there."""
    host.must(["kill", f"-{int(number)}", str(pid)])
