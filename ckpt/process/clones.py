"""Which processes share what only threads share as a rule: those made by clone(2) with a flag.

    process 7    descriptors A   directories A   memory A
    process 8    (of 7)          directories B   memory B        clone(CLONE_FILES)
    process 9    (of 7)          (of 8)          memory C        unshare, clone(CLONE_FS)

An object is the first process's that has it, in the order of the tree; the others have it of that
one. Found while the tree runs, by sorting; confirmed in one burst when it stands still: n - 1
comparisons between neighbours prove the order of n, and thus who shares.

Kernel: kcmp(2), clone(2).
"""

import bisect
import enum
from collections.abc import Sequence
from functools import partial
from itertools import islice, pairwise

import attrs

from ckpt.errors import TargetGone
from ckpt.kernel.arch import NR
from ckpt.kernel.burst import Burst
from ckpt.kernel.clone3 import CloneFlag
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.process.kcmp_order import CONFIRMED, order_key, split_equal
from ckpt.units import Pid


class Common(enum.Enum):
    """What processes may share. The values are the fields of `Shares`."""

    MEMORY = "memory"
    FILES = "files"
    DIRECTORIES = "directories"
    HANDLERS = "handlers"


_KINDS = {
    Common.MEMORY: KcmpType.VM,
    Common.FILES: KcmpType.FILES,
    Common.DIRECTORIES: KcmpType.FS,
    Common.HANDLERS: KcmpType.SIGHAND,
}
_FLAGS = {
    Common.MEMORY: CloneFlag.VM,
    Common.FILES: CloneFlag.FILES,
    Common.DIRECTORIES: CloneFlag.FS,
    Common.HANDLERS: CloneFlag.SIGHAND,
}


_NOBODY = Pid(0)


@attrs.frozen(slots=True)
class Shares:
    """Of which process one has an object; 0: it is its own."""

    memory: Pid = _NOBODY
    files: Pid = _NOBODY
    """The table of descriptors."""
    directories: Pid = _NOBODY
    """Working directory, root, file mode mask."""
    handlers: Pid = _NOBODY
    """What is done about signals; not those that are pending."""

    def of(self, common: Common | None) -> Pid:
        """Return of whom it has an object; 0: it is its own, or cannot be shared at all."""
        return _NOBODY if common is None else Pid(getattr(self, common.value))

    def items(self) -> list[tuple[Common, Pid]]:
        """Return what is not its own, and whose that is."""
        return [(common, self.of(common)) for common in Common if self.of(common)]

    def flags(self) -> CloneFlag:
        """Return with which flags such a process is made."""
        flags = CloneFlag(0)
        for common, _ in self.items():
            flags |= _FLAGS[common]
        return flags


OWN = Shares()
"""Of a process that shares nothing."""


class Clones:
    """Who shares what in a tree."""

    def __init__(self, pids: Sequence[Pid], before: "Clones | None" = None) -> None:
        """Find an order by each object, and lay out what confirms it.

        Args:
            pids: the processes, in the order of the tree; one that has ended shares nothing.
            before: an order of some of them, which only the others are put into.
        """
        self._pids = tuple(pids)
        there = set(pids)
        self._calls = Burst()
        self._orders: dict[Common, list[Pid]] = {}
        for common, kind in _KINDS.items():
            key = order_key(partial(_compare, kind))
            known = before._orders[common] if before else ()
            order = [pid for pid in known if pid in there]
            if order:
                for pid in there.difference(order):
                    bisect.insort(order, pid, key=key)
            else:
                order = sorted(pids, key=key)
            self._orders[common] = order
            for one, other in pairwise(order):
                self._calls.add(NR.kcmp, one, other, kind, 0, 0)

    def confirm(self, pids: Sequence[Pid]) -> dict[Pid, Shares]:
        """Return who has what of whom, as it is now; those that share nothing are left out.

        Args:
            pids: the processes there are now, in the order of the tree.
        """
        now = self if tuple(pids) == self._pids else Clones(pids, self)
        answers = now._calls.run()
        if not CONFIRMED.issuperset(answers):
            # The order was of other objects than they have now.
            now = Clones(pids)
            answers = now._calls.run()
        return now._shares(answers)

    def _shares(self, answers: Sequence[int]) -> dict[Pid, Shares]:
        place = {pid: index for index, pid in enumerate(self._pids)}
        of_whom: dict[Pid, dict[str, Pid]] = {}
        told = iter(answers)
        for common, order in self._orders.items():
            for part in split_equal(order, islice(told, max(0, len(order) - 1))):
                first, *others = sorted(part, key=place.__getitem__)
                for pid in others:
                    of_whom.setdefault(pid, {})[common.value] = first
        return {pid: Shares(**owners) for pid, owners in of_whom.items()}


def find_memory_owners(pids: Sequence[Pid]) -> dict[Pid, Pid]:
    """Return who of these has no memory of his own -> whose he has."""
    shares = Clones(pids).confirm(pids)
    return {pid: one.memory for pid, one in shares.items() if one.memory}


def _compare(kind: KcmpType, one: Pid, other: Pid) -> Ordering:
    try:
        return kcmp(one, other, kind)
    except (OSError, TargetGone):
        return Ordering.DIFFERENT
