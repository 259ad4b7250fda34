"""A checkpoint that a child of ours takes, while we go on watching.

A process that is traced tells its end to its tracer first. In a child, a dump cannot take from us
how the tree has ended, nor take us along if it goes wrong; and its memory is given back each time.
The child ends with us: until it has committed, nothing has happened. Neighbour: `supervising`.
"""

import contextlib
import json
import os
import signal
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from ckpt.engine.dump import DumpOptions, DumpResult, dump
from ckpt.engine.making_room import Keeping
from ckpt.errors import CkptError, DumpTimeout
from ckpt.kernel.prctl import Prctl, prctl
from ckpt.units import GenerationNo, Pid

_EXIT_BUG = 70


@attrs.frozen
class Failure:
    """Why there is no checkpoint."""

    code: str
    message: str
    exit_code: int


@attrs.frozen
class Made:
    """A checkpoint that was taken."""

    generation: GenerationNo
    kind: str
    reason: str
    freeze_ms: float
    wall_ms: float
    stored_bytes: int
    pages: int
    """That were stored."""
    warnings: tuple[str, ...]
    removed: tuple[int, ...] = ()
    """Generations that made room for it, ascending."""


class Attempt:
    """A child that takes one checkpoint.

    Attributes:
        pid: of the child.
        kills: the tree ends with this checkpoint.
        status: its wait status, once whoever reaps our children has put it there.
    """

    def __init__(
        self,
        root: Pid,
        directory: Path,
        options: DumpOptions,
        keeping: Keeping | None,
        ours: Iterable[int],
    ) -> None:
        """Begin.

        Args:
            root: of the tree.
            directory: of the chain.
            options: of the dump.
            keeping: how room is made for it; None: not at all.
            ours: the signals that we have handlers for.
        """
        self.kills = options.kill
        self.status: int | None = None
        # The answer needs no reader while it is written, unlike that of a pipe.
        self._answer = os.memfd_create("ckpt-answer")
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            code = _EXIT_BUG
            try:
                _end_with(parent, ours)
                options = attrs.evolve(options, if_stuck=self._give_up)
                self._say(_try(root, directory, options, keeping))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                # Nothing of the parent's own ending may run here too.
                os._exit(code)

    def _say(self, answer: dict[str, Any]) -> None:
        os.write(self._answer, json.dumps(answer).encode())

    def _give_up(self, error: DumpTimeout) -> None:
        """In the child: end at once, see `DumpOptions.if_stuck`."""
        self._say(_failed(error))
        os._exit(0)

    def end(self) -> None:
        """Ask it to end; what is half done in the tree is finished first, in milliseconds."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def result(self) -> Made | Failure:
        """Return what has become of it. State: `status` is there; once."""
        with open(self._answer, "rb") as file:
            file.seek(0)
            raw = file.read()
        if raw:
            return _parse(json.loads(raw))
        code = os.waitstatus_to_exitcode(self.status or 0)
        how = f"signal {-code} ended" if code < 0 else f"exit status {code} was that of"
        return Failure("internal", f"{how} the process that took it", _EXIT_BUG)


def _end_with(parent: int, ours: Iterable[int]) -> None:
    """In the child: end when the parent does, and hear nothing of what is sent to it."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    prctl(Prctl.SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(_EXIT_BUG)


def _try(
    root: Pid, directory: Path, options: DumpOptions, keeping: Keeping | None
) -> dict[str, Any]:
    try:
        reason = ""
        if keeping is not None:
            options, reason = keeping.adapt(directory, options)
        made = _shortened(dump(root, directory, options))
    except CkptError as error:
        return _failed(error)
    made = attrs.evolve(made, reason=made.reason or reason)
    if keeping is not None:
        made = _make_room(directory, keeping, made)
    return {"made": attrs.asdict(made)}


def _failed(error: CkptError) -> dict[str, Any]:
    return {"failure": error.as_plain()}


def _make_room(directory: Path, keeping: Keeping, made: Made) -> Made:
    """Remove older generations; that it cannot be done harms neither these nor the new one."""
    try:
        return attrs.evolve(made, removed=keeping.make_room(directory))
    except CkptError as error:
        warning = f"older generations were not removed: {error.message()}"
        return attrs.evolve(made, warnings=(*made.warnings, warning))


def _shortened(result: DumpResult) -> Made:
    return Made(
        generation=result.generation,
        kind=str(result.kind),
        reason=result.reason,
        freeze_ms=round(result.freeze_ms, 3),
        wall_ms=round(result.wall_ms, 3),
        stored_bytes=result.stored_bytes,
        pages=result.pages.data,
        warnings=result.warnings,
    )


def _parse(raw: dict[str, Any]) -> Made | Failure:
    if "failure" in raw:
        return Failure(**raw["failure"])
    made = raw["made"]
    several = {name: tuple(made[name]) for name in ("warnings", "removed")}
    return Made(**made | several)
