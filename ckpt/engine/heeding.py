"""Signals that come as numbers out of a pipe, for a loop that waits for them.

Kernel: signal(7), signal.set_wakeup_fd. Masks are left alone: children would inherit them.
Neighbour: `supervising`.
"""

import contextlib
import os
import select
import signal
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

_MOST_AT_ONCE = 512


class Signals:
    """A context manager: inside, the wanted signals do nothing but wake `wait`.

    One that is ignored stays so: nohup, or a shell's `&`, has said that it is not for us.

    Attributes:
        numbers: of those that are heeded.
    """

    def __init__(self, wanted: Iterable[int]) -> None:
        """Nothing is changed yet. State: the main thread."""
        ignored = signal.SIG_IGN
        self.numbers = [n for n in sorted(set(wanted)) if signal.getsignal(n) is not ignored]
        self._undo = contextlib.ExitStack()
        self._pipe = -1

    def __enter__(self) -> Self:
        """Take the signals."""
        with contextlib.ExitStack() as undo:
            self._pipe, wakes = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, self._pipe)
            undo.callback(os.close, wakes)
            before = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
            undo.callback(signal.set_wakeup_fd, before)
            for number in self.numbers:
                undo.enter_context(_waking(number))
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give them back."""
        self._undo.close()

    @contextlib.contextmanager
    def and_of_children(self) -> Iterator[None]:
        """Inside, SIGCHLD wakes too; who is not in the loop would have calls interrupted by it."""
        with _waking(signal.SIGCHLD):
            signal.siginterrupt(signal.SIGCHLD, False)
            yield

    def wait(self, timeout_s: float | None) -> list[int]:
        """Wait until some have come, and return their numbers; none if the time is over."""
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        if poll.poll(None if timeout_s is None else timeout_s * 1000):
            return list(os.read(self._pipe, _MOST_AT_ONCE))
        return []


@contextlib.contextmanager
def _waking(number: int) -> Iterator[None]:
    before = signal.signal(number, lambda _number, _frame: None)
    try:
        yield
    finally:
        signal.signal(number, before)
