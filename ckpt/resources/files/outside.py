"""What the user declares to lead outside the tree: `--external KEY`, by the name /proc shows.

    dump --external 'pipe:[4711]'           description 10, a pipe whose reader is elsewhere
    restore --inherit 'pipe:[4711]=5'       descriptor 5 of the restoring command is there now

KEY is what /proc/PID/fd shows: `pipe:[4711]`, `socket:[4711]` (or `unix:[4711]`), `/dev/pts/3`, the
path of a file; every description of that name goes with it. `auto` stands for everything that
would be refused because its other end is outside: pipes, fifos, unix sockets, terminals.

Nothing of the object is captured: what waits in it stays with whoever has the other end. Standard
streams lead outside without being declared (`external`); declared, they are asked for by name.

Refused: a unix socket of the tree that is connected to a declared one, unless it is declared too.
Masters of pseudo-terminals and what has no name of its own (`anon_inode:`) cannot be declared. A
restore refuses, before anything is started, everything for which nothing was named.
"""

import os
import stat
from collections.abc import Iterator

import attrs

from ckpt.kernel import tty
from ckpt.process.remote import Reply
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.files import instead
from ckpt.resources.files.fd_table import FdTable
from ckpt.resources.files.kind import Kind
from ckpt.resources.files.open_file import OpenFile, Problem
from ckpt.units import Fd

AUTO = "auto"
_FOUND = "leading outside"
"""Key of `Tree.notes`: names of what `auto` has found."""


@attrs.frozen(slots=True, repr=False)
class OutsideRecord:
    """One description."""

    key: str
    """What /proc showed, by which the user of a restore names it."""
    fd: int
    """Its first descriptor."""


def matches(file: OpenFile) -> bool:
    """Tell whether it is such that it can be declared."""
    mode = file.status.st_mode
    stands_alone = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)
    is_device = stat.S_ISCHR(mode) and file.status.st_rdev != tty.PTMX_DEVICE
    return (stands_alone or is_device) and not file.path_only


def is_named(file: OpenFile, table: FdTable) -> bool:
    """Tell whether the user has declared it, or `auto` has found it before the freeze."""
    named = table.tree.options.external
    if not named or not matches(file):
        return False
    return any(name in named for name in _names_of(file)) or file.link in table.tree.notes.get(
        _FOUND, ()
    )


def _names_of(file: OpenFile) -> set[str]:
    names = {file.link}
    if stat.S_ISSOCK(file.status.st_mode):
        names.add(f"unix:[{file.status.st_ino}]")
    return names


def is_found(file: OpenFile, problem: Problem | None, table: FdTable) -> bool:
    """Tell whether `auto` takes what has this problem; its other descriptions go with it."""
    if problem is None or not problem.leads_outside or not matches(file):
        return False
    if AUTO not in table.tree.options.external:
        return False
    # Who has the other end is not asked of a frozen process any more.
    table.tree.notes.setdefault(_FOUND, set()).add(file.link)
    return True


def capture(file: OpenFile, _table: FdTable, _replies: list[Reply]) -> OutsideRecord:
    """See `Kind.capture`."""
    return OutsideRecord(file.link, file.fd)


def check_files(record: OutsideRecord, flags: int, options: RestoreOptions) -> Iterator[Problem]:
    """See `Kind.check_files`."""
    chosen = instead.choose(options.external, record.key, flags)
    found = (
        instead.missing(record.key)
        if chosen is None
        else instead.find_problem(chosen, record.key, flags)
    )
    if found:
        yield found


def open_again(record: OutsideRecord, flags: int, opening: Opening) -> Fd:
    """See `Kind.open`."""
    chosen = instead.choose(opening.options.external, record.key, flags)
    if chosen is None:
        raise FileNotFoundError(_ENOENT, os.strerror(_ENOENT), record.key)
    fd = instead.take(chosen, record.fd, flags)
    if record.key.startswith("socket:") and not stat.S_ISSOCK(os.fstat(fd).st_mode):
        opening.options.warn(f"fd {record.fd} was {record.key}, and what is there now is no socket")
    return fd


_ENOENT = 2

OUTSIDE = Kind(
    "outside",
    OutsideRecord,
    matches=matches,
    reads_nothing=True,
    capture=capture,
    check_files=check_files,
    open=open_again,
)
