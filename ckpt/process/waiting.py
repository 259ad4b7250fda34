"""Waiting for many threads that run code of ours, all at the same time.

Not in the kernel: if a whole process is killed, the end of its first thread is told only after ours
of all others is seen (`Task.wait_for` says the same of one).
"""

import os
import time
from collections.abc import Collection, Iterable

from ckpt.kernel.ptrace_burst import StopBurst
from ckpt.process.tree import has_ended
from ckpt.units import Pid, Tid

_SPIN_S = 0.0005
_DOUBT_S = 0.002
_NAP_S = 0.00005


class Waiting:
    """Hears of stops, and of ends."""

    def __init__(self, tids: Iterable[Tid]) -> None:
        """Take those that will be waited for."""
        self._stops = StopBurst(tids)

    def wait(self, running: Collection[Tid]) -> dict[Tid, int | None]:
        """Wait until some of these have stopped, or ended: one at least.

        Shape:  by thread, the status word of its stop (`ptrace.parse_wait_status`); None: it has
                ended.
        """
        asked_at_s = time.monotonic()
        while True:
            stopped = self._stops.take()
            if stopped:
                return {tid: stopped[tid] for tid in stopped if tid in running}
            waited_s = time.monotonic() - asked_at_s
            if waited_s < _SPIN_S:
                os.sched_yield()
                continue
            if waited_s > _DOUBT_S:
                ended = [tid for tid in running if has_ended(Pid(tid))]
                if ended:
                    return dict.fromkeys(ended)
                asked_at_s = time.monotonic() - _SPIN_S
            # We may go before the very threads that we wait for (`urgent`).
            time.sleep(_NAP_S)
