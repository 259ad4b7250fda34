"""One session of a receiver: its first channel, and those that the same sender opens later."""

import enum

import attrs

from ckpt.migrate.channel import Channel


class Purpose(enum.StrEnum):
    """What a connection is for, said in its first word."""

    BEGIN = "begin"
    """A new session."""
    STREAM = "stream"
    """A further stream of a session that is under way."""
    RESUME = "resume"
    """Its first channel again, after a cut."""


@attrs.frozen
class Joined:
    """A further connection of a session, proved to be of the same sender."""

    purpose: Purpose
    channel: Channel


class Session:
    """What a handler of `listen` is given, in a process of its own."""

    session_id: bytes
    channel: Channel

    def accept(self, timeout_s: float) -> Joined | None:
        """Return the next connection that joined this session; None if none came in time."""
        raise NotImplementedError

    def fileno(self) -> int:
        """Return the descriptor that is readable when `accept` has something (to poll)."""
        raise NotImplementedError
