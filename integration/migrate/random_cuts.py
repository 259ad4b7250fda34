"""Migrations that are cut at a random message, or of which a process is killed at a random moment.

    python -m integration.migrate.random_cuts [--runs 100] [--seed 1]

After each exactly one copy runs and verifies, and the next run moves it on. Run N has the seed of
the first plus N: `--runs 1 --seed S` makes the same choice once more (the moment it comes at is the
machine's). Exits with 1 if a copy was lost, doubled, or not as it must be.
"""

import argparse
import contextlib
import math
import os
import random
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import attrs

from integration.migrate.cutting import END_S, Counted, Ended, counted, until
from integration.migrate.hosts import Hosts, Started, two_hosts

KILLED = (137, -9)
CUTS = ("cut at the source", "cut at the destination")
KILLS = ("source", "witness", "listener", "heir", "worker")
WEIGHTS = {
    **dict.fromkeys(CUTS, 5),
    "source": 5,
    "worker": 5,
    "witness": 1,
    "listener": 1,
    "heir": 2,
}
"""Of ten cuts as many kills; who does the work is killed more often than who only watches it."""


@attrs.frozen
class Choice:
    """What befalls one migration."""

    what: str
    """One of CUTS or KILLS."""
    part: float
    """When, of all its messages on that side, or of all its time; 0 to 1."""

    @classmethod
    def of(cls, seed: int) -> "Choice":
        chance = random.Random(seed)
        return cls(chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0], chance.random())


@attrs.define
class Usual:
    """A migration that nothing befalls."""

    n_at_source: int
    """Points at which a message can be cut off."""
    n_at_destination: int
    seconds: float
    """From the first word of the destination's to the end of the source's command."""


@attrs.define
class Tally:
    """What came of them all."""

    lost: list[int] = attrs.Factory(list)
    """Seeds after which no copy ran."""
    doubled: list[int] = attrs.Factory(list)
    wrong: list[int] = attrs.Factory(list)
    """Seeds after which one ran, and something else was not as it must be."""
    fates: Counter[tuple[str, str]] = attrs.Factory(Counter)

    @property
    def failed(self) -> list[int]:
        return sorted([*self.lost, *self.doubled, *self.wrong])

    def summary(self, n_runs: int) -> str:
        counts = f"{len(self.lost)} lost, {len(self.doubled)} doubled, {len(self.wrong)} wrong"
        lines = [f"{n_runs} runs: {counts}"]
        for what in WEIGHTS:
            name = what if what in CUTS else f"{what} killed"
            came = [f"{n} {fate}" for (of, fate), n in sorted(self.fates.items()) if of == what]
            lines += [f"  {name:22}  {', '.join(came)}"] * bool(came)
        return "\n".join([*lines, *(f"failed: --runs 1 --seed {seed}" for seed in self.failed)])


def measure(tree: Counted) -> Usual:
    """Move it there and back undisturbed, and see how long that takes and what is said."""
    noted = tree.folder / "noted"
    n_points, seconds = [], 0.0
    for fault in ("source", "destination"):
        clock = _Clock()
        ended = tree.migrate(**{fault: f"message=note:{noted}"}, meanwhile=clock.measure)
        assert (ended.migrate, ended.receive) == (0, 0), ended
        tree.verify()
        n_points.append(len(noted.read_text().splitlines()))
        noted.unlink()
        seconds = clock.seconds
    return Usual(n_points[0], n_points[1], seconds)


def run_one(tree: Counted, choice: Choice, usual: Usual) -> str:
    """Migrate once with what was chosen; return what came of it. AssertionError: it must not."""
    before = tree.at
    blow = Blow(choice, usual)
    ended = tree.migrate(**blow.fault(), meanwhile=blow.strike)
    tree.verify()
    has_moved = tree.at is not before
    _judge(ended, blow, has_moved)
    return ("moved" if has_moved else "kept") if blow.hit else "missed"


def _judge(ended: Ended, blow: "Blow", has_moved: bool) -> None:
    """See that the commands say what is so."""
    if not blow.hit:
        assert (ended.migrate, has_moved) == (0, True), ended
    elif blow.choice.what == "source":
        # It may have come to its end a moment before.
        assert ended.migrate in KILLED or (ended.migrate == 0 and has_moved), ended
    else:
        assert (ended.migrate == 0) == has_moved, ended


class _Clock:
    """Takes the time of a migration, from when the destination is spoken to."""

    seconds = 0.0

    def begin(self, migrating: Started, receiving: Started) -> bool:
        """Wait for the session; False: there will be none."""
        self._receiver = receiving.outer_pid

        def has_begun() -> bool:
            return bool(_children(self._receiver)) or migrating.process.poll() is not None

        until(has_begun, "nobody speaks to the destination")
        self._begun_s = time.monotonic()
        return migrating.process.poll() is None

    def measure(self, migrating: Started, receiving: Started) -> None:
        """Be a `meanwhile` that only looks."""
        self.begin(migrating, receiving)
        migrating.wait()
        self.seconds = time.monotonic() - self._begun_s


class Blow:
    """A cut or a kill, as chosen."""

    def __init__(self, choice: Choice, usual: Usual) -> None:
        self.choice, self._usual = choice, usual
        self.hit = False

    def fault(self) -> dict[str, str]:
        """Return what `Counted.migrate` shall be given."""
        if self.choice.what not in CUTS:
            return {}
        usual = self._usual
        side, n_points = (
            ("source", usual.n_at_source)
            if self.choice.what == CUTS[0]
            else ("destination", usual.n_at_destination)
        )
        return {side: f"message#{1 + math.floor(self.choice.part * n_points)}=cut"}

    def strike(self, migrating: Started, receiving: Started) -> None:
        """Be a `meanwhile` that kills whom it shall, if it shall."""
        source, listener = migrating.outer_pid, receiving.outer_pid
        self._strike(migrating, receiving, source, listener)
        migrating.process.wait(END_S)

        def waits_for_nobody() -> bool:
            return receiving.process.poll() is not None or not _children(listener)

        until(waits_for_nobody, "the destination does not end")
        # Whoever was spoken to by nobody who proved himself still waits for such.
        with contextlib.suppress(ProcessLookupError):
            os.kill(listener, signal.SIGINT)

    def _strike(self, migrating: Started, receiving: Started, source: int, listener: int) -> None:
        if self.choice.what in CUTS:
            # Nobody tells whether that message came.
            self.hit = True
            return
        if not _Clock().begin(migrating, receiving):
            return
        end = os.pidfd_open(source)
        try:
            ended, _, _ = select.select([end], [], [], self.choice.part * self._usual.seconds)
        finally:
            os.close(end)
        if ended:
            return
        with contextlib.suppress(ProcessLookupError, IndexError):
            victim = _find(self.choice.what, source, listener)
            os.kill(victim, signal.SIGKILL)
            self.hit = True


def _find(who: str, source: int, listener: int) -> int:
    """Return the pid of one of those that take part, in our own numbers; IndexError: not there."""
    if who == "source":
        return source
    if who == "witness":
        return _children(source)[-1]
    if who == "listener":
        return listener
    heir = _children(listener)[0]
    return heir if who == "heir" else _children(heir)[0]


def _children(pid: int) -> list[int]:
    try:
        listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(one) for one in listed.split()]


@contextlib.contextmanager
def prepared(hosts: Hosts, folder: Path) -> Iterator[tuple[Counted, Usual]]:
    """Start the workload, and know how it moves."""
    with counted(hosts, folder) as tree:
        yield tree, measure(tree)


def run_all(hosts: Hosts, seeds: list[int]) -> Tally:
    """Run one after the other, with one tree as long as it is well."""
    tally = Tally()
    left = seeds[::-1]
    while left:
        with (
            tempfile.TemporaryDirectory(prefix="ckpt-cuts-") as folder,
            prepared(hosts, Path(folder)) as (tree, usual),
        ):
            while left:
                seed = left.pop()
                choice = Choice.of(seed)
                try:
                    fate = run_one(tree, choice, usual)
                except (AssertionError, OSError, subprocess.TimeoutExpired):
                    traceback.print_exc()
                    _count_copies(tree, seed, tally)
                    break
                tally.fates[choice.what, fate] += 1
                print(f"{seed}: {choice.what}, {choice.part:.1%}: {fate}", flush=True)
    return tally


def _count_copies(tree: Counted, seed: int, tally: Tally) -> None:
    n_copies = sum(tree.pid in host.pids() for host in (tree.hosts.a, tree.hosts.b))
    kinds = {0: tally.lost, 1: tally.wrong, 2: tally.doubled}
    kinds[2 if _ran_twice(tree) else n_copies].append(seed)
    print(f"{seed}: failed, {Choice.of(seed)}", flush=True)


def _ran_twice(tree: Counted) -> bool:
    steps = [line.split()[0] for line in tree.log.read_text().splitlines()]
    return len(set(steps)) < len(steps)


def main() -> int:
    """Run as many as were asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 20))
    chosen = parser.parse_args()
    print(f"seeds from {chosen.seed}")
    with two_hosts() as hosts:
        hosts.part_memory_files()
        tally = run_all(hosts, [chosen.seed + nth for nth in range(chosen.runs)])
    print(tally.summary(chosen.runs))
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
