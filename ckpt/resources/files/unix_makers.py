"""Makes unix sockets as whoever the kernel shall note as the one who made, listened or called.

Where nobody has that one's number, a stand-in of ours has it for a moment (`process/stand_in`). An
embryo that is there before its files (of a tree that is moved while it runs) has its own number:
then it does it itself, with descriptors that it takes from us, and forgets them again.

Kernel: unix(7), SO_PEERCRED; pidfd_getfd(2); capabilities(7), SECBIT_NO_SETUID_FIXUP.
"""

import contextlib
import os
import struct
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from _socket import socketpair
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from ckpt.kernel.arch import NR
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.prctl import Prctl
from ckpt.process.remote import Call, In, Out, call
from ckpt.process.seed import Embryo
from ckpt.process.stand_in import Identity, act
from ckpt.units import Pid

_AF_UNIX = 1
_PAIR = struct.Struct("=2i")
_NO_SETUID_FIXUP = 1 << 2
_STEP = "making unix sockets"


class Makers:
    """Knows who is there already."""

    def __init__(self, embryos: Mapping[Pid, Embryo]) -> None:
        """Take processes of the tree that have been made, by their numbers."""
        self._embryos = embryos

    def _of(self, who: Identity) -> Embryo | None:
        return self._embryos.get(Pid(who.pid))

    def make_pairs(self, kind: int, places: Sequence[tuple[Socket, Socket]], who: Identity) -> None:
        """Put the ends of new pairs in the place of other sockets.

        Raises:
            OSError, RestoreFailed: the kernel refused.
        """
        embryo = self._of(who)
        if embryo is None:
            _act(partial(_make_pairs, kind, places), who)
            return
        asked = [call(NR.socketpair, _AF_UNIX, kind | os.O_CLOEXEC, 0, Out(_PAIR.size))]
        with _being(embryo, who):
            replies = embryo.run_checked(_STEP, asked * len(places))
        made = [fd for reply in replies for fd in _PAIR.unpack(reply.outs[0])]
        pidfd = pidfd_open(embryo.pid)
        try:
            for fd, place in zip(made, (one for pair in places for one in pair), strict=True):
                ours = pidfd_getfd(pidfd, fd, pid=embryo.pid)
                os.dup2(ours, place.fileno(), inheritable=False)
                os.close(ours)
        finally:
            os.close(pidfd)
        embryo.run_checked(_STEP, [call(NR.close, fd) for fd in made])

    def listen(self, sock: Socket, backlog: int, who: Identity) -> None:
        """Have a socket listen.

        Raises:
            OSError, RestoreFailed: the kernel refused.
        """
        embryo = self._of(who)
        if embryo is None:
            _act(partial(sock.listen, backlog), who)
            return
        with _lent(embryo, [sock]) as (number,), _being(embryo, who):
            embryo.run_checked(_STEP, [call(NR.listen, number, backlog)])

    def connect(self, socks: Sequence[Socket], address: bytes, who: Identity) -> None:
        """Call an address of `unix_names.address_of` with each of some sockets.

        Raises:
            OSError, RestoreFailed: the kernel refused.
        """
        embryo = self._of(who)
        if embryo is None:
            _act(partial(_connect, socks, address), who)
            return
        # In our table of descriptors, not in its own.
        address = address.replace(b"/proc/self/", b"/proc/%d/" % os.getpid(), 1)
        raw = _AF_UNIX.to_bytes(2, "little") + address
        with _lent(embryo, socks) as numbers, _being(embryo, who):
            asked = [call(NR.connect, number, In(raw), len(raw)) for number in numbers]
            embryo.run_checked(_STEP, asked)


def _act(do: Callable[[], object], who: Identity) -> None:
    if who.is_known:
        act(do, who)
    else:
        do()


def _make_pairs(kind: int, places: Sequence[tuple[Socket, Socket]]) -> None:
    for pair in places:
        for made, place in zip(socketpair(_AF_UNIX, kind | os.O_CLOEXEC), pair, strict=True):
            os.dup2(made.fileno(), place.fileno(), inheritable=False)
            made.close()


def _connect(socks: Sequence[Socket], address: bytes) -> None:
    for sock in socks:
        sock.connect(address)


@contextlib.contextmanager
def _lent(embryo: Embryo, socks: Sequence[Socket]) -> Iterator[list[int]]:
    """Have an embryo know sockets of ours for the length of the block; yield its numbers."""
    (us,) = embryo.run_checked(_STEP, [call(NR.pidfd_open, os.getpid(), 0)])
    asked = [call(NR.pidfd_getfd, us.value, sock.fileno(), 0) for sock in socks]
    numbers = [reply.value for reply in embryo.run_checked(_STEP, asked)]
    yield numbers
    embryo.run_checked(_STEP, [call(NR.close, number) for number in [us.value, *numbers]])


@contextlib.contextmanager
def _being(embryo: Embryo, who: Identity) -> Iterator[None]:
    """Have an embryo, which is who we are, the user and groups of somebody for the block."""
    ours = Identity(who.pid, os.geteuid(), os.getegid(), tuple(os.getgroups()))
    if who == ours:
        yield
        return
    (before,) = embryo.run_checked(_STEP, [call(NR.prctl, Prctl.GET_SECUREBITS)])
    # Where that is locked, it loses what it needs, and the kernel says so.
    embryo.run([call(NR.prctl, Prctl.SET_SECUREBITS, before.value | _NO_SETUID_FIXUP)])
    embryo.run_checked(_STEP, _plan_becoming(who))
    yield
    embryo.run_checked(_STEP, _plan_becoming(ours))
    embryo.run([call(NR.prctl, Prctl.SET_SECUREBITS, before.value)])


def _plan_becoming(who: Identity) -> list[Call]:
    groups = struct.pack(f"={len(who.groups)}I", *who.groups)
    return [
        call(NR.setgroups, len(who.groups), In(groups) if groups else 0),
        call(NR.setresgid, who.gid, who.gid, who.gid),
        call(NR.setresuid, who.uid, who.uid, who.uid),
    ]
