"""How a command is protected by `ckpt run`, and whether what is stored can bring it back.

An encrypted directory grows without a private key, and gives nothing back without. So a command
may be started without one, aloud, if its key is to stay off this host; but nothing that still runs
is ended for a checkpoint that nobody here can open. Neighbours: `supervising`, `making_room`.
"""

from pathlib import Path

import attrs

from ckpt.engine.dump import DumpOptions
from ckpt.engine.job import Job
from ckpt.engine.making_room import Keeping
from ckpt.errors import ImageSealed, UsageError
from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.resources.base import RestoreOptions

DEFAULT_KEEP = 10


@attrs.frozen
class RunOptions:
    """How a command is protected."""

    every_s: float = 30.0
    keep_last: int | None = DEFAULT_KEEP
    """How many generations are kept; None: all."""
    checkpoint_on: frozenset[int] = frozenset()
    """Signals at which a checkpoint is taken at once."""
    restart_on_failure: bool = False
    again: bool = False
    """Start the command over, whatever is there of it."""
    dumping: DumpOptions = attrs.field(factory=DumpOptions)
    """How each checkpoint is taken, but for what differs from one to the next."""
    restoring: RestoreOptions = attrs.field(factory=RestoreOptions)
    """How it is brought back; its standard streams are seen to."""
    access: Access = attrs.field(factory=Access)
    """How the directory is read; with the private keys of `dumping`."""

    def can_open(self, chain: Chain) -> bool:
        """Tell whether what is in a chain, opened with `access`, can be read here."""
        # One of which no key opens it was refused when it was opened.
        return not chain.recipients or bool(self.access.private)

    def dump_options(self, *, kill: bool) -> DumpOptions:
        """Return how the next checkpoint is taken; with `kill` it is the last."""
        # Without a last one, all since the one before would be lost.
        timeout_s = None if kill else self.dumping.timeout_s
        return attrs.evolve(self.dumping, incremental=True, kill=kill, timeout_s=timeout_s)

    def keeping(self, chain: Chain) -> Keeping | None:
        """Return how room is made for the next one; None: not at all."""
        if self.keep_last is None:
            return None
        return Keeping(self.keep_last, self.dumping.access, merges=self.can_open(chain))


def open_chain(directory: str | Path, options: RunOptions) -> Chain:
    """Open the directory of a command, or begin it.

    Raises:
        UsageError: to restart the command takes a private key, and none was given.
        ImageError: see `Chain.create_or_open`; `ImageUntrusted` too, since it is to be restored.
    """
    if options.dumping.encrypt_to and not options.access.private:
        _require_no_restart(options)
    chain = Chain.create_or_open(directory, options.access, encrypt_to=options.dumping.encrypt_to)
    if not options.can_open(chain):
        _require_no_restart(options)
    return chain


def _require_no_restart(options: RunOptions) -> None:
    if options.restart_on_failure:
        raise UsageError(
            "--restart on-failure has to open checkpoints that are encrypted: give --identity with"
            " the file of the private key, too"
        )


def require_key(chain: Chain, options: RunOptions, job: Job, *, runs: bool) -> None:
    """Refuse to go on with a command of which no checkpoint can be opened, before it is touched.

    Raises:
        ImageSealed: there is no private key.
    """
    if options.can_open(chain):
        return
    left = f"the command still runs as process {job.pid}, and is left alone" if runs else ""
    raise ImageSealed(
        str(chain.path),
        "it is encrypted, and the command is to be brought back from it: give --identity with the"
        f" file of the private key{'; ' if left else ''}{left}",
    )


def describe_no_key(chain: Chain, options: RunOptions) -> str | None:
    """Return what a user must know who starts a command without the key of its checkpoints."""
    if options.can_open(chain):
        return None
    said = (
        f"checkpoints are encrypted to {', '.join(map(str, chain.recipients))}, and there is no"
        " --identity: to bring the command back, this line takes --identity FILE"
    )
    if options.keep_last is None:
        return said
    return f"{said}; every {options.keep_last}. checkpoint is full, since merging takes it, too"
