"""Where the memory of an image lies now, in a process that runs and moves it; pure.

While a restored process is filled lazily it may give memory back, unmap and move it. The image
knows a page by the address that it had. `Places` follows what became of it:

    image        | a b c d e f |
    cut(c)       | a b . d e f |                  given back: reads as zero from now on
    move(d e)    | a b . . . f |   ...  | d e |   mremap
"""

from bisect import bisect_right, insort
from collections.abc import Iterable

from ckpt.units import AddrRange

_Part = tuple[int, int, int]
"""First byte, one past the last, and the address in the image of the first."""


class Places:
    """Parts of an address space whose content an image holds; disjoint, page aligned."""

    def __init__(self, spans: Iterable[AddrRange]) -> None:
        """Begin with every span where it was."""
        self._here: list[_Part] = sorted((span.start, span.end, span.start) for span in spans)
        self._origins: list[_Part] | None = None

    def copy(self) -> "Places":
        """Return an independent copy: what a forked child begins with."""
        copy = Places(())
        copy._here = list(self._here)
        return copy

    def origin_of(self, address: int) -> int | None:
        """Return where the image has what belongs at `address`; None: it is zero by now."""
        index = bisect_right(self._here, (address, 1 << 64, 0)) - 1
        if index < 0:
            return None
        start, end, origin = self._here[index]
        return origin + address - start if address < end else None

    def find(self, origin: int, len_bytes: int) -> tuple[int, int, int] | None:
        """Return where the first part of `origin`... is that still has a place.

        Returns:
            How many bytes before it have none, its address, its length; None if nothing has.
        """
        if self._origins is None:
            self._origins = sorted((o, o + end - start, start) for start, end, o in self._here)
        end = origin + len_bytes
        index = max(bisect_right(self._origins, (origin, 1 << 64, 0)) - 1, 0)
        while index < len(self._origins):
            first, last, address = self._origins[index]
            if first >= end:
                return None
            if last > origin:
                begin = max(first, origin)
                return begin - origin, address + begin - first, min(last, end) - begin
            index += 1
        return None

    def cut(self, start: int, end: int) -> None:
        """Forget what lies between: it was unmapped, or given back."""
        self._take(start, end)

    def move(self, start: int, to: int, len_bytes: int) -> None:
        """Follow an mremap; what lay at the new place is gone."""
        moved = self._take(start, start + len_bytes)
        self._take(to, to + len_bytes)
        for first, end, origin in moved:
            insort(self._here, (first - start + to, end - start + to, origin))

    def _take(self, start: int, end: int) -> list[_Part]:
        """Remove what lies between, and return it."""
        self._origins = None
        index = max(bisect_right(self._here, (start, 1 << 64, 0)) - 1, 0)
        taken: list[_Part] = []
        kept: list[_Part] = []
        stop = index
        for first, last, origin in self._here[index:]:
            if first >= end:
                break
            stop += 1
            begin, finish = max(first, start), min(last, end)
            if begin >= finish:
                kept.append((first, last, origin))
                continue
            taken.append((begin, finish, origin + begin - first))
            if first < begin:
                kept.append((first, begin, origin))
            if finish < last:
                kept.append((finish, last, origin + finish - first))
        self._here[index:stop] = kept
        return taken
