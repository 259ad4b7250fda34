"""The token that pairs two hosts: one line with a secret and the receiver's fingerprint."""

from typing import Self

import attrs


@attrs.frozen
class Token:
    """What `ckpt receive` prints and `ckpt migrate` is given."""

    secret: bytes = attrs.field(repr=False)
    fingerprint: bytes
    """SHA-256 of the receiver's certificate (DER)."""

    def __str__(self) -> str:
        """Write it as one line, secret included."""
        raise NotImplementedError

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read that line; UsageError if it is none."""
        raise NotImplementedError


def write_token(token: Token, path: str) -> None:
    """Write the line into a new file of mode 0600 that takes the place of `path`."""
    raise NotImplementedError


def read_token(path: str) -> Token:
    """Read a file that `write_token` made; UsageError if others may read it too."""
    raise NotImplementedError
