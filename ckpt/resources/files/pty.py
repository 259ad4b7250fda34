"""Pseudo-terminals whose master is open in the tree: both sides, and what belongs to the pair.

    description 3  /dev/ptmx      master ──┐  pair 5: settings, size, packet mode, lock,
    description 4  /dev/pts/5     slave  ──┤          owner and mode of /dev/pts/5
    description 7  /dev/tty       slave  ──┘
    description 9  /dev/pts/6 (deleted)       its master was closed: hung up for good

A pair comes back with its number, since programs know the name of their terminal: in the restorer
masters are opened until the kernel gives that number. Slaves are opened from the master
(TIOCGPTPEER), so that what is mounted on /dev/pts does not matter. Everything is set before a
process exists that could hear of it (SIGWINCH, SIGHUP), and nothing becomes anybody's controlling
terminal here (see `terminal`).

A description that was opened as /dev/tty is made by a helper that leads a session for a moment. If
the terminal is not of the tree, it becomes the controlling terminal of the restoring command.

Kernel: pty(7), ioctl_tty(2), proc_pid_fdinfo(5) (`tty-index`), drivers/tty/{pty,n_tty}.c.

What waits to be read is copied by `pty_queues`, if there is any to be seen. A line that is being
typed in canonical mode, while nothing else waits, is invisible, and lost. So is what was written to
a master whose slave nobody has open.

Refused, before the target is stopped and again when it is: output that was stopped (^S, tcflow), an
unread change in packet mode, other line disciplines, ends in processes outside the tree (a slave as
a standard stream: see `external`), a slave that was hung up while its master goes on. At a restore:
a number that another terminal has.
"""

import os
import select
import stat
from collections.abc import Iterator

import attrs

from ckpt.errors import RestoreFailed
from ckpt.kernel import tty
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.files import pty_queues
from ckpt.resources.files.controlling import open_as_leader
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind, duplicate, flags_for_open
from ckpt.resources.files.open_file import OpenFile, Problem, outside_problem, path_problem
from ckpt.resources.files.pty_ends import (
    DIRECTORY,
    MASTER,
    PTMX,
    SLAVE,
    UNKNOWN,
    find_elsewhere,
)
from ckpt.resources.files.pty_queues import Queues
from ckpt.units import Fd

CONTROLLING = "controlling"
_CONTROLLING_PATH = "/dev/tty"
_HIGHEST = (1 << 20) - 1
_PERMISSIONS = 0o7777
_LOOK_AGAIN_S, _LOOKS = 0.005, 20
"""What is under way between two processes is read at once; what waits longer stays."""


@attrs.frozen(slots=True, repr=False)
class MasterFile:
    """How the master was opened."""

    path: str
    flags: int


@attrs.frozen(slots=True, repr=False)
class PairState:
    """What both sides have in common, and what was set on the master."""

    settings: bytes
    """`struct termios2`."""
    locked_settings: bytes
    """`struct termios` of TIOCGLCKTRMIOS."""
    size: tuple[int, int, int, int]
    """Rows, columns, pixels x and y."""
    packets: bool
    locked: bool
    """The slave cannot be opened (unlockpt(3) not called)."""
    exclusive: bool
    """TIOCEXCL on the master."""
    slave_closed: bool
    """The slave was open, and is not any more: reads of the master fail with EIO."""
    mode: int
    """Permissions of the slave's name in the file system."""
    uid: int
    gid: int
    queues: Queues

    def __attrs_post_init__(self) -> None:
        """Refuse what the kernel's structs cannot hold."""
        sizes = (len(self.settings), len(self.locked_settings))
        if sizes != (tty.TERMIOS2_BYTES, tty.TERMIOS_BYTES):
            raise ValueError("settings of a terminal are cut short")
        if not all(0 <= one < 1 << 16 for one in self.size):
            raise ValueError(f"a terminal cannot have the size {self.size}")


@attrs.frozen(slots=True, repr=False)
class PtyRecord:
    """One description of one side."""

    side: str
    """`master`, `slave`, or `controlling`: the slave, opened as /dev/tty."""
    path: str
    number: int
    """N of /dev/pts/N; -1 for a terminal that is not of the tree."""
    hung_up: bool
    exclusive: bool
    """TIOCEXCL on the slave."""
    master: MasterFile | None
    """None if it was closed, or is not in the tree."""
    pair: PairState | None
    """With the master."""

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.side not in (MASTER, SLAVE, CONTROLLING):
            raise ValueError(f"unknown side {self.side!r} of a pseudo-terminal")
        if not UNKNOWN <= self.number <= _HIGHEST:
            raise ValueError(f"no terminal has number {self.number}")
        if self.side == MASTER and (self.pair is None or self.master is None):
            raise ValueError("a master comes without its settings")

    @property
    def outside(self) -> bool:
        """Tell whether it is a controlling terminal that is not of the tree."""
        return self.side == CONTROLLING and self.master is None


def matches(file: OpenFile) -> bool:
    """See `Kind.matches`."""
    if not stat.S_ISCHR(file.status.st_mode) or file.path_only:
        return False
    device = file.status.st_rdev
    named = device in (tty.PTMX_DEVICE, tty.CONTROLLING_DEVICE)
    return named or os.major(device) == tty.SLAVE_MAJOR


def _side_of(file: OpenFile) -> str:
    sides = {tty.PTMX_DEVICE: MASTER, tty.CONTROLLING_DEVICE: CONTROLLING}
    return sides.get(file.status.st_rdev, SLAVE)


def _number_of_master(file: OpenFile) -> int:
    return int(file.info.other_value("tty-index") or UNKNOWN)


def _number_of_slave(file: OpenFile, fd: Fd) -> int:
    """Return N of /dev/pts/N; -1 if it is no such terminal (a console, opened as /dev/tty)."""
    device = file.status.st_rdev
    if device == tty.CONTROLLING_DEVICE:
        device = tty.get_device(fd)
    return os.minor(device) if os.major(device) == tty.SLAVE_MAJOR else UNKNOWN


def _find_master(number: int, file: OpenFile, table: FdTable) -> OpenFile | None:
    """Return the one description of the master, if some process of the tree has it."""
    for path in PTMX:
        try:
            masters = table.same_inode(attrs.evolve(file, status=os.stat(path)))
        except (OSError, KeyError):
            continue
        for master in masters:
            if _number_of_master(master) == number:
                return master
    return None


def _is_hung_up(fd: Fd) -> bool:
    """Tell whether everything but closing fails on this description."""
    events = tty.poll_now(fd)
    return events & _HUNG_UP == _HUNG_UP


_HUNG_UP = select.POLLHUP | select.POLLERR | select.POLLIN | select.POLLOUT


def problem(file: OpenFile, table: FdTable) -> Problem | None:
    """See `Kind.problem`."""
    # Before we borrow anything: our own descriptors would be found, too.
    find_elsewhere(table)
    if _side_of(file) == MASTER:
        return _master_problem(file, table)
    with table.borrow(file) as fd:
        if _is_hung_up(fd):
            return _hung_up_problem(file, table)
        number = _number_of_slave(file, fd)
        if _find_master(number, file, table) is not None:
            return _elsewhere_problem(SLAVE, number, table) or _use_problem(fd, table)
    if _side_of(file) == CONTROLLING:
        return None
    return outside_problem(file.link, "is a terminal whose other end is in no process of the tree")


def _master_problem(file: OpenFile, table: FdTable) -> Problem | None:
    number = _number_of_master(file)
    if number == UNKNOWN:
        return Problem("is the master of a pseudo-terminal whose number this kernel does not tell")
    found = path_problem(file) or _elsewhere_problem(MASTER, number, table)
    if found is None:
        with table.borrow(file) as fd:
            found = _use_problem(fd, table)
    return found


def _hung_up_problem(file: OpenFile, table: FdTable) -> Problem | None:
    if _side_of(file) == CONTROLLING:
        return Problem("is a terminal that was opened as /dev/tty and hung up")
    number = os.minor(file.status.st_rdev)
    if _find_master(number, file, table) is not None:
        return Problem("is a terminal that was hung up while its master goes on (vhangup)")
    return None


def _elsewhere_problem(side: str, number: int, table: FdTable) -> Problem | None:
    holder = find_elsewhere(table).get((side, number))
    if holder is None:
        return None
    return Problem(f"is a pseudo-terminal that process {holder}, outside the tree, has open too")


def _use_problem(fd: Fd, table: FdTable) -> Problem | None:
    """Tell what cannot be seen, or not be taken along, of one side's queues and modes."""
    found = _find_use_problem(fd)
    for _ in range(_LOOKS if table.running else 0):
        if found is None:
            break
        # The time that the target's own reader needs; nothing tells when it has read.
        select.select([], [], [], _LOOK_AGAIN_S)
        found = _find_use_problem(fd)
    return found


def _find_use_problem(fd: Fd) -> Problem | None:
    if tty.get_discipline(fd) != tty.N_TTY:
        return Problem("is a terminal with another line discipline (slip, ppp)")
    events = tty.poll_now(fd)
    if events & select.POLLPRI:
        return Problem("has a change of state in packet mode that nobody has read", _AGAIN)
    if (events & select.POLLIN or tty.count_readable(fd)) and not pty_queues.can_copy():
        return Problem("is a pseudo-terminal with data that nobody has read", _AGAIN)
    if not events & select.POLLOUT:
        return Problem("is a pseudo-terminal whose output was stopped (^S, tcflow)", _AGAIN)
    return None


_AGAIN = "let the process read or continue it, then try again"


def capture(file: OpenFile, table: FdTable, _replies: list[Reply]) -> PtyRecord:
    """See `Kind.capture`."""
    side, pair = _side_of(file), None
    hung_up = exclusive = False
    with table.borrow(file) as fd:
        if side == MASTER:
            number = _number_of_master(file)
            queues = _copy_queues(fd, number, file, table)
            pair = _capture_pair(fd, number, queues)
            master: OpenFile | None = file
        else:
            hung_up = _is_hung_up(fd)
            number = os.minor(file.status.st_rdev) if hung_up else _number_of_slave(file, fd)
            exclusive = not hung_up and tty.is_exclusive(fd)
            master = _find_master(number, file, table)
    return PtyRecord(
        side=side,
        path=file.link,
        number=number,
        hung_up=hung_up,
        exclusive=exclusive,
        master=MasterFile(master.link, master.flags) if master else None,
        pair=pair,
    )


def _copy_queues(fd: Fd, number: int, file: OpenFile, table: FdTable) -> Queues:
    """Copy what waits to be read on either side, as far as it can be seen."""
    waits = bool(tty.poll_now(fd) & select.POLLIN)
    for slave in _find_slaves(number, file, table):
        with table.borrow(slave) as one:
            waits |= bool(tty.poll_now(one) & select.POLLIN or tty.count_readable(one))
    return pty_queues.copy(fd) if waits else Queues(b"", b"")


def _find_slaves(number: int, file: OpenFile, table: FdTable) -> list[OpenFile]:
    try:
        named = attrs.evolve(file, status=os.stat(f"{DIRECTORY}/{number}"))
        return table.same_inode(named)[:1]
    except (OSError, KeyError):
        return []


def _capture_pair(fd: Fd, number: int, queues: Queues) -> PairState:
    name = os.stat(f"{DIRECTORY}/{number}")
    return PairState(
        settings=tty.get_settings(fd),
        locked_settings=tty.get_locked_settings(fd),
        size=tty.get_size(fd),
        packets=tty.is_in_packet_mode(fd),
        locked=tty.is_locked(fd),
        exclusive=tty.is_exclusive(fd),
        slave_closed=bool(tty.poll_now(fd) & select.POLLHUP),
        mode=name.st_mode & _PERMISSIONS,
        uid=name.st_uid,
        gid=name.st_gid,
        queues=queues,
    )


def check_files(record: PtyRecord, _flags: int, _options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`."""
    if record.outside:
        try:
            os.close(os.open(_CONTROLLING_PATH, os.O_RDWR | os.O_NOCTTY))
        except OSError:
            text = "was a terminal outside the tree, and this command has no controlling terminal"
            yield Problem(text, "restore it from a terminal, or --inherit FD=PATH")
    if record.side == MASTER and record.master is not None:
        yield from _check_master(record.number, record.master.path)


def _check_master(number: int, path: str) -> Iterator[Problem]:
    try:
        device = os.stat(path).st_rdev
    except OSError as error:
        yield Problem(f"cannot be opened ({error.strerror})", "mount devpts")
        return
    if device != tty.PTMX_DEVICE:
        yield Problem("is not the device 5:2", "mount devpts")
    elif os.path.exists(f"{DIRECTORY}/{number}"):
        text = f"its slave was {DIRECTORY}/{number}, which is another terminal now"
        yield Problem(text, "end what has that open")


@attrs.define(slots=True, eq=False, repr=False)
class _Pair:
    """A pair under construction."""

    number: int
    master: Fd
    state: PairState | None = None
    exclusive: bool = False

    def finish(self) -> None:
        """Give it its state, now that all its descriptions are open; close what was lent.

        Without a master of the tree this hangs up the slaves, as the last close of theirs did.

        Raises:
            RestoreFailed: the kernel does not take it.
        """
        try:
            if self.state is not None:
                self._set(self.state)
            if self.exclusive:
                slave = tty.open_peer(self.master, os.O_RDWR)
                tty.make_exclusive(slave)
                os.close(slave)
            if self.state is not None:
                tty.set_locked(self.master, locked=self.state.locked)
        except OSError as error:
            step = f"setting up {DIRECTORY}/{self.number}"
            raise RestoreFailed(step, error.strerror or str(error)) from error
        finally:
            os.close(self.master)

    def _set(self, state: PairState) -> None:
        waits = bool(state.queues.typed or state.queues.shown)
        if state.slave_closed or waits:
            peer = tty.open_peer(self.master, os.O_RDWR | os.O_NONBLOCK)
            if waits:
                pty_queues.put(state.queues, self.master, peer, state.settings)
            os.close(peer)
        name = f"{DIRECTORY}/{self.number}"
        os.chown(name, state.uid, state.gid)
        os.chmod(name, state.mode)
        tty.set_size(self.master, state.size)
        tty.set_settings(self.master, state.settings)
        tty.lock_settings(self.master, state.locked_settings)
        if state.packets:
            tty.set_packet_mode(self.master)
        if state.exclusive:
            tty.make_exclusive(self.master)


def open_again(record: PtyRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    if record.outside:
        opening.options.warn(
            "/dev/tty was a terminal outside the tree, and is that of this command now"
        )
        return Fd(os.open(_CONTROLLING_PATH, flags_for_open(flags) | os.O_NOCTTY))
    key = (PTY.name, record.number)
    if key not in opening.made:
        pair = opening.made[key] = _Pair(record.number, _open_master(record))
        opening.stack.callback(pair.finish)
        tty.set_locked(pair.master, locked=False)
    pair = opening.made[key]
    pair.exclusive |= record.exclusive
    if record.side == MASTER:
        pair.state = record.pair
        return duplicate(pair.master)
    wanted = flags_for_open(flags)
    if record.side == CONTROLLING:
        return open_as_leader(pair.master, wanted)
    return tty.open_peer(pair.master, wanted)


def _open_master(record: PtyRecord) -> Fd:
    """Open the master of a new pair with the right number.

    Raises:
        OSError: EBUSY, the number is taken.
    """
    if record.master is not None:
        return _take_number(record.number, record.master.path, record.master.flags)
    # Hung up: nothing but a name that is gone tells the number.
    path = PTMX[-1]
    try:
        return _take_number(record.number, path, os.O_RDWR)
    except OSError:
        return Fd(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))


def _take_number(number: int, path: str, flags: int) -> Fd:
    """Open masters until the kernel, which gives the lowest free number, gives this one."""
    _make_room(number)
    lower: list[int] = []
    try:
        while True:
            fd = Fd(os.open(path, flags_for_open(flags) | os.O_NOCTTY))
            found = tty.get_number(fd)
            if found == number:
                return fd
            lower.append(fd)
            if found > number:
                raise OSError(_EBUSY, f"{DIRECTORY}/{number} is another terminal now")
    finally:
        for other in lower:
            os.close(other)


_EBUSY = 16
_OTHER_FILES = 256


def _make_room(n_files: int) -> None:
    """Raise our own soft limit of open files, as far as the hard one lets us."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd"))
    need = min(open_now + n_files + _OTHER_FILES, hard)
    if need > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


PTY = Kind(
    "pty",
    PtyRecord,
    matches=matches,
    problem=problem,
    capture=capture,
    check_files=check_files,
    open=open_again,
)
