"""epoll instances and what they watch.

An item is keyed by (description, descriptor number at the time it was added). So items are added
inside the restored process, once every descriptor has its number. The number may have been closed
or given to another file since; the item stays as long as somebody has the file open:

    added as 7; 7 was closed, 9 is a duplicate      9 is put under 7, added, and 7 is as before

Kernel: epoll(7), the `tfd:` lines of fdinfo, kcmp(2) KCMP_EPOLL_TFD.

Refused before the target is stopped: an item whose file is not open (any more) in the first process
that has the epoll open.

A one-shot item that has fired is added ready and fired again at once, in private; where its file
is not ready, it stays armed for errors and hang-ups, said aloud. An edge-triggered item of a file
that is ready reports it once more. The busy-poll parameters (EPIOCSPARAMS) are not kept.
"""

import fcntl
import os
import struct
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator

import attrs

from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel.arch import NR
from ckpt.kernel.kcmp import Ordering, kcmp_epoll_slot, kcmp_epoll_target
from ckpt.kernel.procfs.fdinfo import EpollTarget
from ckpt.process.remote import Call, In, Out, Reply, call
from ckpt.resources.base import Opening, Restore, expect
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Attaching, Kind, duplicate
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.units import Fd, RemoteFd

_EVENT = struct.Struct("<IQ")
"""`struct epoll_event`; packed on x86-64 (include/uapi/linux/eventpoll.h)."""
_CTL_ADD, _CTL_MOD = 1, 3
_WAKEUP, _ONESHOT, _ET, _EXCLUSIVE = 1 << 29, 1 << 30, 1 << 31, 1 << 28
_PRIVATE = _WAKEUP | _ONESHOT | _ET | _EXCLUSIVE
"""What is left of an item's events when its one shot is fired (EP_PRIVATE_BITS)."""
_ANY_READINESS = 0x2005 | 0x2
"""EPOLLIN, EPOLLPRI, EPOLLOUT, EPOLLRDHUP."""
_EPERM = 1
_NAME = "anon_inode:[eventpoll]"


@attrs.frozen(slots=True, repr=False)
class EpollItem:
    """One registration."""

    fd: int
    events: int
    data: int
    """The 64-bit word that epoll_wait hands back."""
    held_by: int = -1
    """A descriptor that has the file, if `fd` has it no more; else -1."""

    def __attrs_post_init__(self) -> None:
        """Refuse what does not fit into `struct epoll_event`."""
        if not 0 <= self.events < 2**32 or not 0 <= self.data < 2**64:
            raise ValueError("an event of epoll has 32 bits of events and 64 of data")

    @property
    def is_fired(self) -> bool:
        """Tell whether its one shot is gone: it reports nothing until it is armed again."""
        return bool(self.events & _ONESHOT) and not self.events & ~_PRIVATE


@attrs.frozen(slots=True, repr=False)
class EpollRecord:
    """An epoll instance."""

    items: tuple[EpollItem, ...]


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    return file.link == _NAME


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`: of a frozen process the capture asks, once."""
    if table.running:
        lost = next((t for t, holder in _iter_holders(file, table) if holder is None), None)
        return None if lost is None else _problem_of(lost)
    return None


def _problem_of(target: EpollTarget) -> Problem:
    return Problem(
        f"is an epoll that still watches a file whose descriptor {target.tfd} was closed or given"
        " to another file, and which the process has not open under another"
    )


def _iter_holders(file: OpenFile, table: FdTable) -> Iterator[tuple[EpollTarget, RemoteFd | None]]:
    """Yield what is watched, and under which descriptor the process has it; None if it has not."""
    seen: Counter[int] = Counter()
    for target in file.info.epoll_targets:
        slot = kcmp_epoll_slot(efd=file.fd, tfd=target.tfd, toff=seen[target.tfd])
        seen[target.tfd] += 1
        yield target, _find_holder(target, slot, table)


def _find_holder(target: EpollTarget, slot: kcmp_epoll_slot, table: FdTable) -> RemoteFd | None:
    named = RemoteFd(target.tfd)
    others = (fd for fd, one in table.by_fd.items() if one.status.st_ino == target.inode)
    candidates = [named] if named in table.by_fd else []
    for fd in (*candidates, *others):
        try:
            if kcmp_epoll_target(table.pid, fd, table.pid, slot) is Ordering.EQUAL:
                return RemoteFd(fd)
        except OSError:
            # The item or the descriptor went away while we looked: there is nothing stale then.
            return named
    return None


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> EpollRecord:
    """See `Kind.capture`.

    Raises:
        UnsupportedState: since it was looked at, a file was closed that is still watched.
    """
    items = []
    for target, holder in _iter_holders(file, table):
        if holder is None:
            finding = Finding(f"fd {file.fd} ({file.link})", _problem_of(target).text)
            raise UnsupportedState(table.pid, (finding,))
        held_by = -1 if holder == target.tfd else holder
        items.append(EpollItem(target.tfd, target.events, target.data, held_by))
    return EpollRecord(tuple(items))


def open_again(_record: EpollRecord, _flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    import select

    with select.epoll() as made:
        return duplicate(made.fileno())


def attach(record: EpollRecord, fd: RemoteFd, attaching: Attaching) -> Restore:
    """See `Kind.attach`: those that have fired first, while no other can be ready."""
    fired = [item for item in record.items if item.is_fired]
    replies = yield from _with_all(fd, fired, _fire)
    added, waited = replies[::2], replies[1::2]
    _expect_added(fired, added, attaching)
    outcome = zip(fired, added, waited, strict=True)
    armed = [item for item, add, wait in outcome if add.ok and wait.value != 1]
    for item in armed:
        attaching.rebuilt.warn(
            f"fd {item.fd}, a one-shot registration that had fired, may report an error or a"
            f" hang-up once more to the epoll at fd {fd}"
        )
    expect("arming epoll", (yield from _with_all(fd, armed, _arm)))
    waiting = [item for item in record.items if not item.is_fired]
    _expect_added(waiting, (yield from _with_all(fd, waiting, _add)), attaching)


_Asking = Generator[list[Call], list[Reply], list[Reply]]
_Controls = Callable[[RemoteFd, EpollItem], Iterable[Call]]


def _with_all(fd: RemoteFd, items: list[EpollItem], controls: _Controls) -> _Asking:
    """Make the calls for each item, in their order, with its file under its number."""
    found: dict[int, list[Reply]] = {}
    ready = [item for item in items if item.held_by < 0]
    calls = [list(controls(fd, item)) for item in ready]
    replies = iter((yield [one for of_item in calls for one in of_item]))
    for item, of_item in zip(ready, calls, strict=True):
        found[id(item)] = [next(replies) for _ in of_item]
    for item in items:
        if item.held_by >= 0:
            found[id(item)] = yield from _with_moved(fd, item, controls)
    return [reply for item in items for reply in found[id(item)]]


def _with_moved(fd: RemoteFd, item: EpollItem, controls: _Controls) -> _Asking:
    """Make the calls for one item while its file is under the number that it was added by."""
    flags, saved = yield [
        call(NR.fcntl, item.fd, fcntl.F_GETFD, 0),
        call(NR.fcntl, item.fd, fcntl.F_DUPFD_CLOEXEC, 0),
    ]
    epoll = RemoteFd(saved.value) if saved.ok and item.fd == fd else fd
    calls = list(controls(epoll, item))
    if saved.ok:
        close_on_exec = os.O_CLOEXEC if flags.value & fcntl.FD_CLOEXEC else 0
        after = [call(NR.dup3, saved.value, item.fd, close_on_exec), call(NR.close, saved.value)]
    else:
        after = [call(NR.close, item.fd)]
    moved, *replies = yield [call(NR.dup3, item.held_by, item.fd, 0), *calls, *after]
    expect("moving what epoll watches", [moved, *replies[len(calls) :]])
    return replies[: len(calls)]


def _add(fd: RemoteFd, item: EpollItem) -> Iterator[Call]:
    yield _control(fd, _CTL_ADD, item, item.events)


def _arm(fd: RemoteFd, item: EpollItem) -> Iterator[Call]:
    yield _control(fd, _CTL_MOD, item, item.events)


def _fire(fd: RemoteFd, item: EpollItem) -> Iterator[Call]:
    yield _control(fd, _CTL_ADD, item, item.events | _ANY_READINESS)
    yield call(NR.epoll_wait, fd, Out(_EVENT.size), 1, 0)


def _control(fd: RemoteFd, operation: int, item: EpollItem, events: int) -> Call:
    event = In(_EVENT.pack(events, item.data))
    return call(NR.epoll_ctl, fd, operation, item.fd, event)


def _expect_added(items: list[EpollItem], replies: list[Reply], attaching: Attaching) -> None:
    """Take only success, except for what cannot be watched since it is another file now."""
    for item, reply in zip(items, replies, strict=True):
        if reply.error == _EPERM and item.fd in attaching.replaced_fds:
            attaching.rebuilt.warn(
                f"fd {item.fd} cannot be watched by epoll any more: it is a regular file now"
            )
        else:
            expect("adding to epoll", [reply])


EPOLL = Kind(
    "epoll",
    EpollRecord,
    matches=matches,
    problem=problem,
    capture=capture,
    open=open_again,
    attach=attach,
)
