"""Where the numbers of a restored tree count: in our pid namespace, or in one of its own.

Neighbours: `restore` calls; `process/pid_space` and `process/init` have what a namespace is.
"""

import contextlib
from collections.abc import Iterator

import attrs

from ckpt.engine.records import TreeImage
from ckpt.process.init import Init, new_pid_space
from ckpt.process.pid_space import PidSpace
from ckpt.resources.base import RestoreOptions
from ckpt.resources.registry import has_own_numbers
from ckpt.units import Pid


@attrs.frozen(repr=False)
class Home:
    """The pid namespace of one restore."""

    root: Pid
    space: PidSpace | None = None
    """None: ours."""
    init: Init | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have what we fork in it, if it is there; see `PidSpace.entered`."""
        with self.space.entered() if self.space else contextlib.nullcontext():
            yield

    def settle(self) -> None:
        """Leave it to its own init; it ends with the tree's root from now on."""
        if self.init is not None:
            self.init.watch(self.root)


def wants_own_numbers(tree: TreeImage, options: RestoreOptions) -> bool:
    """Tell whether a tree is given a pid namespace: it had one, or the user wants it."""
    return options.new_pids or has_own_numbers(tree.root.resources)


@contextlib.contextmanager
def home_of(tree: TreeImage, options: RestoreOptions) -> Iterator[Home]:
    """Lend the namespace that a tree is restored in; a new one ends if the block fails.

    Raises:
        NotPermitted: we may not make one.
    """
    root = tree.root.pid
    if not wants_own_numbers(tree, options):
        yield Home(root)
        return
    with new_pid_space(root) as (space, init):
        yield Home(root, space, init)
