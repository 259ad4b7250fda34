"""The processes that are checkpointed, and the board over which they are spoken with.

A board is a page of the process at a fixed address (programs/beat.h): it is read and written from
outside, so the process has no pipe to the bench, and stays in reach when any tool brings it back.
"""

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from integration.apps.resp import Redis
from integration.bench.build import build

_BOARD = 0x100000000000
_FIELDS = (
    *("n_beats", "longest", "longest_from", "n_written", "rate", "spins", "command", "argument"),
    *("asked", "answered", "answer", "area", "n_pages"),
)
_CHECK, _SCATTERED, _CLUSTERED = 1, 2, 3
_LOST_S = 120.0  # only a hang reaches it
_LOOK_S = 0.002
_libc = ctypes.CDLL(None, use_errno=True)


class Gone(Exception):
    """The process is not there (any more), or has no board."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len_bytes", ctypes.c_size_t))


class Board:
    """The board of the process `pid`, which need not be a child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def read(self, name: str) -> int:
        return self._read_all()[name]

    def write(self, name: str, value: int) -> None:
        raw = ctypes.create_string_buffer(struct.pack("q", value), 8)
        self._move(_libc.process_vm_writev, raw, 8, _FIELDS.index(name) * 8)

    def _read_all(self) -> dict[str, int]:
        raw = ctypes.create_string_buffer(len(_FIELDS) * 8)
        self._move(_libc.process_vm_readv, raw, len(raw), 0)
        return dict(zip(_FIELDS, struct.unpack(f"{len(_FIELDS)}q", raw), strict=True))

    def _move(self, call: Callable[..., int], raw: object, n_bytes: int, at: int) -> None:
        here = _Iovec(ctypes.cast(raw, ctypes.c_void_p), n_bytes)  # type: ignore[arg-type]
        there = _Iovec(_BOARD + at, n_bytes)
        if call(self.pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) != n_bytes:
            raise Gone(f"process {self.pid}: {os.strerror(ctypes.get_errno())}")

    def reset(self) -> None:
        """Forget the longest gap."""
        self.write("longest", 0)

    def gap_ms(self) -> float:
        """Return the longest gap since the last `reset`."""
        self.wait_beats(2)  # the one that is not over yet counts too
        return self.read("longest") / 1e6

    def gap_end_ns(self) -> int:
        """Return when the longest gap since the last `reset` was over (CLOCK_REALTIME)."""
        found = self._read_all()
        return found["longest_from"] + found["longest"]

    def wait_beats(self, n: int) -> None:
        """Wait until it has beaten so often.

        Raises:
            TimeoutError: it did not.
            Gone: it has ended.
        """
        start = self.read("n_beats")
        self._wait(lambda: self.read("n_beats") >= start + n)

    def ask(self, command: int, argument: int = 0) -> int:
        """Let it do something, and return its answer."""
        self.write("command", command)
        self.write("argument", argument)
        ticket = self.read("asked") + 1
        self.write("asked", ticket)
        self._wait(lambda: self.read("answered") == ticket)
        return self.read("answer")

    def _wait(self, done: Callable[[], bool]) -> None:
        give_up = time.monotonic() + _LOST_S
        while not done():
            if time.monotonic() > give_up:
                raise TimeoutError(f"process {self.pid} is alive and does nothing")
            self.pass_time(_LOOK_S)

    def pass_time(self, seconds: float) -> None:
        """Let time pass in which it runs.

        Raises:
            Gone: it has ended meanwhile.
        """
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError as exc:
            raise Gone(f"process {self.pid} has ended") from exc
        try:
            if select.select([pidfd], [], [], seconds)[0]:
                raise Gone(f"process {self.pid} has ended")
        finally:
            os.close(pidfd)

    def check(self) -> None:
        """Let it look at all of its memory.

        Raises:
            RuntimeError: there is something wrong with it.
        """
        if n_wrong := self.ask(_CHECK):
            raise RuntimeError(f"{n_wrong} pages of process {self.pid} are not what they were")

    def write_pages(self, n: int, *, clustered: bool) -> None:
        """Let it write so many pages anew."""
        self.ask(_CLUSTERED if clustered else _SCATTERED, n)


class Process:
    """A process with a board, in whichever incarnation; ended and reaped at the end of a `with`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.board = Board(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kill it and its children, and wait until their pids are free.

        The caller must be its parent, and a subreaper. It leads a group, which nobody has left.
        """
        give_up = time.monotonic() + _LOST_S
        while time.monotonic() < give_up:
            try:
                while os.waitpid(-self.pid, os.WNOHANG)[0]:
                    pass
                os.killpg(self.pid, signal.SIGKILL)
            except ChildProcessError:
                return  # all reaped: the number may be another's by now
            select.select([], [], [], _LOOK_S)
        raise TimeoutError(f"process {self.pid} does not end")


def start_target(cwd: Path, **options: int | str) -> Process:
    """Start programs/target.c with `--name value` of each option, and return when it is ready."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    child = subprocess.Popen(
        [build("target"), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=cwd,
        start_new_session=True,
    )
    assert child.stdout is not None
    with child.stdout as said:
        line = said.readline()
    process = Process(child.pid)
    child.returncode = 0  # reaped by `Process.end`
    if line != b"ready\n":
        process.end()
        raise RuntimeError(f"the target said {line!r} instead of ready")
    return process


def start_redis(cwd: Path, n_keys: int) -> Process:
    """Start a redis-server that has so many keys of 64 bytes, no client, and does not listen.

    CRIU up to 4.2 cannot dump a TCP socket under Linux 6.16 and newer, which refuse SO_PASSCRED
    for it; so that both can be measured, the port is closed when the keys are there.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = f"--port {port} --daemonize no --bind 127.0.0.1 --enable-debug-command local --save"
    child = subprocess.Popen(
        ["redis-server", *options.split(), ""],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=cwd,
        start_new_session=True,
        env=os.environ | {"LD_PRELOAD": str(build("preload", shared=True))},
    )
    process = Process(child.pid)
    child.returncode = 0
    try:
        with _connect(process, port) as client:
            client.ask("DEBUG", "POPULATE", str(n_keys), "key", "64")
            assert client.ask("DBSIZE") == n_keys
            assert client.ask("CONFIG", "SET", "port", "0") == "OK"
    except BaseException:
        process.end()
        raise
    return process


def _connect(process: Process, port: int) -> Redis:
    give_up = time.monotonic() + _LOST_S
    while time.monotonic() < give_up:
        with contextlib.suppress(ConnectionRefusedError):
            return Redis(port)
        with contextlib.suppress(Gone):  # no board yet
            process.board.read("n_beats")
        select.select([], [], [], _LOOK_S)
    raise TimeoutError("redis-server does not listen")
