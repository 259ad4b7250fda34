"""The token that pairs two hosts: one line with a secret and the receiver's fingerprint.

Whoever has the line can send a tree to that receiver, which runs it as root: it is a key, and is
kept like one. It is good for as long as that `ckpt receive` runs. Neighbours: `tls` pins the
fingerprint, `handshake` proves the secret without showing it.
"""

import base64
import contextlib
import os
import re
import secrets
import stat
from typing import Self

import attrs

from ckpt.errors import UsageError

SECRET_BYTES = 32
FINGERPRINT_BYTES = 32

_LINE = re.compile(r"ckpt1\.([\w-]{43})\.([\w-]{43})", re.ASCII)
_MAX_FILE_BYTES = 1024


@attrs.frozen
class Token:
    """What `ckpt receive` prints and `ckpt migrate` is given."""

    secret: bytes = attrs.field(repr=False)
    fingerprint: bytes
    """SHA-256 of the receiver's certificate (DER)."""

    @classmethod
    def make(cls, fingerprint: bytes) -> Self:
        """Return a token with a new secret."""
        return cls(secrets.token_bytes(SECRET_BYTES), fingerprint)

    def line(self) -> str:
        """Return it as one line, secret included (`str` and `repr` do not show that)."""
        return f"ckpt1.{_encode(self.secret)}.{_encode(self.fingerprint)}"

    @classmethod
    def parse(cls, line: str) -> Self:
        """Read what `line` returned; space around it does not matter.

        Raises:
            UsageError: it is something else. The sentence does not repeat it.
        """
        found = _LINE.fullmatch(line.strip())
        if not found:
            raise UsageError(
                "this is no token of 'ckpt receive': it is one line, ckpt1.SECRET.PRINT"
            )
        secret, fingerprint = map(_decode, found.groups())
        return cls(secret, fingerprint)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=")


def write_token(token: Token, path: str) -> None:
    """Write the line into a new file of mode 0600 that takes the place of `path`.

    Raises:
        UsageError: that cannot be done, or `path` is there and no regular file.
    """
    try:
        _require_replaceable(path)
        scratch = f"{path}.{secrets.token_hex(4)}"
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w") as file:
                os.fchmod(fd, 0o600)
                file.write(token.line() + "\n")
            os.rename(scratch, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise
    except OSError as error:
        raise UsageError(f"cannot write the token to {path}: {error.strerror}") from error


def _require_replaceable(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UsageError(f"cannot write the token to {path}: it is no regular file")


def read_token(path: str) -> Token:
    """Read a file that `write_token` made.

    Raises:
        UsageError: it cannot be read, holds no token, or others than its owner may read it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode) and mode & 0o077:
                raise UsageError(f"others may read the token in {path}: chmod 600 {path}")
            data = file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise UsageError(f"cannot read the token in {path}: {error.strerror}") from error
    return Token.parse(data.decode("ascii", errors="replace"))
