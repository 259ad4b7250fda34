"""A command under protection: `ckpt run`, told top to bottom.

begin         anew, or from the newest generation that is whole (`reviving`); a tree that a killed
              supervisor has left running is taken over by a last checkpoint of it
watch         a checkpoint now and then (`attempt`), until the tree has ended, or shall stop
conclude      how it ended is noted (`job`), told, and perhaps begun again

    runs by itself   --ends with 0-->         finished: the same line does not run it again
                     --fails, is killed-->    the same line goes on (--restart: at once)
                     --we are told to stop--> last checkpoint, and the same line goes on
    we are killed                             the same line takes it over, or goes on

The tree is our child, in a session of its own. Orphans among its descendants are given to us, so
that we know whom to end before it is brought back.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attrs

from ckpt.engine.attempt import Attempt, Failure, Made
from ckpt.engine.dump import dump
from ckpt.engine.heeding import Signals
from ckpt.engine.job import Job, Note, owned
from ckpt.engine.protection import RunOptions, describe_no_key, open_chain, require_key
from ckpt.engine.reviving import Revival
from ckpt.engine.starting import bear
from ckpt.errors import CkptError, ImageError, TargetGone, UsageError
from ckpt.image.chain import Chain
from ckpt.kernel.prctl import adopting_orphans
from ckpt.process.tree import list_children, read_boot_id
from ckpt.units import GenerationNo, Pid

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: the command has not ended, start the same line again."""

MOST_RESTARTS = 5
"""How often a command is brought back without having come to a new checkpoint."""

_WALL = 0x4000_0000
"""__WALL (wait.h): also what does not tell its end by SIGCHLD."""
_LOOKS_UP_S = 3600.0
"""At least so often, for poll(2) counts milliseconds in 31 bits."""

_STOPPING = frozenset({signal.SIGTERM, signal.SIGINT})
_PASSED_ON = frozenset({signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH})


@attrs.frozen
class Event:
    """Something that the user, or a program of his, may want to know."""

    name: str
    facts: Mapping[str, object]
    sentences: tuple[str, ...] = ()
    """For a person; none if it is not worth one."""


def run(
    directory: str | Path,
    command: Sequence[str],
    options: RunOptions,
    tell: Callable[[Event], None],
) -> int:
    """Run a command with checkpoints into a directory, or let it go on from there.

    State:  the main thread; whatever children this process has are taken to be of the command.

    Returns:
        The exit status of the command as a shell tells it (128 and the number of a signal), or
        `EXIT_STOPPED`, or, if a last checkpoint could not be taken, the exit code of that error.

    Raises:
        UsageError: the directory is of another command, or there is no such program.
        ImageError: the directory is in use, others can write to it, or none of its generations is
            whole or can be opened.
        RestoreError, HostError: the command cannot be brought back here, now.
        TargetError: it was left running, and cannot be taken over.
    """
    chain = open_chain(directory, options)
    # Ignored, as some parents leave it, it would have our children vanish unheard.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with owned(Path(directory)) as note, adopting_orphans():
        return _Supervisor(chain, note, tuple(command), options, tell).run()


class _Supervisor:
    def __init__(
        self,
        chain: Chain,
        note: Note,
        command: tuple[str, ...],
        options: RunOptions,
        tell: Callable[[Event], None],
    ) -> None:
        self._chain = chain
        self._note = note
        self._command = command
        self._options = options
        self._tell = tell
        hang_up = {signal.SIGHUP} if _has_terminal() else frozenset()
        self._stops = (_STOPPING | hang_up) - options.checkpoint_on
        passed_on = _PASSED_ON | {signal.SIGHUP}
        self._signals = Signals(self._stops | passed_on | options.checkpoint_on)
        self._job = Job(command, GenerationNo(0), read_boot_id())
        self._root = Pid(0)
        self._status: int | None = None
        """Of the root, when it was reaped."""
        self._attempt: Attempt | None = None
        self._due_s = 0.0
        self._wanted = False
        self._stop_by = 0
        """The signal by which we were told to stop."""
        self._code_of_stop: int | None = None
        """Set when the tree was ended by us, and with what we end then."""
        self._n_restarts = 0
        self._said: set[str] = set()
        self._last_failure = ""

    def run(self) -> int:
        with self._signals:
            code = self._begin()
            while code is None:
                self._watch()
                code = self._conclude()
            return code

    # -- begin -----------------------------------------------------------------------------------

    def _begin(self) -> int | None:
        """Start the command, or bring it back; an exit code if there is nothing to do."""
        newest = self._chain.newest()
        if self._options.again:
            self._refuse_if_it_runs()
        elif (found := self._note.read()) is not None:
            return self._go_on(found, has_any=newest is not None and newest >= found.first)
        elif newest is not None:
            raise UsageError(
                f"{self._chain.path} has generations that 'ckpt run' did not make: name another"
                " directory, or give --again to start the command beside them"
            )
        self._warn_of_no_key()
        self._start(self._chain.next_number())
        return None

    def _warn_of_no_key(self) -> None:
        sentence = describe_no_key(self._chain, self._options)
        if sentence is not None:
            self._say("no-identity", sentence, message=sentence)

    def _refuse_if_it_runs(self) -> None:
        with contextlib.suppress(ImageError):
            left = self._note.read()
            if left is not None and left.runs():
                raise UsageError(f"the command still runs (process {left.pid}): end it first")

    def _go_on(self, found: Job, *, has_any: bool) -> int | None:
        runs = found.runs()
        if found.command != self._command and (has_any or runs or found.ended == 0):
            raise UsageError(
                f"{self._chain.path} is of another command ({' '.join(found.command)}): name"
                " another directory, or give --again to start this one"
            )
        if found.ended == 0:
            self._say(
                "finished",
                "the command has finished, with exit status 0: nothing to do (--again starts it"
                " over)",
                exit_code=0,
            )
            return 0
        if runs or has_any:
            require_key(self._chain, self._options, found, runs=runs)
        else:
            self._warn_of_no_key()
        self._job = found
        if runs:
            self._take_over(Pid(found.pid))
        elif found.ended is not None:
            self._say("failed-before", f"last time {_describe(found.ended)}", exit_code=found.ended)
        self._revive()
        return None

    def _take_over(self, pid: Pid) -> None:
        """End a tree that goes on without a supervisor, by a checkpoint to bring it back from."""
        made = dump(pid, self._chain.path, self._options.dump_options(kill=True))
        self._job = attrs.evolve(self._job, newest=made.generation)
        self._say(
            "taken-over",
            f"the command has been running on as process {pid}, and is taken over",
            pid=pid,
            generation=made.generation,
        )

    def _start(self, first: GenerationNo) -> None:
        with bear(self._command) as newborn:
            job = Job(self._command, first, read_boot_id(), streams=_own_streams())
            self._job = job.as_process(newborn.pid)
            self._note.write(self._job)
            try:
                newborn.go()
            except UsageError:
                self._note.remove()
                raise
        self._take_in(newborn.pid)
        self._say("started", pid=newborn.pid)

    def _revive(self) -> None:
        """Bring it back from the newest generation that is whole; anew if it has none at all."""
        self._tell_what_is_gone()
        revival = Revival(
            directory=self._chain.path,
            first=self._job.first,
            streams=self._job.streams,
            moved=self._job.boot_id != read_boot_id(),
            options=self._options.restoring,
            access=self._options.access,
            pass_over=self._pass_over,
            announce=self._announce,
        )
        result = revival.revive()
        if result is None:
            self._start(self._job.first)
            return
        self._take_in(result.pid)
        self._say(
            "restored",
            f"it goes on from generation {result.generation} as process {result.pid}",
            *self._news_of(result.warnings),
            pid=result.pid,
            generation=result.generation,
            restore_ms=round(result.restore_ms, 3),
            warnings=list(result.warnings),
        )

    def _tell_what_is_gone(self) -> None:
        """The newest is never removed by us, nor is it undone by a crash."""
        newest, noted = self._chain.newest(), self._chain.next_number() - 1
        if self._job.newest is not None:
            noted = max(noted, self._job.newest)
        if noted >= self._job.first and (newest is None or newest < noted):
            self._say("gone", f"generation {noted} was here, and is gone", generation=noted)

    def _pass_over(self, number: GenerationNo, error: ImageError) -> None:
        self._say(
            "passed-over",
            f"generation {number} is passed over: {error}",
            generation=number,
            reason=str(error),
        )

    def _announce(self, pid: Pid) -> None:
        self._job = attrs.evolve(self._job.as_process(pid), ended=None)
        self._note.write(self._job)

    def _take_in(self, pid: Pid) -> None:
        self._root = pid
        self._status = None
        self._due_s = time.monotonic() + self._options.every_s

    # -- watch -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Return when the tree has ended, and no checkpoint is under way."""
        with self._signals.and_of_children():
            while True:
                self._reap()
                if self._attempt is not None and self._attempt.status is not None:
                    self._take_result(self._attempt)
                if self._attempt is None:
                    if self._status is not None:
                        return
                    self._attempt = self._next_attempt()
                for number in self._signals.wait(self._left_s()):
                    self._heed(number)

    def _reap(self) -> None:
        """Reap whoever has ended, orphans of the tree included."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG | _WALL)
                if not pid:
                    return
                self._note_end(pid, status)

    def _note_end(self, pid: int, status: int) -> None:
        if pid == self._root:
            self._status = status
        elif self._attempt is not None and pid == self._attempt.pid:
            self._attempt.status = status

    def _next_attempt(self) -> Attempt | None:
        """Begin a checkpoint if it is time for one."""
        is_time = self._stop_by or self._wanted or time.monotonic() >= self._due_s
        if not is_time or self._code_of_stop is not None:
            return None
        self._wanted = False
        self._due_s = time.monotonic() + self._options.every_s
        options = self._options.dump_options(kill=bool(self._stop_by))
        ours = [*self._signals.numbers, signal.SIGCHLD]
        # Who waits for us to stop does not wait for room to be made.
        keeping = None if self._stop_by else self._options.keeping(self._chain)
        return Attempt(self._root, self._chain.path, options, keeping, ours)

    def _left_s(self) -> float | None:
        """Return how long nothing is to be done, if no signal comes."""
        if self._attempt is not None or self._code_of_stop is not None:
            return None
        return min(max(self._due_s - time.monotonic(), 0), _LOOKS_UP_S)

    def _heed(self, number: int) -> None:
        if number in self._stops:
            if self._stop_by:
                self._stop_at_once(number)
            self._stop_by = number
        elif number in self._options.checkpoint_on:
            self._wanted = True
        elif number != signal.SIGCHLD and self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._root, number)

    def _take_result(self, attempt: Attempt) -> None:
        self._attempt = None
        result = attempt.result()
        if isinstance(result, Failure):
            self._take_failure(result, attempt)
            return
        self._n_restarts = 0
        self._last_failure = ""
        self._write(attrs.evolve(self._job, newest=result.generation))
        self._say_made(result)
        if attempt.kills:
            self._code_of_stop = EXIT_STOPPED

    def _say_made(self, made: Made) -> None:
        self._say(
            "checkpoint",
            *self._news_of(made.warnings),
            generation=made.generation,
            kind=made.kind,
            reason=made.reason,
            freeze_ms=made.freeze_ms,
            wall_ms=made.wall_ms,
            bytes=made.stored_bytes,
            pages=made.pages,
            warnings=list(made.warnings),
            removed=list(made.removed),
        )

    def _take_failure(self, failure: Failure, attempt: Attempt) -> None:
        """Tell why there is no checkpoint; of a tree that has ended by itself that is no news."""
        if self._status is not None and failure.code == TargetGone.code:
            return
        which = "the last checkpoint" if attempt.kills else "a checkpoint"
        sentence = f"{which} could not be taken: {failure.message}"
        repeated = sentence == self._last_failure
        self._last_failure = sentence
        self._say(
            "checkpoint-failed",
            *([] if repeated else [sentence]),
            error=attrs.asdict(failure),
        )
        if attempt.kills:
            self._code_of_stop = failure.exit_code
            self._end_all()

    def _stop_at_once(self, number: int) -> None:
        """Told twice to stop: end everything without waiting for the last checkpoint."""
        self._code_of_stop = 128 + number
        if self._attempt is not None:
            self._attempt.end()
            _, self._attempt.status = os.waitpid(self._attempt.pid, 0)
            self._attempt = None
        self._end_all()

    def _end_all(self) -> None:
        """Kill and reap the tree, and whatever it has left behind."""
        ours = Pid(os.getpid())
        while children := list_children(ours):
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            for child in children:
                with contextlib.suppress(ChildProcessError):
                    self._note_end(*os.waitpid(child, _WALL))

    # -- conclude --------------------------------------------------------------------------------

    def _conclude(self) -> int | None:
        """Note how the tree ended; an exit code, or None if it was begun again."""
        assert self._status is not None
        status = os.waitstatus_to_exitcode(self._status)
        code = 128 - status if status < 0 else status
        by_itself = self._code_of_stop is None
        self._write(attrs.evolve(self._job, pid=0, ended=code if by_itself else None))
        if self._code_of_stop is not None:
            return self._say_stopped(self._code_of_stop)
        self._say("ended", *([_describe(code)] if code else []), exit_code=code)
        if code == 0 or not self._options.restart_on_failure or self._stop_by:
            return code
        if self._n_restarts >= MOST_RESTARTS:
            self._say(
                "given-up",
                f"it is not started any more: it has come to no checkpoint in {MOST_RESTARTS}"
                " restarts",
            )
            return code
        self._n_restarts += 1
        self._end_all()
        self._revive()
        return None

    def _say_stopped(self, code: int) -> int:
        newest = self._chain.newest()
        has_one = newest is not None and newest >= self._job.first
        line = "the same line"
        if not self._options.can_open(self._chain):
            line += " with --identity"
        self._say(
            "stopped",
            f"stopped; {line} goes on from generation {newest}"
            if has_one
            else "stopped; there is no checkpoint, the same line starts anew",
            generation=newest if has_one else None,
            exit_code=code,
        )
        return code

    def _write(self, job: Job) -> None:
        self._job = job
        try:
            self._note.write(job)
        except CkptError as error:
            self._say("warning", str(error), message=str(error))

    # -- tell ------------------------------------------------------------------------------------

    def _news_of(self, warnings: Sequence[str]) -> list[str]:
        """Return those that were not said before."""
        news = [warning for warning in warnings if warning not in self._said]
        self._said.update(news)
        return news

    def _say(self, name: str, *sentences: str, **facts: object) -> None:
        self._tell(Event(name, facts, sentences))


def _describe(code: int) -> str:
    names = {128 + number: number.name for number in signal.Signals}
    if code in names:
        return f"the command was ended by {names[code]}"
    return f"the command ended with exit status {code}"


def _own_streams() -> tuple[str, str]:
    names = []
    for fd in (1, 2):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            names.append("")
    return names[0], names[1]


def _has_terminal() -> bool:
    """Tell whether we have a controlling terminal, whose end SIGHUP tells."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
