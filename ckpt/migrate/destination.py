"""Where to: `HOST:PORT`, or `ssh://user@host`, as a user writes it. Pure."""

import re
from typing import Self

import attrs

from ckpt.errors import UsageError

_SSH = re.compile(
    r"ssh://(?:([^@/\s]+)@)?(\[[0-9A-Fa-f:.%\w]+\]|[^@:/\[\]\s]+)(?::([0-9]{1,5}))?/?"
)
_TCP = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^@:/\[\]\s]*):([0-9]{1,5})")


@attrs.frozen
class Address:
    """A host (name or number, IPv6 without brackets) and a TCP port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `HOST:PORT`, `[::1]:PORT`; `:PORT` and `*:PORT` are all addresses, to listen on.

        Raises:
            UsageError: it is something else.
        """
        found = _TCP.fullmatch(text)
        if not found or int(found[2]) > 0xFFFF:
            raise UsageError(f"{text!r} is no HOST:PORT (an IPv6 address goes into brackets)")
        host = found[1].strip("[]")
        return cls("" if host == "*" else host, int(found[2]))

    def __str__(self) -> str:
        """Write it the way `parse` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@attrs.frozen
class SshTarget:
    """Where ssh goes."""

    user: str | None
    host: str
    port: int | None

    def __str__(self) -> str:
        """Write it the way `parse_destination` reads it."""
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{user}{host}" + (f":{self.port}" if self.port else "")


Destination = Address | SshTarget


def parse_destination(text: str) -> Destination:
    """Read what `--to` was given.

    Raises:
        UsageError: it is neither `HOST:PORT` nor `ssh://[user@]host[:port]`.
    """
    if not text.startswith("ssh://"):
        address = Address.parse(text)
        if not address.host or not address.port:
            raise UsageError(f"{text!r} names no host and port to connect to")
        return address
    found = _SSH.fullmatch(text)
    # ssh would take a host or user that begins with a dash for an option.
    if not found or any(part and part.startswith("-") for part in found.groups()):
        raise UsageError(f"{text!r} is no ssh://[USER@]HOST[:PORT]")
    port = int(found[3]) if found[3] else None
    if port is not None and not 0 < port <= 0xFFFF:
        raise UsageError(f"{text!r} has a port that cannot be")
    return SshTarget(user=found[1], host=found[2].strip("[]"), port=port)
