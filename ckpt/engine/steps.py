"""Tells what a dump, a restore or a migration does, and how long each step took.

By the standard library's logger `ckpt`, at level INFO; every record has `step`, `ms` and `facts`.
Nothing is told while a tree stands still: who reads our log may be a process of that tree, and we
would wait for it forever.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

LOGGER = "ckpt"
_LOG = logging.getLogger(LOGGER)


class Steps:
    """The steps of one command; each takes from the end of the one before."""

    def __init__(self, of: str) -> None:
        """Begin now; `of` is what is done: dump, restore, migrate."""
        self._of = of
        self._since_s = time.monotonic()
        self._held: list[logging.LogRecord] | None = None

    def done(self, step: str, **facts: object) -> None:
        """Tell that a step is over, and what came of it."""
        now_s = time.monotonic()
        ms, self._since_s = (now_s - self._since_s) * 1000, now_s
        if not _LOG.isEnabledFor(logging.INFO):
            return
        words = "".join(f" {name}={value}" for name, value in facts.items() if value or value == 0)
        record = _LOG.makeRecord(
            LOGGER,
            logging.INFO,
            __file__,
            0,
            "%s: %s took %.1f ms%s",
            (self._of, step, ms, words),
            None,
            extra={"command": self._of, "step": step, "ms": round(ms, 3), "facts": facts},
        )
        if self._held is None:
            _LOG.handle(record)
        else:
            self._held.append(record)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Tell nothing until the end of the block, or `release`: a tree is about to stand still."""
        self._held = []
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Tell what was held; all run again, or are gone. May be called at any time."""
        held, self._held = self._held or [], None
        for record in held:
            _LOG.handle(record)
