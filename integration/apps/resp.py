"""A client of redis, as small as can be: RESP2 over one socket (redis.io, protocol specification).

with Redis(port) as client:
    client.ask("SET", "key", "value")
    client.ask_all([["GET", "key"], ["DBSIZE"]])
"""

import socket
from collections.abc import Iterable, Sequence
from typing import Self

ANSWER_S = 60.0
_PIPELINED = 1000

Answer = str | int | None | list["Answer"]


class RedisError(Exception):
    """What the server answered with a minus in front."""


class Redis:
    """One connection, given up by the server before `__exit__` returns: then none is open."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._socket = socket.create_connection((host, port), ANSWER_S)
        self._reader = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.ask("QUIT")
                rest = self._reader.read()
                assert rest == b"", f"the server said {rest!r} behind its last answer"
        finally:
            self._reader.close()
            self._socket.close()

    def ask(self, *words: str) -> Answer:
        """Send one command and return its answer."""
        self._socket.sendall(_encode(words))
        return self._read()

    def ask_all(self, commands: Iterable[Sequence[str]]) -> list[Answer]:
        """Send commands in bundles, one round trip for each bundle."""
        answers: list[Answer] = []
        bundle: list[bytes] = []
        for words in commands:
            bundle.append(_encode(words))
            if len(bundle) == _PIPELINED:
                answers += self._ask_bundle(bundle)
                bundle = []
        return answers + self._ask_bundle(bundle)

    def _ask_bundle(self, bundle: list[bytes]) -> list[Answer]:
        self._socket.sendall(b"".join(bundle))
        return [self._read() for _ in bundle]

    def _read(self) -> Answer:
        line = self._reader.readline()
        kind, rest = line[:1], line[1:-2].decode()
        if kind == b"+":
            return rest
        if kind == b"-":
            raise RedisError(rest)
        if kind == b":":
            return int(rest)
        if kind == b"*":
            return [self._read() for _ in range(int(rest))]
        if kind != b"$":
            raise EOFError(f"no answer but {line!r}")
        n_bytes = int(rest)
        return None if n_bytes < 0 else self._reader.read(n_bytes + 2)[:-2].decode()


def _encode(words: Sequence[str]) -> bytes:
    encoded = [word.encode() for word in words]
    parts = [b"*%d\r\n" % len(encoded)]
    parts += [b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded]
    return b"".join(parts)
