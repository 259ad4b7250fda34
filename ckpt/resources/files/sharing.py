"""Which descriptors share one open file description: by dup in a process, by fork between some.

They share offset and status flags, and must do so after a restore. KCMP_FILE tells; it is asked
only within groups that agree in all that fdinfo says, so that a thousand descriptors do not cost a
million comparisons. Found while the target runs, confirmed in one burst when it is frozen: n - 1
comparisons between neighbours prove the order of n, thus who shares.

Kernel: kcmp(2).
"""

import os
import stat
from collections.abc import Mapping
from itertools import pairwise

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.kernel.procfs.fdinfo import parse_fdinfo
from ckpt.process.kcmp_order import CONFIRMED, order_key, split_equal
from ckpt.resources.files.open_file import OpenFile, Slot
from ckpt.resources.files.survey import Raw
from ckpt.units import Pid, RemoteFd


@attrs.frozen(slots=True, eq=False, repr=False)
class Seen:
    """One descriptor, as if nothing were shared."""

    raw: Raw
    file: OpenFile
    key: object
    """Equal for all descriptors that may share one description."""

    @property
    def is_socket(self) -> bool:
        """Tell whether it leads to a socket."""
        return stat.S_ISSOCK(self.raw.status.st_mode)


def see(pid: Pid, fd: RemoteFd, raw: Raw, before: Seen | None) -> Seen:
    """Parse what was read of a descriptor; `before` is what it was when it was looked at."""
    info = parse_fdinfo(raw.info.decode())
    named = (
        before is not None
        and before.raw.link == raw.link
        and os.path.samestat(before.raw.status, raw.status)
    )
    file = OpenFile(pid, (fd,), raw.link, raw.status, info, found_by_name=named)
    eventfd_id = info.eventfd.eventfd_id if info.eventfd else None
    return Seen(raw, file, (raw.link, file.flags, info.mnt_id, info.inode, eventfd_id))


class Sharing:
    """What was found of who shares what, and the calls that confirm it."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._known: dict[object, list[Slot]] = {}
        """Key -> its descriptors in the order of kcmp."""
        self._calls = Burst()
        """Compares each of these with the next one."""
        self._answers: list[int] = []
        self._noted: list[int] | None = None

    def learn(self, seen: Mapping[Slot, Seen]) -> None:
        """Find an order for all descriptors, and prepare to confirm it."""
        for key, slots in _group(seen).items():
            if len(slots) > 1 and not seen[slots[0]].is_socket:
                self._known[key] = sorted(slots, key=_BY_DESCRIPTION)
                for (pid1, fd1), (pid2, fd2) in pairwise(self._known[key]):
                    self._calls.add(NR.kcmp, pid1, pid2, KcmpType.FILE, fd1, fd2)

    def confirm(self) -> None:
        """Ask whether the order still holds."""
        self._answers = list(self._calls.run())

    def note(self) -> None:
        """Note the answers, for `is_as_noted`."""
        self._noted = self._answers if CONFIRMED.issuperset(self._answers) else None

    def is_as_noted(self) -> bool:
        """Tell whether the same are shared, if the same descriptors are as they were."""
        return self._answers == self._noted

    def partition(self, seen: Mapping[Slot, Seen]) -> list[list[Slot]]:
        """Return the descriptors of each description, in the order of `seen`; so are the lists."""
        answers = iter(self._answers)
        confirmed = {key: [next(answers) for _ in slots[1:]] for key, slots in self._known.items()}
        place = {slot: index for index, slot in enumerate(seen)}
        parts: list[list[Slot]] = []
        for key, slots in _group(seen).items():
            if len(slots) == 1 or seen[slots[0]].is_socket:
                # A socket cannot be opened a second time: one inode is one description.
                parts.append(slots)
                continue
            ordered, order = self._known.get(key, []), confirmed.get(key, [])
            if set(ordered) != set(slots) or not CONFIRMED.issuperset(order):
                ordered = sorted(slots, key=_BY_DESCRIPTION)
                order = [_compare(*pair) for pair in pairwise(ordered)]
            parts += (sorted(part, key=place.__getitem__) for part in split_equal(ordered, order))
        return sorted(parts, key=lambda part: place[part[0]])


def _group(seen: Mapping[Slot, Seen]) -> dict[object, list[Slot]]:
    groups: dict[object, list[Slot]] = {}
    for slot, one in seen.items():
        groups.setdefault(one.key, []).append(slot)
    return groups


def _compare(one: Slot, other: Slot) -> Ordering:
    try:
        return kcmp(one[0], other[0], KcmpType.FILE, one[1], other[1])
    except OSError:
        # One was closed meanwhile: the process runs, and its end will not be asked of this look.
        return Ordering.DIFFERENT


_BY_DESCRIPTION = order_key(_compare)
