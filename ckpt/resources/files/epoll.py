"""epoll instances and what they watch.

An item is keyed by (description, descriptor number at the time it was added). So items are added
inside the restored process, once every descriptor has its number.

Kernel: epoll(7), the `tfd:` lines of fdinfo, kcmp(2) KCMP_EPOLL_TFD for items whose number was
closed or used again (refused before the target is stopped).

A one-shot item that has fired is added ready and fired again at once, in private; where its file
is not ready, it stays armed for errors and hang-ups, said aloud. An edge-triggered item of a file
that is ready reports it once more. The busy-poll parameters (EPIOCSPARAMS) are not kept.
"""

import struct
from collections import Counter
from collections.abc import Iterator

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.kcmp import Ordering, kcmp_epoll_slot, kcmp_epoll_target
from ckpt.kernel.procfs.fdinfo import EpollTarget
from ckpt.process.remote import Call, In, Out, Reply, call
from ckpt.resources.base import Restore, expect
from ckpt.resources.files.kind import Attaching, Kind, Opening, duplicate
from ckpt.resources.files.open_file import FdTable, OpenFile, Problem
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
    """See `Kind.problem`."""
    seen: Counter[int] = Counter()
    for target in file.info.epoll_targets:
        if _is_stale(file, target, seen[target.tfd], table):
            return Problem(
                f"is an epoll that still watches a file whose descriptor {target.tfd} was closed"
                " or given to another file, which is not supported yet"
            )
        seen[target.tfd] += 1
    return None


def _is_stale(file: OpenFile, target: EpollTarget, nth: int, table: FdTable) -> bool:
    if target.tfd not in table.by_fd:
        return True
    slot = kcmp_epoll_slot(efd=file.fd, tfd=target.tfd, toff=nth)
    try:
        return kcmp_epoll_target(table.pid, target.tfd, table.pid, slot) is not Ordering.EQUAL
    except OSError:
        # The item or the descriptor went away while we looked: there is nothing stale then.
        return False


def capture(file: OpenFile, _table: FdTable, _replies: list[Reply]) -> EpollRecord:
    """See `Kind.capture`."""
    return EpollRecord(tuple(EpollItem(t.tfd, t.events, t.data) for t in file.info.epoll_targets))


def open_again(_record: EpollRecord, _flags: int, _opening: Opening) -> Fd:
    """See `Kind.open`."""
    import select

    with select.epoll() as made:
        return duplicate(made.fileno())


def attach(record: EpollRecord, fd: RemoteFd, attaching: Attaching) -> Restore:
    """See `Kind.attach`: those that have fired first, while no other can be ready."""
    fired = [item for item in record.items if item.is_fired]
    replies = yield [step for item in fired for step in _fire(fd, item)]
    added, waited = replies[::2], replies[1::2]
    _expect_added(fired, added, attaching)
    outcome = zip(fired, added, waited, strict=True)
    armed = [item for item, add, wait in outcome if add.ok and wait.value != 1]
    for item in armed:
        attaching.rebuilt.warn(
            f"fd {item.fd}, a one-shot registration that had fired, may report an error or a"
            f" hang-up once more to the epoll at fd {fd}"
        )
    expect("arming epoll", (yield [_control(fd, _CTL_MOD, item, item.events) for item in armed]))
    waiting = [item for item in record.items if not item.is_fired]
    replies = yield [_control(fd, _CTL_ADD, item, item.events) for item in waiting]
    _expect_added(waiting, replies, attaching)


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
