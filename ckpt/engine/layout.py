"""Where things go that must not be in the way: the arena's addresses, the inherited descriptors."""

import resource
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from ckpt.errors import HostFull
from ckpt.kernel.arch import x86_64 as arch
from ckpt.process.arena import ARENA_SIZE
from ckpt.resources.base import Opened
from ckpt.tracker.spans import Spans, join
from ckpt.units import AddrRange, Fd, RemoteFd, addr_range

K = TypeVar("K", bound=Hashable)

_LOWEST = 0x100000
"""Above the seed's own segment."""
SPARE_BYTES = 64 * arch.PAGE_SIZE
"""Behind the arena: where the kernel's own mappings wait while they change places."""


def choose_arena(taken: Spans) -> AddrRange:
    """Return addresses for the arena, with `SPARE_BYTES` behind it free too.

    Args:
        taken: what the image maps, ascending and disjoint. The embryo's own stack and vdso lie at
            the upper end of the address space, where this never looks.

    Raises:
        HostFull: the image leaves no hole.
    """
    at = _LOWEST
    need = ARENA_SIZE + SPARE_BYTES
    for start, end in join(taken):
        if start >= at + need:
            break
        at = max(at, end)
    if at + need > arch.USER_END // 2:
        raise HostFull("the image leaves no room in the lower half of its address space", "none")
    return addr_range(at, ARENA_SIZE)


def number_inherited(
    opened: Mapping[K, Opened], highest_fd: int
) -> tuple[dict[Fd, Fd], dict[K, RemoteFd]]:
    """Give each descriptor that the embryos inherit a number above those of the image.

    Returns:
        number there -> descriptor here, and key -> number there.

    Raises:
        HostFull: our limit of open files is too low.
    """
    first = max(highest_fd, 2) + 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Once for the embryo's numbers and once for the copies that spawn makes above them.
    need = first + 2 * len(opened) + 64
    if need > hard:
        raise HostFull(
            f"the restore needs {need} descriptors and the limit is {hard}",
            "raise the hard limit of open files (ulimit -Hn)",
        )
    if need > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    numbers = {key: first + index for index, key in enumerate(opened)}
    return (
        {Fd(number): opened[key].fd for key, number in numbers.items()},
        {key: RemoteFd(number) for key, number in numbers.items()},
    )


def spans_of(ranges: Iterable[AddrRange]) -> Spans:
    """Return ranges as spans."""
    return join((span.start, span.end) for span in ranges)
