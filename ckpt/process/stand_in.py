"""A short-lived fork of ours that does one thing under another pid, user and root directory.

The kernel notes in some objects who made them: SO_PEERCRED of a unix socket names the process that
called connect(2), listen(2) or socketpair(2). Who restores such an object has to be that process
for a moment. The stand-in shares our descriptors, so what it opens stays open here.

Kernel: clone3(2) with set_tid (5.5), capabilities(7) SECBIT_NO_SETUID_FIXUP: it keeps its
privileges whoever it is.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.clone3 import CloneFlag, pack_clone_args, pack_set_tid
from ckpt.kernel.libc import readable_address, syscall
from ckpt.kernel.prctl import Prctl
from ckpt.units import Pid, RemoteAddr, Tid

_NO_SETUID_FIXUP = 1 << 2
_NO_ERRNO = 255

# A PyDLL keeps the interpreter lock, so that the child has it too.
_raw_syscall = ctypes.PyDLL(None, use_errno=True).syscall
_raw_syscall.restype = ctypes.c_long
_raw_syscall.argtypes = [ctypes.c_long] * 3


@attrs.frozen(slots=True)
class Identity:
    """Who does something, as the kernel notes it; user and group are the effective ones."""

    pid: int
    """As we see it; of one that is not there any more, too."""
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    """The supplementary ones."""

    def __attrs_post_init__(self) -> None:
        """Refuse numbers that nobody can have."""
        ids = (self.uid, self.gid, *self.groups)
        if not 0 <= self.pid < 1 << 31 or not 0 <= min(ids) <= max(ids) < 1 << 32:
            raise ValueError(f"no process can be {self.pid} of {self.uid}:{self.gid}")

    @property
    def is_known(self) -> bool:
        """Tell whether the kernel noted anybody."""
        return self.pid > 0


def act(
    do: Callable[[], object], who: Identity | None = None, *, root: str = "", cwd: str = ""
) -> None:
    """Let a stand-in do something, and wait until it has.

    State: no other thread of ours runs (nobody would be there to give back its locks).

    Args:
        do: what it does; what it opens it leaves open here, what it returns is lost.
        who: as whom; where that pid is taken or must not be chosen, another one is used.
        root: its root directory, unless empty.
        cwd: its working directory, within that root; as ours if empty, where root is, too.

    Raises:
        OSError: with the errno of what `do` raised.
    """
    pid = _fork(who.pid if who and who.is_known else 0)
    if pid == 0:
        _be_stand_in(do, who, root, cwd)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        errno = code if 0 < code < _NO_ERRNO else 0
        raise OSError(errno, os.strerror(errno) if errno else "a forked process of ours failed")


def _fork(pid: int) -> Pid:
    """Fork with shared descriptors and this pid, if it can be had; return 0 in the child."""
    ctypes.pythonapi.PyOS_BeforeFork()
    made = _clone(pid) if pid else -1
    if made < 0:
        made = _clone(0)
    number = ctypes.get_errno()
    if made == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return Pid(0)
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if made < 0:
        raise OSError(number, os.strerror(number))
    return Pid(made)


def _clone(pid: int) -> int:
    tids = pack_set_tid([Tid(pid)])
    where, _ = readable_address(tids)
    args = pack_clone_args(
        flags=CloneFlag.FILES,
        exit_signal=signal.SIGCHLD,
        set_tid=RemoteAddr(where if pid else 0),
        n_set_tid=1 if pid else 0,
    )
    address, size = readable_address(args)
    made: int = _raw_syscall(NR.clone3, address, size)
    return made


def _be_stand_in(do: Callable[[], object], who: Identity | None, root: str, cwd: str) -> None:
    code = _NO_ERRNO
    try:
        if root:
            os.chroot(root)
            os.chdir("/")
        if cwd:
            os.chdir(cwd)
        if who:
            _become(who)
        do()
        code = 0
    except OSError as error:
        code = error.errno or _NO_ERRNO
    finally:
        os._exit(code)


def _become(who: Identity) -> None:
    with contextlib.suppress(OSError):
        syscall(NR.prctl, Prctl.SET_SECUREBITS, _NO_SETUID_FIXUP)
    os.setgroups(who.groups)
    os.setresgid(who.gid, who.gid, who.gid)
    os.setresuid(who.uid, who.uid, who.uid)
