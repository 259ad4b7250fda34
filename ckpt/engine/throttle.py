"""Slowing a tree that writes faster than its memory is sent: it is stopped shortly and often.

    stopped   ####      ####      ####          `share` of the time, counted from the first thread
    runs          ######    ######    ######    that stands to the last that runs again

A thread of ours does it while another copies, by the same freeze as everywhere: timeouts of
interrupted calls are mended, and whatever ends us lets the tree run. The copying must not need a
stop itself, for a process has one tracer; so it is done for the length of a round, not between.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final

from ckpt.errors import CkptError

PERIOD_S: Final = 0.04
"""A stop and the time until the next, if a stop takes no longer than it should."""
_AFTER_FAILURE_S = 0.1

Freeze = Callable[[], AbstractContextManager[object]]


@contextlib.contextmanager
def slowed(freeze: Freeze, share: float) -> Iterator[None]:
    """Have a tree stand still for a share of the time, for the length of the block.

    That it cannot be stopped just now (a thread in an uninterruptible wait) slows nobody, and is
    tried again; that it has ended, those will notice who copy it.

    Args:
        freeze: stops it; called in a thread of its own.
        share: from 0, which does nothing, to less than 1.
    """
    if not share:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_slow, args=(freeze, share, ended), name="throttle")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _slow(freeze: Freeze, share: float, ended: threading.Event) -> None:
    while not ended.is_set():
        began_s = time.monotonic()
        try:
            with freeze():
                ended.wait(began_s + PERIOD_S * share - time.monotonic())
        except CkptError:
            ended.wait(_AFTER_FAILURE_S)
            continue
        # Stops of a large tree take longer than they should: then it runs longer, too.
        stopped_s = time.monotonic() - began_s
        ended.wait(stopped_s * (1 - share) / share)
