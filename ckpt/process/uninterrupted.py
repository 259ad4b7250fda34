"""Steps that must be finished once begun: signals that would end this process wait until then.

While a target runs our code, or is half let go, an exception of ours (Ctrl-C) would leave it
astray, and unmapping an arena in which a thread still runs would kill it. These steps take
milliseconds. Against SIGKILL there is only what `arena.py` says.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
alarms: set[int] = set()
"""Signals that end us too, for as long as they are in here: see `time_limit`."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Hold back the signals by which a user ends us; after the block the first acts as ever.

    Lends the list of those that came, which may be emptied: they do nothing then.

    By handlers, not by a mask: a thread of ours without that mask would take the signal. Only the
    main thread may set handlers, and only it is interrupted by one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    came: list[int] = []
    # None: set by somebody who is not Python.
    held = [n for n in (*_SIGNALS, *alarms) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {n: signal.signal(n, lambda number, _frame: came.append(number)) for n in held}
    try:
        yield came
    finally:
        for held_back, handler in before.items():
            signal.signal(held_back, handler)
        for number in came[:1]:
            signal.raise_signal(number)
