"""The vocabulary of numbers: what an integer means is in its type, not in its name alone.

Every layer uses these; nothing here knows about Linux or about images.
"""

from collections.abc import Iterable, Iterator
from typing import NewType, TypeVar

import attrs

Pid = NewType("Pid", int)
"""A thread group's id: the tid of its leader."""

Tid = NewType("Tid", int)
"""One thread's id."""

Fd = NewType("Fd", int)
"""A file descriptor number of *this* process."""

RemoteFd = NewType("RemoteFd", int)
"""A file descriptor number of the target."""

RemoteAddr = NewType("RemoteAddr", int)
"""An address in the target's address space."""

GenerationNo = NewType("GenerationNo", int)
"""The number of a generation within its chain; counts up from 0."""

T = TypeVar("T")


@attrs.frozen(order=True, slots=True)
class AddrRange:
    """A half-open range of the target's address space: `start <= address < end`, in bytes."""

    start: RemoteAddr
    end: RemoteAddr

    @property
    def len_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    def __contains__(self, addr: int) -> bool:
        """Tell whether `addr` lies inside."""
        return self.start <= addr < self.end

    def overlaps(self, other: "AddrRange") -> bool:
        """Tell whether the two share at least one byte."""
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        """Write it the way /proc/PID/maps does."""
        return f"{self.start:x}-{self.end:x}"


def addr_range(start: int, len_bytes: int) -> AddrRange:
    """Make the range of `len_bytes` bytes from `start` on."""
    return AddrRange(RemoteAddr(start), RemoteAddr(start + len_bytes))


def iter_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut `items` into lists of `size` (the last may be shorter), lazily."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
