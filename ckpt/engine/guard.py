"""The two processes behind a lazy restore: the server of pages, and who stands behind it.

    ckpt restore --lazy ── fork ──> guard ── clone(CLONE_FILES) ──> server (`lazy.PageServer`)

The kernel gives zeros for missing pages once the last descriptor of a userfaultfd is closed. So
both share one table of descriptors: whatever happens to the server, at any instant, the guard holds
all that it held, those of forked children too. If the server ends before it is done, the guard
kills the restored process and its children, says so, and holds on until their memory is gone. If
the guard ends, the server goes on to the end by itself.
"""

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import attrs

from ckpt.engine.lazy import FEATURES, PageServer
from ckpt.engine.lazy_pages import LazyPages
from ckpt.errors import CkptError, RestoreFailed
from ckpt.kernel import userfaultfd
from ckpt.kernel.fork import fork_sharing_descriptors
from ckpt.kernel.libc import keep_freed_memory
from ckpt.kernel.pidfd import pidfd_send_signal
from ckpt.kernel.procfs import stat as procfs_stat
from ckpt.process.keeper import opened_pidfd
from ckpt.process.seed import Embryo
from ckpt.process.userfault import make_inside
from ckpt.units import AddrRange, Fd, Pid

GUARD_NAME, SERVER_NAME = b"ckpt-guard", b"ckpt-pages"
_REMEDY = "run ckpt as root, or restore without --lazy"
_STDERR = 2
_HOLD_S = 0.05


@attrs.frozen(repr=False)
class Lazy:
    """What is filled while the process runs, and from where."""

    pages: LazyPages
    spans: list[AddrRange]


@attrs.define(repr=False)
class Server:
    """The handle on the server: `start` lets it fill in the background; closing it ends it."""

    _go: Fd
    _started: bool = False

    def start(self) -> None:
        """Tell it that the process runs."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"g")

    def close(self) -> None:
        """Let go of it; if it was not started it ends."""
        os.close(self._go)


@contextlib.contextmanager
def watching(lazy: Lazy, embryo: Embryo) -> Iterator[Fd]:
    """Lend a userfaultfd that watches the lazy memory of the embryo.

    What is filled at once must be filled after this: a huge page would reach into lazy memory
    beside it, as long as the two are one mapping to the kernel.

    Raises:
        FeatureMissing: userfaultfd with faults of the kernel and events of changes.
        RestoreFailed: memory that cannot be watched.
    """
    fd = make_inside(
        embryo.pid,
        embryo.arena,
        embryo.leader,
        FEATURES,
        user_faults_only=False,
        remedy=_REMEDY,
    )
    try:
        _register(embryo.pid, fd, lazy.spans)
        yield fd
    finally:
        # Whoever serves it has it by now, and it ends with them.
        os.close(fd)


def start_server(lazy: Lazy, pid: Pid, fd: Fd) -> Server:
    """Start who serves the userfaultfd `fd` of process `pid`; faults are served from now on.

    Raises:
        RestoreFailed: the server did not start.
    """
    with opened_pidfd(pid) as target:
        go_read, go_write = os.pipe()
        ready_read, ready_write = os.pipe()
        if os.fork() == 0:
            _be_child(lambda: _guard(lazy, pid, fd, target, go_read, ready_write))
    os.close(go_read)
    os.close(ready_write)
    try:
        if not os.read(ready_read, 1):
            raise RestoreFailed("starting the server of pages", "it ended")
    except BaseException:
        os.close(go_write)
        raise
    finally:
        os.close(ready_read)
    return Server(Fd(go_write))


def _register(pid: Pid, fd: Fd, spans: list[AddrRange]) -> None:
    for span in spans:
        try:
            userfaultfd.register(fd, span, userfaultfd.UFFDIO_REGISTER_MODE_MISSING, pid=pid)
        except OSError as error:
            raise RestoreFailed("watching memory", f"{span}: {error}") from error


def _be_child(body: Callable[[], int]) -> NoReturn:
    """Run `body` in a forked child and end with the status that it returns, whatever happens."""
    status = 1
    try:
        status = body()
    except BaseException:
        # A bug of ours; nobody above us would show it.
        traceback.print_exc()
    finally:
        # Nothing of the parent's own ending (handlers, buffers) may run here too.
        os._exit(status)


def _guard(lazy: Lazy, pid: Pid, fd: Fd, target: Fd, go: int, ready: int) -> int:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    _close_all_but({_STDERR, fd, target, go, ready, *lazy.pages.descriptors})
    made = fork_sharing_descriptors()
    if made == 0:
        _name(SERVER_NAME)
        _be_child(lambda: _serve(lazy, pid, fd, Fd(go), ready))
    _name(GUARD_NAME)
    _, status = os.waitpid(made, 0)
    if status == 0:
        return 0
    held = _list_userfaultfds()
    if any(map(userfaultfd.has_memory, held)):
        with contextlib.suppress(CkptError):
            # Stopped first, so that its children can be counted.
            pidfd_send_signal(target, signal.SIGSTOP, pid=pid)
            _kill([*_iter_descendants(pid)])
            pidfd_send_signal(target, signal.SIGKILL, pid=pid)
        _say(
            f"process {pid} was killed: the server of its pages ended before all were there."
            f" {lazy.pages.remedy}"
        )
    # Nobody may ever read zeros from it; of children that outlived the process we know no more.
    while any(map(userfaultfd.has_memory, held)):
        time.sleep(_HOLD_S)
    return 1


def _name(name: bytes) -> None:
    with contextlib.suppress(OSError), open("/proc/self/comm", "wb", buffering=0) as comm:
        comm.write(name)


def _close_all_but(kept: set[int]) -> None:
    """Close what we inherited: a pipe of the restored process must not be held open by us."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    kept |= {0, 1}
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"ckpt: {text}\n".encode(errors="backslashreplace"))


def _serve(lazy: Lazy, pid: Pid, fd: Fd, go: Fd, ready: int) -> int:
    os.write(ready, b"r")
    os.close(ready)
    # Frames come and go, a MiB each; giving them back each time would cost as much as filling.
    keep_freed_memory()
    server = PageServer(lazy.pages, fd, lazy.spans, pid)
    try:
        if server.serve_until(go):
            server.serve_all()
    except CkptError as error:
        _say(str(error))
        return 1
    return 0


def _iter_descendants(pid: Pid) -> Iterator[Pid]:
    children: dict[int, list[Pid]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(CkptError, OSError):
                children.setdefault(procfs_stat.read_stat(Pid(int(name))).ppid, []).append(
                    Pid(int(name))
                )
    found = [pid]
    while found:
        for child in children.get(found.pop(), []):
            found.append(child)
            yield child


def _kill(pids: list[Pid]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _list_userfaultfds() -> list[int]:
    """Return all that the server and we hold, in the one table of both."""
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[userfaultfd]":
                found.append(int(name))
    return found
