"""Ways to move a tree, all of one shape: given what runs, they return what runs afterwards.

    within(image)            killed and brought back on its host: no move at all, the same program
    offline(hosts, image)    killed here, its address moved, brought back there
    live(hosts, folder)      `ckpt migrate` on its host, `ckpt receive` on the other

A test that is given a `Move` says nothing of how it is done.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from integration.harness import CKPT
from integration.migrate.hosts import Host, Hosts, Started, last_json, leave_address, take_address

Move = Callable[[Started], Started]


class Returned(Started):
    """A tree that `ckpt restore` has made, below itself; `pid` is its root's."""

    def __init__(self, host: Host, command: list[str | Path], pid: int) -> None:
        super().__init__(host, command)
        self.ckpt_pid, self.pid = self.pid, pid
        early = []
        try:
            while '"restore_ms"' not in (line := self.line()):
                early.append(line)
        except EOFError:
            status = self.wait()
            self.close()
            raise AssertionError(f"restore on {host.name} ended with {status}: {early}") from None
        self._held = "".join(f"{one}\n" for one in early).encode() + self._held
        self.said = last_json(line)
        assert self.said["pid"] == pid


def dump(work: Started, image: Path, *options: str) -> dict[str, Any]:
    """Take a checkpoint, killing, and return what it says of itself."""
    words = ["dump", "--pid", str(work.pid), "--incremental", "--kill", "--json", *options, image]
    said = last_json(work.host.must([*CKPT, *words]))
    work.wait()
    work.close()
    return said


def restore(host: Host, image: Path, pid: int, *options: str) -> Returned:
    """Bring a tree back, with new pipes for its standard streams."""
    return Returned(host, [*CKPT, "restore", "--json", *options, image], pid)


def within(image: Path) -> Move:
    """Return how a tree is killed and brought back where it was."""

    def move(work: Started) -> Started:
        dump(work, image)
        return restore(work.host, image, work.pid)

    return move


def offline(hosts: Hosts, image: Path) -> Move:
    """Return how a tree is stopped on its host, and brought back on the other."""

    def move(work: Started) -> Started:
        dump(work, image, "--on-departure", " ".join(leave_address()))
        there = hosts.other(work.host)
        return restore(there, image, work.pid, "--on-arrival", " ".join(take_address()))

    return move


class Receiving(Started):
    """A tree that `ckpt receive --once` has taken, below itself; `pid` is its root's."""

    def __init__(self, host: Host, token: Path, *options: str) -> None:
        words = ["receive", "--listen", f"{host.address}:0", "--once", "--json"]
        super().__init__(host, [*CKPT, *words, "--token-file", token, *options])
        self.ckpt_pid = self.pid
        self.listens = last_json(self.line())["listening"]

    def arrive(self, pid: int) -> None:
        """Be the tree that has been moved here."""
        early = []
        while '"warnings"' not in (line := self.line()):
            early.append(line)
        self._held = "".join(f"{one}\n" for one in early).encode() + self._held
        self.said = last_json(line)
        assert self.said["pid"] == pid
        self.pid = pid


def live(hosts: Hosts, folder: Path, *options: str) -> Move:
    """Return how a tree is moved while it runs."""

    def move(work: Started) -> Started:
        there = Receiving(
            hosts.other(work.host), folder / "token", "--on-arrival", " ".join(take_address())
        )
        words = ["migrate", "--pid", str(work.pid), "--to", there.listens, "--json"]
        # However slow this machine is at the moment.
        words += ["--token-file", str(folder / "token"), "--max-downtime", "60000", *options]
        said = work.host.must([*CKPT, *words, "--on-departure", " ".join(leave_address())])
        there.arrive(work.pid)
        there.said |= last_json(said)
        work.wait()
        work.close()
        return there

    return move
