"""What a reader of images brings along, and whose images it takes.

A restore runs what the image holds, with the rights that the image says: whoever can write to the
image decides what that is. So a restore takes only what nobody but root and its own user could have
written. All is looked at where it is opened, by its descriptor: what was looked at is what is read.
Neighbours: `store` asks this of each file and directory, `chain` once of what lies above.
"""

import os
import stat
from pathlib import Path

import attrs

from ckpt.errors import ImageUntrusted
from ckpt.image.keys import PrivateKey

_REMEDY = "give --trust-image if you trust him"


@attrs.frozen
class Access:
    """How an image is read.

    Attributes:
        trusts_anybody: take images that somebody else owns or can write to.
        private: keys for what is encrypted.
    """

    trusts_anybody: bool = False
    private: tuple[PrivateKey, ...] = ()


ANYBODYS = Access(trusts_anybody=True)
"""For those who only look: nothing in an image is trusted by its reader, whoever wrote it."""


def require_trusted(status: os.stat_result, path: Path) -> None:
    """Take a file or a directory of an image, opened for reading, or refuse it.

    An access control list that lets somebody write shows in the bits of the group (acl(5)).

    Raises:
        ImageUntrusted: its owner is neither we nor root, or group or others may write to it.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise ImageUntrusted(
            str(path),
            f"it belongs to user {status.st_uid}, and a restore runs what its owner put there:"
            f" {_REMEDY}",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ImageUntrusted(
            str(path),
            f"others than its owner can write to it (mode {stat.S_IMODE(status.st_mode):04o}), and"
            " a restore runs what they put there: chmod go-w, or give --trust-image if nobody did",
        )


def require_trusted_way(path: Path) -> None:
    """Look at the directories above an image: in none may anybody put another in its place.

    Owners and groups are not judged here: those of a home directory, say, are who they are.

    Raises:
        ImageUntrusted: everybody can write to one of them, and rename what others have in it (it is
            not sticky, as /tmp is).
    """
    for above in path.resolve().parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise ImageUntrusted(
                str(path),
                f"everybody can put another in its place (mode {stat.S_IMODE(mode):04o} of"
                f" {above}): chmod o-w {above}, or give --trust-image if nobody did",
            )
