"""A limit on the time of one piece of work: what takes longer is left as by Ctrl-C.

    with time_limit(5.0) as limit:
        ...                     TimeIsUp is raised here, wherever we are, after five seconds
        limit.settle()          and not any more from here on

An alarm of the kernel's interrupts the main thread, also in a call that waits. What must not be cut
short is not: steps of `uninterrupted`, and the way out after another error; it is raised when they
are over. A call that no signal ends (a disk that does not answer) is cut only by the end of this
process: for that, a thread does `if_stuck` a while later. Neighbour: `uninterrupted`.

Kernel: setitimer(2), signal(7).
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from ckpt.errors import UsageError
from ckpt.process.uninterrupted import alarms

_AGAIN_S = 0.02
"""An alarm that came at a bad moment comes again so soon."""
_LEAST_S = 0.001
"""An alarm after no time at all would be none."""

GRACE_S = 3.0
"""How long the way out may take, which takes milliseconds, before we call it stuck."""


class TimeIsUp(KeyboardInterrupt):
    """The time is over; treated as Ctrl-C is by all that it passes on its way out."""


class TimeLimit:
    """What `time_limit` lends."""

    def __init__(self) -> None:
        """Nothing rings yet."""
        self._is_over = False
        self._may_raise = True
        self._handled = sys.exception()
        self._n_exits = _count_exits(sys._getframe())
        self._ended = threading.Event()
        # Held by whoever has the last word: the work that is done, or the thread that ends us.
        self._last_word = threading.Lock()

    def settle(self) -> None:
        """Be done in time: from here on nothing is interrupted.

        Raises:
            TimeIsUp: it was over, and was told where nothing can be raised (in a finalizer).
        """
        self.end()
        if self._is_over:
            raise TimeIsUp

    def ring(self, _number: int, frame: FrameType | None) -> None:
        """Be the handler of the alarm."""
        self._is_over = True
        # On the way out, of a block or after an error, nothing is cut short.
        leaves = sys.exception() is not self._handled or _count_exits(frame) > self._n_exits
        if not self._may_raise:
            return
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S if leaves else 0)
        if not leaves:
            raise TimeIsUp

    def end(self) -> None:
        """Neither raise nor call anything stuck from here on."""
        self._may_raise = False
        with self._last_word:
            self._ended.set()

    def watch(self, for_s: float, if_stuck: Callable[[], None]) -> None:
        """Be a thread that does something if the end does not come."""
        if not self._ended.wait(for_s):
            with self._last_word:
                if not self._ended.is_set():
                    if_stuck()


def _count_exits(frame: FrameType | None) -> int:
    """Return how many blocks are being left."""
    n_exits = 0
    while frame is not None:
        n_exits += frame.f_code.co_name == "__exit__"
        frame = frame.f_back
    return n_exits


@contextlib.contextmanager
def time_limit(
    timeout_s: float | None, if_stuck: Callable[[], None] | None = None
) -> Iterator[TimeLimit]:
    """Raise `TimeIsUp` in the block when it takes longer; SIGALRM and its timer are ours meanwhile.

    Args:
        timeout_s: None: as long as it takes.
        if_stuck: called by another thread if we are still in the block `GRACE_S` later; it ends
            this process.

    Raises:
        UsageError: the time is none, or this is not the main thread, which alone gets signals.
    """
    limit = TimeLimit()
    if timeout_s is None:
        yield limit
        return
    if timeout_s <= 0:
        raise UsageError(f"a time limit of {timeout_s:g} s leaves no time at all")
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("a time limit is kept only in the main thread")
    with contextlib.ExitStack() as stack:
        if if_stuck is not None:
            watching = (timeout_s + GRACE_S, if_stuck)
            thread = threading.Thread(target=limit.watch, args=watching, daemon=True)
            thread.start()
            stack.callback(thread.join)
        alarms.add(signal.SIGALRM)
        stack.callback(alarms.discard, signal.SIGALRM)
        before = signal.signal(signal.SIGALRM, limit.ring)
        stack.callback(signal.signal, signal.SIGALRM, before or signal.SIG_DFL)
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        timer = signal.setitimer(signal.ITIMER_REAL, max(timeout_s, _LEAST_S))
        stack.callback(signal.setitimer, signal.ITIMER_REAL, *timer)
        stack.callback(limit.end)
        yield limit
