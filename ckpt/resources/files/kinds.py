"""All kinds of open file descriptions that are known, and which of them a description is.

Refused before the target is stopped: every description that no kind knows.
"""

from ckpt.resources.files import external, locks, outside, refused
from ckpt.resources.files.chardev import CHARDEV
from ckpt.resources.files.directory import DIRECTORY
from ckpt.resources.files.epoll import EPOLL
from ckpt.resources.files.eventfd import EVENTFD
from ckpt.resources.files.external import EXTERNAL
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.fifo import FIFO
from ckpt.resources.files.inotify import INOTIFY
from ckpt.resources.files.kind import AnyKind
from ckpt.resources.files.linked import LINKED
from ckpt.resources.files.mqueue import MQUEUE
from ckpt.resources.files.netlink import NETLINK
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.resources.files.outside import OUTSIDE
from ckpt.resources.files.packet import PACKET
from ckpt.resources.files.pidfd import PIDFD
from ckpt.resources.files.pipe import PIPE
from ckpt.resources.files.process_file import PROCESS_FILE
from ckpt.resources.files.pty import PTY
from ckpt.resources.files.raw import RAW
from ckpt.resources.files.regular import REGULAR
from ckpt.resources.files.signalfd import SIGNALFD
from ckpt.resources.files.tcp import TCP
from ckpt.resources.files.tcp_connection import TCP_CONNECTION
from ckpt.resources.files.timerfd import TIMERFD
from ckpt.resources.files.udp import UDP
from ckpt.resources.files.unix import UNIX

KINDS: tuple[AnyKind, ...] = (
    PIDFD,
    PROCESS_FILE,
    # Looks like a file, and its name like a path.
    MQUEUE,
    # Before those that have their name.
    LINKED,
    REGULAR,
    DIRECTORY,
    PTY,
    CHARDEV,
    PIPE,
    FIFO,
    UNIX,
    UDP,
    NETLINK,
    PACKET,
    RAW,
    TCP_CONNECTION,
    TCP,
    EVENTFD,
    SIGNALFD,
    TIMERFD,
    INOTIFY,
    EPOLL,
)
"""All kinds but `EXTERNAL`, which stands in for a standard stream that none of them can take, and
`OUTSIDE`, for what the user declares."""

BY_NAME = {kind.name: kind for kind in (*KINDS, EXTERNAL, OUTSIDE)}
"""By the name that the image has."""


def classify(file: OpenFile, table: FdTable) -> tuple[AnyKind | None, Problem | None]:
    """Return the kind that can take a description, or what is wrong with it."""
    if outside.is_named(file, table):
        return OUTSIDE, None
    problem = refused.problem_of(file)
    for kind in KINDS:
        if kind.matches(file) and kind.is_for(file, table):
            found = kind.problem(file, table) or locks.problem(file)
            if found is None:
                return kind, None
            problem = found
            break
    if EXTERNAL.matches(file) and external.stream_of(file, table) is not None:
        return EXTERNAL, None
    if outside.is_found(file, problem, table):
        return OUTSIDE, None
    return None, problem
