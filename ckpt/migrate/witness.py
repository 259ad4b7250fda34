"""The source's witness: a process that ends a hand-over if the source is killed in it.

It is forked before the tree stands still, and learns by a pipe that it is being doomed. If ckpt is
killed, a doomed tree dies with it; then the destination is told Go, for nobody else can say so. A
tree that lives on goes on here, what its departure has begun is undone, and the destination is told
Abort. No signal that a user sends to all of us ends it.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator

import attrs

from ckpt import fault
from ckpt.kernel.pidfd import pidfd_open
from ckpt.migrate.fates import Fates, Member, pack_members, unpack_members, wait_until_ended
from ckpt.units import Fd, Pid


@attrs.define(repr=False)
class Witness:
    """Our end of the pipe to it."""

    _fd: Fd

    def note_doom(self, pids: Iterable[Pid]) -> None:
        """Have it know which processes are being doomed."""
        packed = pack_members(map(Member.read, pids))
        # It may be the one that was killed.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._fd, len(packed).to_bytes(4, "little") + packed)

    def release(self) -> None:
        """Have it end: the destination knows all that it can be told."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._fd, bytes(4))


@contextlib.contextmanager
def attended(tell: Callable[[bool], None], let_go: Callable[[], None]) -> Iterator[Witness]:
    """Have a witness for the length of the block.

    Args:
        tell: called there, if we are killed in the block: tells the destination whether the tree
            lives on here. It may take as long as it wants.
        let_go: called there at once: closes what is ours alone, so that our end is noticed.
    """
    heard, said = os.pipe()
    ckpt = pidfd_open(Pid(os.getpid()))
    pid = os.fork()
    if pid == 0:
        os.close(said)
        with contextlib.suppress(BaseException):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            fault.forget()
            let_go()
            _attend(Fd(heard), ckpt, tell)
        os._exit(0)
    os.close(ckpt)
    os.close(heard)
    try:
        yield Witness(Fd(said))
    finally:
        # However the block ended, we are there to say what became of it.
        Witness(Fd(said)).release()
        os.close(said)
        os.waitpid(pid, 0)


def _attend(heard: Fd, ckpt: Fd, tell: Callable[[bool], None]) -> None:
    fates: Fates | None = None
    with open(heard, "rb", buffering=0) as pipe:
        while length := pipe.read(4):
            n_bytes = int.from_bytes(length, "little")
            if not n_bytes:
                return
            fates = Fates(unpack_members(_read(pipe.fileno(), n_bytes)))
    wait_until_ended(ckpt)
    tell(fates is None or fates.settle())


def _read(fd: int, n_bytes: int) -> bytes:
    raw = b""
    while len(raw) < n_bytes and (piece := os.read(fd, n_bytes - len(raw))):
        raw += piece
    return raw
