"""Bringing a job back from the newest generation that is whole.

A generation that is damaged, or hangs on one that is, is passed over aloud. Trouble of this host
(a file that is missing, a pid that is taken) is not: an older generation would have it too, or
would hide it. Nor is one that somebody else could have written, or that takes another key.
Neighbour: `supervising`.
"""

import time
from collections.abc import Callable
from pathlib import Path

import attrs

from ckpt.engine.records import decode_tree
from ckpt.engine.restore import RestoreResult, restore
from ckpt.errors import (
    ImageError,
    ImageSealed,
    ImageUntrusted,
    ImageUnusable,
    ImageVersion,
    PidTaken,
)
from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest
from ckpt.resources.base import Instead, RestoreOptions
from ckpt.resources.files.descriptions import FilesRecord
from ckpt.resources.files.open_file import STANDARD_STREAMS
from ckpt.resources.files.table import FILES
from ckpt.units import GenerationNo, Pid

_FREE_S = 2.0
"""How long the numbers of processes that were just killed may wait for their parents."""
_LOOK_S = 0.02


@attrs.frozen
class Revival:
    """How a job is brought back."""

    directory: Path
    first: GenerationNo
    """Older ones are of another job."""
    streams: tuple[str, str]
    """Where its standard output and error led when it was started."""
    moved: bool
    """Its numbers cannot be its own any more: it ran on another kernel, or before a reboot."""
    options: RestoreOptions
    """What the user has chosen."""
    access: Access
    """How the directory is read."""
    pass_over: Callable[[GenerationNo, ImageError], None]
    """Told of each generation that is not whole."""
    announce: Callable[[Pid], None]
    """Told who the root is, before it runs."""

    def revive(self) -> RestoreResult | None:
        """Bring it back; None if it has no generation.

        Raises:
            ImageUnusable: it has some, and none is whole.
            ImageVersion: the newest needs a newer ckpt.
            ImageSealed, ImageUntrusted: it takes another key, or others can write to it.
            RestoreError, HostError: this host cannot run it now.
        """
        chain = Chain.open(self.directory, self.access)
        numbers = [number for number in chain.generations() if number >= self.first]
        newest: ImageError | None = None
        for number in reversed(numbers):
            try:
                return self._restore(chain, number)
            except (ImageVersion, ImageSealed, ImageUntrusted):
                raise
            except ImageError as error:
                self.pass_over(number, error)
                newest = newest or error
        if newest is not None:
            raise ImageUnusable(
                str(self.directory),
                f"none of its {len(numbers)} generations can be used (--again starts the command"
                f" over); of the newest, {newest}",
            )
        return None

    def _restore(self, chain: Chain, number: GenerationNo) -> RestoreResult:
        ours = _own_streams(chain.manifest(number), self.streams)
        options = attrs.evolve(self.options, inherit={**ours, **self.options.inherit})
        until_s = time.monotonic() + _FREE_S
        while True:
            try:
                return self._restore_by(number, options)
            except PidTaken as error:
                if self.moved:
                    # Whoever has it is not of this job.
                    return self._restore_apart(number, options, error)
                if time.monotonic() > until_s:
                    raise
                time.sleep(_LOOK_S)

    def _restore_by(self, number: GenerationNo, options: RestoreOptions) -> RestoreResult:
        return restore(self.directory, number, options, access=self.access, announce=self.announce)

    def _restore_apart(
        self, number: GenerationNo, options: RestoreOptions, taken: PidTaken
    ) -> RestoreResult:
        options = attrs.evolve(options, new_pids=True)
        result = self._restore_by(number, options)
        warning = (
            f"pid {taken.pid} is taken here by {taken.holder}: it has a pid namespace of its own"
        )
        return attrs.evolve(result, warnings=(*result.warnings, warning))


def _own_streams(manifest: Manifest, streams: tuple[str, str]) -> dict[int, Instead]:
    """Return which of our standard streams the root gets where it has the file it was started with.

    A shell may have emptied that file for the very line that brings the job back; and where that
    says another one, it is meant. Terminals, pipes and sockets are ours in any case.
    """
    root = decode_tree(manifest, str(manifest.generation)).root
    places = dict(zip(STANDARD_STREAMS[1:], streams, strict=True))
    files: FilesRecord = root.resources[FILES.name]
    return {fd: fd for fd in files.leading_to(places)}
