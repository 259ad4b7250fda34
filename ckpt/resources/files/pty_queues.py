"""What waits in the queues of a pseudo-terminal, copied by taking it out and putting it back.

    slave's input queue     typed, not read: TIOCSTI puts it back, one byte after the other
    master's input queue    shown, not read: written to the slave again, without processing

No system call shows a queue without taking from it. So a child of ours does it, in a session of its
own: once it has begun, nothing that happens to us keeps it from putting back what it took. The
processes that use the terminal stand still meanwhile. Echo, signals and editing are off, so that
nothing happens to the bytes a second time; in canonical mode lines are lines again, and one that is
being typed can be edited further.

Kernel: ioctl_tty(2) TIOCSTI (needs CAP_SYS_ADMIN), drivers/tty/n_tty.c: an end of file (^D) is a
zero byte in the queue, so a zero that was typed in canonical mode comes back as an end of file.
"""

import contextlib
import os
import select
import struct
from collections.abc import Iterator

import attrs

from ckpt.kernel import tty
from ckpt.units import Fd

_FLAGS = struct.Struct("<4I")
"""The first words of `struct termios2`: input, output, control, local."""
_CC_AT, _N_CC = 17, 19
_VEOF, _VTIME, _VMIN, _VEOL, _VEOL2 = 4, 5, 6, 11, 16
_OPOST, _ISIG, _ICANON, _IEXTEN = 0o1, 0o1, 0o2, 0o100000
_ECHOES = 0o10 | 0o20 | 0o40 | 0o100 | 0o1000 | 0o2000 | 0o4000
_CHUNK = 65536
_FULL_MS = 1000
_LENGTHS = struct.Struct("<II")


@attrs.frozen(slots=True, repr=False)
class Queues:
    """What nobody has read yet."""

    typed: bytes
    """By whoever reads the slave."""
    shown: bytes
    """By whoever reads the master."""


def can_copy() -> bool:
    """Tell whether we may put bytes back into a queue."""
    try:
        master = Fd(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    try:
        tty.push_input(master, b"x")
    except OSError:
        return False
    finally:
        os.close(master)
    return True


def _is_canonical(settings: bytes) -> bool:
    return bool(_FLAGS.unpack_from(settings)[3] & _ICANON)


def _quiet(settings: bytes, *, canonical: bool, end_of_file: int = 0) -> bytes:
    """Return settings with which bytes pass as they are."""
    _, output, control, local = _FLAGS.unpack_from(settings)
    local &= ~(_ISIG | _ECHOES | (0 if canonical else _ICANON))
    quiet = bytearray(settings)
    _FLAGS.pack_into(quiet, 0, 0, output & ~_OPOST, control, local)
    characters = bytearray(_N_CC)
    if canonical:
        for index in (_VEOL, _VEOL2):
            characters[index] = settings[_CC_AT + index]
        characters[_VEOF] = end_of_file
    else:
        characters[_VMIN], characters[_VTIME] = 1, 0
    quiet[_CC_AT : _CC_AT + _N_CC] = characters
    return bytes(quiet)


def put(queues: Queues, master: Fd, peer: Fd, settings: bytes) -> None:
    """Put everything into the queues, which are empty, and give the pair its settings.

    Args:
        queues: what shall be there.
        master: the pair; not in packet mode.
        peer: its slave, opened without waiting.
        settings: what it has in the end.
    """
    canonical = _is_canonical(settings)
    typed, end = queues.typed, 0
    if canonical and b"\0" in typed:
        end = next(byte for byte in range(1, 256) if byte != _NEWLINE and byte not in typed)
        typed = typed.replace(b"\0", bytes([end]))
    tty.set_settings(master, _quiet(settings, canonical=canonical, end_of_file=end))
    try:
        for at in range(len(typed)):
            tty.push_input(peer, typed[at : at + 1])
        _write_all(peer, queues.shown)
    finally:
        tty.set_settings(master, settings)


_NEWLINE = 10


def _write_all(peer: Fd, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(peer, data) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(peer, select.POLLOUT)
            if not poll.poll(_FULL_MS):
                raise


def copy(master: Fd) -> Queues:
    """Return what waits in the queues of a pair whose users stand still; it stays there.

    State: the slave has been open. The master's end is read in packet mode too.

    Raises:
        OSError: we may not open or change the terminal; nothing is changed.
    """
    answers, answer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            queues = _take_and_put_back(master)
            lengths = _LENGTHS.pack(len(queues.typed), len(queues.shown))
            with open(answer, "wb") as file:
                file.write(lengths + queues.typed + queues.shown)
        finally:
            os._exit(0)
    os.close(answer)
    with open(answers, "rb") as file:
        told = file.read()
    os.waitpid(child, 0)
    if len(told) < _LENGTHS.size:
        raise OSError("the queues of a terminal cannot be copied")
    n_typed, _ = _LENGTHS.unpack_from(told)
    content = told[_LENGTHS.size :]
    return Queues(content[:n_typed], content[n_typed:])


def _take_and_put_back(master: Fd) -> Queues:
    settings = tty.get_settings(master)
    with _unlocked(master), _without_packets(master):
        peer = tty.open_peer(master, os.O_RDWR | os.O_NONBLOCK)
        tty.set_settings(master, _quiet(settings, canonical=False))
        typed, shown = b"", b""
        try:
            typed, shown = _read_all(peer), _read_all(master)
        finally:
            put(Queues(typed, shown), master, peer, settings)
            os.close(peer)
    return Queues(typed, shown)


@contextlib.contextmanager
def _unlocked(master: Fd) -> Iterator[None]:
    locked = tty.is_locked(master)
    if locked:
        tty.set_locked(master, locked=False)
    yield
    if locked:
        tty.set_locked(master, locked=True)


@contextlib.contextmanager
def _without_packets(master: Fd) -> Iterator[None]:
    packets = tty.is_in_packet_mode(master)
    if packets:
        tty.set_packet_mode(master, on=False)
    yield
    if packets:
        tty.set_packet_mode(master, on=True)


def _read_all(fd: Fd) -> bytes:
    """Read until nothing is left, whether or not reads of this description would wait."""
    parts: list[bytes] = []
    while tty.poll_now(fd) & select.POLLIN:
        part = os.read(fd, _CHUNK)
        if not part:
            break
        parts.append(part)
    return b"".join(parts)
