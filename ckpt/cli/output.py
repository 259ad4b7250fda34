"""How commands speak: results on stdout, everything else on stderr, progress on a terminal only.

A program that reads `--json` gets exactly one object on one line, whatever happens; a person gets
sentences that begin with `ckpt: `.
"""

import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, Protocol

import click

from ckpt.errors import HostFull

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on standard output."
)
"""The `--json` of every command; arrives as the argument `as_json`."""

listener: Callable[[str, Literal["error", "warning"]], None] | None = None
"""Takes what `note` is given instead of stderr, if there is one (`--log-json`)."""

PROGRESS_AFTER_S = 0.5
"""Work that is done by then shows no progress, and does not pay for importing rich (60 ms)."""

PROGRESS_EVERY_S = 0.1


class ReportProgress(Protocol):
    """What a long step calls now and then."""

    def __call__(self, step: str, done_bytes: int, total_bytes: int | None = None) -> None:
        """Say how far `step` is; `total_bytes` is None while nobody knows.

        Draws on the terminal, and the first drawing imports rich: never call it while a target is
        frozen.
        """
        ...


def say(text: str = "") -> None:
    """Write a line of a result to stdout.

    Raises:
        HostFull: stdout cannot take it (a full disk behind a redirection, say).
        BrokenPipeError: whoever read it is gone; `ckpt.cli.main` ends quietly then.
    """
    # A name may have bytes that are no UTF-8, which a strict stdout would not take.
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise HostFull(
            what=f"cannot write to standard output ({error.strerror})",
            remedy="the command itself was carried out; redirect its output elsewhere",
        ) from error


def list_numbers(numbers: Iterable[int]) -> str:
    """Write generations for people: `1, 4 to 7, 9`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(start) if start == end else f"{start} to {end}" for start, end in spans)


def emit_json(result: Mapping[str, object]) -> None:
    """Write `result` to stdout as one line of JSON; raises what `say` raises.

    NaN and infinity are not JSON and raise ValueError.
    """
    import json

    say(json.dumps(result, allow_nan=False))


def stdout_reader_is_gone() -> bool:
    """Tell whether stdout is a pipe (or socket) that nobody reads any more, as `| head` leaves."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def discard_stdout() -> None:
    """Let what is still buffered for stdout go nowhere, for the interpreter's last flush."""
    null_fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_fd, sys.stdout.fileno())
    os.close(null_fd)


def note(sentence: str, kind: Literal["error", "warning"] = "warning") -> None:
    """Write a sentence for the user (an error, a warning, a reason) to stderr."""
    if listener is not None:
        listener(sentence, kind)
    else:
        click.echo(f"ckpt: {sentence}", err=True)


@contextmanager
def progress(*, after_s: float = PROGRESS_AFTER_S) -> Iterator[ReportProgress]:
    """Show on stderr how far a command is, if that is a terminal; gone when the block ends.

    Yields what the work calls. Without a terminal, and in the first `after_s` seconds, that does
    nothing at all.
    """
    if not sys.stderr.isatty():
        yield _report_nothing
        return
    drawing = _Drawing(after_s)
    try:
        yield drawing
    finally:
        drawing.stop()


def _report_nothing(step: str, done_bytes: int, total_bytes: int | None = None) -> None:
    """Be the `ReportProgress` of those who cannot see it."""


class _Drawing:
    """A `ReportProgress` that draws with rich, in the caller's thread: no thread of its own."""

    def __init__(self, after_s: float) -> None:
        self._next_s = time.monotonic() + after_s
        self._bar: _Bar | None = None

    def __call__(self, step: str, done_bytes: int, total_bytes: int | None = None) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + PROGRESS_EVERY_S
        self._bar = self._bar or _Bar()
        self._bar.draw(step, done_bytes, total_bytes)

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()


class _Bar:
    """One line of rich's progress."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
            # What is printed meanwhile belongs on stdout, not on the console of the bar.
            redirect_stdout=False,
        )
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def draw(self, step: str, done_bytes: int, total_bytes: int | None) -> None:
        self._progress.update(
            self._task, description=step, completed=done_bytes, total=total_bytes, refresh=True
        )

    def stop(self) -> None:
        self._progress.stop()
