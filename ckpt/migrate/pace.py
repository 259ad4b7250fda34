"""How fast: a limit on what is sent, and what was measured of it.

Neighbours: `channel` counts and waits by it; the policy of the rounds reads it.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable

import attrs

from ckpt.errors import UsageError

MIN_BYTES_PER_S = 1 << 16
"""Slower than this, a peer that waits for a frame would take us for gone."""

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKMGT]?)(bit|b|B|)(?:/s|ps)?", re.ASCII)
_MULTIPLES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_rate(text: str) -> int:
    """Return the bytes per second of a `--bandwidth`: bits, as links are sold, unless it says B.

    `100M`, `100Mbit` and `100Mb/s` are 100,000,000 bits per second, `12.5MB` and `12.5MB/s` are the
    same in bytes.

    Raises:
        UsageError: it is no rate, or less than `MIN_BYTES_PER_S`.
    """
    found = _RATE.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{text!r} is no bandwidth: write 100M or 1G (bits), or 50MB (bytes)")
    number, multiple, unit = found.groups()
    rate = int(float(number) * _MULTIPLES[multiple] / (1 if unit == "B" else 8))
    if rate < MIN_BYTES_PER_S:
        raise UsageError(f"a bandwidth of {text} is too low: at least 525k")
    return rate


class Bandwidth:
    """A token bucket that any number of channels draw from; without a limit it costs nothing."""

    BURST_S = 0.01
    """What may go out at once after a pause, as time at the full rate."""

    def __init__(
        self,
        bytes_per_s: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Limit to `bytes_per_s`; None: no limit."""
        self.bytes_per_s = bytes_per_s
        """May be set at any time; None lifts the limit (for the last pages, say)."""
        self._clock = clock
        self._sleep = sleep
        self._turn = threading.Lock()
        self._free_at_s = clock()

    def wait_for(self, n_bytes: int) -> None:
        """Return when `n_bytes` more may be sent."""
        rate = self.bytes_per_s
        if rate is None:
            return
        with self._turn:
            now_s = self._clock()
            starts_s = max(self._free_at_s, now_s - self.BURST_S)
            self._free_at_s = starts_s + n_bytes / rate
            wait_s = starts_s - now_s
        if wait_s > 0:
            self._sleep(wait_s)


@attrs.define
class Traffic:
    """What went over a channel; written by it, read by anybody."""

    sent_bytes: int = 0
    received_bytes: int = 0
    sending_s: float = 0.0
    """Time spent in `send` of page frames, waiting for the bandwidth included."""
    send_rate: float | None = None
    """Bytes per second of the last page frames, smoothed; None while nobody knows.

    What the kernel buffers counts as sent, at most about half a MiB of it.
    """

    _SAMPLE_S = 0.02
    _WEIGHT = 0.3

    _sample_bytes: int = attrs.field(default=0, init=False, repr=False)
    _sample_s: float = attrs.field(default=0.0, init=False, repr=False)

    def count_frame(self, n_bytes: int, seconds: float) -> None:
        """Add a page frame that took `seconds` to send."""
        self.sending_s += seconds
        self._sample_bytes += n_bytes
        self._sample_s += seconds
        if self._sample_s < self._SAMPLE_S:
            return
        rate = self._sample_bytes / self._sample_s
        old = rate if self.send_rate is None else self.send_rate
        self.send_rate = old + self._WEIGHT * (rate - old)
        self._sample_bytes, self._sample_s = 0, 0.0


def add_up(traffics: Iterable[Traffic]) -> Traffic:
    """Return the sum of several channels that work at the same time."""
    total = Traffic()
    for one in traffics:
        total.sent_bytes += one.sent_bytes
        total.received_bytes += one.received_bytes
        total.sending_s += one.sending_s
        if one.send_rate is not None:
            total.send_rate = (total.send_rate or 0.0) + one.send_rate
    return total
