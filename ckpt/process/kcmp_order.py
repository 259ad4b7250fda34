"""An order of things by the kernel's objects behind them: those that share one stand together.

Sorting is done while a target runs; n - 1 comparisons between neighbours prove later that the order
of n still holds, and thus who shares. Neighbours: `clones` orders processes, `sharing` (below
`resources/files/`) descriptors.

Kernel: kcmp(2).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ckpt.kernel.kcmp import Ordering

T = TypeVar("T")

CONFIRMED = frozenset({int(Ordering.EQUAL), int(Ordering.LESS)})
"""What comparisons between neighbours say where the order holds."""
_RANK = {Ordering.EQUAL: 0, Ordering.LESS: -1, Ordering.GREATER: 1, Ordering.DIFFERENT: 1}


def order_key(compare: Callable[[T, T], Ordering]) -> Callable[[T], Any]:
    """Return a key for sorting by what `compare` says of two."""
    return functools.cmp_to_key(lambda one, other: _RANK[compare(one, other)])


def split_equal(ordered: Sequence[T], answers: Iterable[int]) -> Iterator[list[T]]:
    """Cut an order where one is not equal to the next.

    Args:
        ordered: what was compared.
        answers: of each with the next one.
    """
    run = list(ordered[:1])
    for one, answer in zip(ordered[1:], answers, strict=True):
        if answer != Ordering.EQUAL:
            yield run
            run = []
        run.append(one)
    yield run
