"""Where a tree is about to be built: its network is held, its addresses and files are there.

    with expecting(tree, features, contents, options) as site:
        site.open()         at the latest when it is built (`standing`); earlier, if nothing of its
                            files' content is still to come

Nothing of the tree is there yet. Neighbours: `preparing` has the steps of this.
"""

import contextlib
from collections.abc import Iterator

import attrs

from ckpt import fault
from ckpt.engine.content_files import Contents
from ckpt.engine.ground import Ground
from ckpt.engine.home import Home, home_of
from ckpt.engine.preparing import Files, arriving, check_host, opened
from ckpt.engine.records import TreeImage
from ckpt.kernel.features import Features
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.content import CONTENTS
from ckpt.resources.registry import entered


@attrs.define(repr=False)
class Site:
    """What a tree finds when it is built."""

    tree: TreeImage
    contents: Contents
    home: Home
    """Where its numbers count."""
    _opening: Opening
    _stack: contextlib.ExitStack
    _files: Files | None = None

    def open(self) -> Files:
        """Open what its processes inherit; at the first call.

        State:  the contents are filled, if they have any.

        Raises:
            RestoreFailed: something cannot be opened.
        """
        if self._files is None:
            with self.home.entered():
                self._files = self._stack.enter_context(opened(self.tree, self._opening))
        return self._files


def contents_of(tree: TreeImage) -> Contents:
    """Return the files that the image of a tree holds the content of, not made yet."""
    return Contents(
        [one for process in tree.processes for one in process.resources[CONTENTS.name].contents]
    )


@contextlib.contextmanager
def expecting(
    tree: TreeImage,
    features: Features,
    contents: Contents,
    options: RestoreOptions,
    ground: Ground | None = None,
) -> Iterator[Site]:
    """Make this host ready for a tree; undo that if the block fails.

    Whoever gives the ground has checked this host.

    Raises:
        PidTaken, HostMismatch, FileChanged, HookFailed: it cannot run here; nothing was made.
        NotPermitted, FeatureMissing: its network cannot be held, its namespaces not be made.
    """
    # What the root has of its own (host name, IPC, network) is made by us, and inherited.
    with contextlib.ExitStack() as stack:
        stack.enter_context(entered(tree.root.resources))
        opening = stack.enter_context(arriving(tree, options))
        fault.reach("restore-arrived")
        if ground is None:
            check_host(tree, features, options)
        else:
            opening.embryos = ground.nursery.embryos
        fault.reach("restore-checked")
        home = stack.enter_context(home_of(tree, options))
        yield Site(tree, contents, home, opening, stack)
