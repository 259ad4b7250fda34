"""What this kernel can do, found out by doing it once to ourselves.

Never by version number: distributions backport and leave out. `probe_features` is called once, at
the start, and the record is handed down; nothing is kept here. All probes act on this process
alone and leave it as it was.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Callable, Iterator

import attrs

from ckpt.errors import CkptError
from ckpt.kernel import clear_refs, pagemap, userfaultfd
from ckpt.kernel.arch import NR
from ckpt.kernel.arch.x86_64_cpuid import xsave_bytes, xsave_components
from ckpt.kernel.capabilities import capability_names, capget
from ckpt.kernel.clone3 import pack_clone_args, pack_set_tid
from ckpt.kernel.kcmp import KcmpType, Ordering, kcmp
from ckpt.kernel.libc import PAGE_SIZE, readable_address, syscall, writable_address
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.prctl import (
    PR_SET_VMA_ANON_NAME,
    PR_TIMER_CREATE_RESTORE_IDS_GET,
    Prctl,
    prctl,
)
from ckpt.units import AddrRange, Fd, Pid, RemoteAddr, Tid, addr_range


@attrs.frozen
class Features:
    """What is there (True) and what is not, or is forbidden to us (False)."""

    kernel_release: str
    machine: str
    pagemap_scan: bool
    """PAGEMAP_SCAN works (6.7)."""
    pagemap_scan_soft_dirty: bool
    """PAGEMAP_SCAN knows PAGE_IS_SOFT_DIRTY (6.9); says nothing of `soft_dirty`."""
    pagemap_scan_guard: bool
    """PAGEMAP_SCAN knows PAGE_IS_GUARD (6.16)."""
    mseal: bool
    """Mappings can be sealed (6.10)."""
    soft_dirty: bool
    """Clearing, writing and reading the soft-dirty bit gives the right answers."""
    uffd_wp_async: bool
    """Asynchronous write-protection, armed and read by PAGEMAP_SCAN, reports a write."""
    uffd_unprivileged: bool
    """vm.unprivileged_userfaultfd: without UFFD_USER_MODE_ONLY too, for anyone."""
    set_tid: bool
    """clone3 may choose the pid (5.5; CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN)."""
    timens: bool
    """There are time namespaces (5.6)."""
    kcmp: bool
    """CONFIG_KCMP."""
    pidfd_getfd: bool
    """5.6, and not forbidden."""
    rseq: bool
    """Restartable sequences (4.18)."""
    anon_vma_name: bool
    """Anonymous memory can be named (CONFIG_ANON_VMA_NAME)."""
    posix_timers_listed: bool
    """/proc/PID/timers exists (CONFIG_CHECKPOINT_RESTORE)."""
    timer_restore_ids: bool
    """timer_create can be given the id (6.15)."""
    xsave_bytes: int
    """Size of the XSAVE area of this processor under this kernel; 0 if unknown."""
    xsave_components: int
    """Components of XSTATE that this processor offers, bits as in XCR0; 0 if unknown."""
    capabilities: frozenset[str]
    """Our effective ones: lower case, without `cap_`."""


def probe_features() -> Features:
    """Try everything and return what worked; takes about a millisecond, changes nothing.

    Raises nothing for what is missing or forbidden: that is a False.
    """
    uname = os.uname()
    with _own_page() as page, _own_pagemap() as fd:
        return Features(
            kernel_release=uname.release,
            machine=uname.machine,
            pagemap_scan=_scan_knows(fd, page, pagemap.PAGE_IS_PRESENT),
            pagemap_scan_soft_dirty=_scan_knows(fd, page, pagemap.PAGE_IS_SOFT_DIRTY),
            pagemap_scan_guard=_scan_knows(fd, page, pagemap.PAGE_IS_GUARD),
            mseal=_works(_try_mseal),
            soft_dirty=_works(lambda: _try_soft_dirty(fd, page)),
            uffd_wp_async=_works(lambda: _try_uffd_wp_async(fd)),
            uffd_unprivileged=_works(_read_uffd_unprivileged),
            set_tid=_works(_try_set_tid),
            timens=_exists("/proc/self/timens_offsets"),
            kcmp=_works(_try_kcmp),
            pidfd_getfd=_works(_try_pidfd_getfd),
            rseq=_works(_try_rseq),
            anon_vma_name=_works(lambda: _try_anon_vma_name(page)),
            posix_timers_listed=_exists("/proc/self/timers"),
            timer_restore_ids=_works(_try_timer_restore_ids),
            xsave_bytes=_number(xsave_bytes),
            xsave_components=_number(xsave_components),
            capabilities=capability_names(capget(Tid(0)).effective),
        )


def _works(attempt: Callable[[], bool]) -> bool:
    try:
        return attempt()
    except (OSError, CkptError):
        return False


def _exists(path: str) -> bool:
    return os.access(path, os.F_OK)


@attrs.frozen(repr=False)
class _Page:
    """One page of private anonymous memory, written to once."""

    memory: mmap.mmap
    span: AddrRange

    def write(self) -> None:
        self.memory[0] = 1


@contextlib.contextmanager
def _own_page() -> Iterator[_Page]:
    with mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        page = _Page(memory, addr_range(writable_address(memory)[0], PAGE_SIZE))
        page.write()
        yield page


@contextlib.contextmanager
def _own_pagemap() -> Iterator[Fd]:
    """Lend our pagemap; where we may not open it, /dev/null, on which every probe fails."""
    try:
        fd = pagemap.open_pagemap(Pid(os.getpid()))
    except CkptError:
        fd = Fd(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    try:
        yield fd
    finally:
        os.close(fd)


def _scan_knows(fd: Fd, page: _Page, category: int) -> bool:
    return _works(lambda: bool(pagemap.scan(fd, page.span, return_mask=category)))


def _entry(fd: Fd, page: _Page) -> int:
    # Not pagemap.read_entries: numpy takes longer to load than all probes together.
    offset = page.span.start // PAGE_SIZE * pagemap.ENTRY_BYTES
    return int.from_bytes(os.pread(fd, pagemap.ENTRY_BYTES, offset), "little")


def _try_soft_dirty(fd: Fd, page: _Page) -> bool:
    if not _entry(fd, page) & pagemap.PM_SOFT_DIRTY:
        # A page just written is dirty wherever there is such a bit; spare us the clearing.
        return False
    clear_refs.clear_soft_dirty(Pid(os.getpid()))
    cleared = not _entry(fd, page) & pagemap.PM_SOFT_DIRTY
    page.write()
    return cleared and bool(_entry(fd, page) & pagemap.PM_SOFT_DIRTY)


def _try_uffd_wp_async(fd: Fd) -> bool:
    flags = os.O_CLOEXEC | os.O_NONBLOCK | userfaultfd.UFFD_USER_MODE_ONLY
    uffd = userfaultfd.create(flags)
    try:
        # A page of its own: being registered would change the answers of the other probes.
        with _own_page() as page:
            userfaultfd.negotiate(uffd, userfaultfd.UffdFeature.WP_ASYNC)
            userfaultfd.register(
                uffd, page.span, userfaultfd.UFFDIO_REGISTER_MODE_WP, pid=Pid(os.getpid())
            )
            before = _scan_written(fd, page)
            armed = _scan_written(fd, page)
            page.write()
            return bool(before) and not armed and bool(_scan_written(fd, page))
    finally:
        os.close(uffd)


def _scan_written(fd: Fd, page: _Page) -> list[pagemap.Region]:
    return pagemap.scan(
        fd,
        page.span,
        category_mask=pagemap.PAGE_IS_WRITTEN,
        return_mask=pagemap.PAGE_IS_WRITTEN,
        flags=pagemap.PM_SCAN_WP_MATCHING | pagemap.PM_SCAN_CHECK_WPASYNC,
    )


def _read_uffd_unprivileged() -> bool:
    with open("/proc/sys/vm/unprivileged_userfaultfd") as file:
        return file.read().strip() == "1"


def _try_set_tid() -> bool:
    """Ask for a child with pid 1, which is always taken: EEXIST means that we may choose.

    Without the right it is EPERM, in older kernels E2BIG or ENOSYS: no child in any case.
    """
    tids = pack_set_tid([Tid(1)])
    args = pack_clone_args(
        exit_signal=signal.SIGCHLD, set_tid=RemoteAddr(readable_address(tids)[0]), n_set_tid=1
    )
    try:
        child = syscall(NR.clone3, readable_address(args)[0], len(args))
    except OSError as error:
        return error.errno == errno.EEXIST
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return False


def _try_mseal() -> bool:
    """Seal nothing at all."""
    return syscall(NR.mseal, 0, 0, 0) == 0


def _try_kcmp() -> bool:
    me = Pid(os.getpid())
    return kcmp(me, me, KcmpType.VM) == Ordering.EQUAL


def _try_pidfd_getfd() -> bool:
    me = Pid(os.getpid())
    pidfd = pidfd_open(me)
    try:
        os.close(pidfd_getfd(pidfd, pidfd, pid=me))
    finally:
        os.close(pidfd)
    return True


def _try_rseq() -> bool:
    """Call rseq with flags that do not exist: EINVAL comes from a kernel that has the call."""
    try:
        syscall(NR.rseq, 0, 0, -1, 0)
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


def _try_anon_vma_name(page: _Page) -> bool:
    name = ctypes.create_string_buffer(b"ckpt")
    span = page.span
    where = (span.start, span.end - span.start)
    prctl(Prctl.SET_VMA, PR_SET_VMA_ANON_NAME, *where, ctypes.addressof(name))
    return True


def _try_timer_restore_ids() -> bool:
    prctl(Prctl.TIMER_CREATE_RESTORE_IDS, PR_TIMER_CREATE_RESTORE_IDS_GET)
    return True


def _number(ask: Callable[[], int]) -> int:
    try:
        return ask()
    except OSError:
        return 0
