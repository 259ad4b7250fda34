"""Files whose content must travel in the image, because no name leads to them when it is restored.

    anonymous   what mmap(MAP_SHARED | MAP_ANONYMOUS) and a shared mapping of /dev/zero make
    memfd       memfd_create(2): name, mode, seals
    deleted     a regular file without any name, open or mapped
    directory   a directory without a name, open or the working directory of a process
    posix-shm   a file below /dev/shm that the tree writes: its name stays, but memory it is

The mappings and descriptions of a process refer to one by its key (`file_identity.content_key`).
Here they are found, each once in a tree, by the first process that has it open or mapped. The
content itself is the engine's work (`engine/contents.py`): a page space of its own, addressed by
the offset in the file. It is read while all stand still, since no tracker of an address space sees
what others write to it; a delta keeps the pages that differ from what the parent holds.

Kernel: /proc/PID/map_files (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE), proc_pid_fd(5),
memfd_create(2), fcntl(2) F_GET_SEALS, shm_overview(7).

Refused before the target is stopped: deleted files of more than `--ghost-limit`, memory of
hugetlbfs, secret memory (memfd_secret), what drivers make. A posix-shm file comes back as a new
file under its name: who has the old one mapped outside of the tree does not share it any more.
Inode numbers are others after a restore.
"""

import contextlib
import enum
import fcntl
import functools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping

import attrs

from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel.procfs import maps
from ckpt.kernel.procfs.files import list_fds, read_link
from ckpt.resources.base import Capture, Rebuilt, Resource, Restore, Stage, Stopped, Target
from ckpt.resources.file_identity import FileIdentity, content_key, identify, without_deleted
from ckpt.resources.files.open_file import LINKS
from ckpt.units import Fd, Pid, RemoteFd

NOTE = "contents"
"""Key of `Tree.notes`: the contents of the tree that is being captured, see `Found`."""
_DELETED = " (deleted)"
SHM = "/dev/shm/"
OWN_LINKS = "/proc/self/fd/"
_NAMED = "[anon_shmem:"
"""What maps shows instead of /dev/zero if the memory was given a name."""
_BLOCK_BYTES = 512
_ALL_MODE_BITS = 0o7777
_MAX_SIZE_BYTES = (1 << 63) - 1


class ContentKind(enum.StrEnum):
    """What a restore must make."""

    ANONYMOUS = "anonymous"
    MEMFD = "memfd"
    DELETED = "deleted"
    DIRECTORY = "directory"
    POSIX_SHM = "posix-shm"


@attrs.frozen(slots=True, repr=False)
class ContentRecord:
    """One file, and the name of the page space that holds its content."""

    key: str
    """See `file_identity.content_key`."""
    kind: str
    """One of `ContentKind`."""
    space: str
    """The same in each generation while the first place where it is open or mapped is the same."""
    path: str
    """Its name now or once; of a memfd the name that it was given."""
    size_bytes: int
    mode: int
    """Permission bits."""
    uid: int
    gid: int
    accessed_ns: int
    modified_ns: int
    seals: int = 0
    """F_SEAL_* bits of a memfd."""

    def __attrs_post_init__(self) -> None:
        """Refuse what no file can be."""
        if self.kind not in list(ContentKind):
            raise ValueError(f"unknown kind of content {self.kind!r}")
        if not 0 <= self.size_bytes <= _MAX_SIZE_BYTES or self.mode & ~_ALL_MODE_BITS:
            raise ValueError(f"no file has {self.size_bytes} bytes and mode {self.mode:o}")
        if "\0" in self.path or (self.has_name and not self.path.startswith("/")):
            raise ValueError(f"{self.path!r} is no name of a file")

    @property
    def has_name(self) -> bool:
        """Tell whether it lies, or lay, in a directory."""
        return self.kind not in (ContentKind.ANONYMOUS, ContentKind.MEMFD)


@attrs.frozen(slots=True, repr=False)
class ContentsRecord:
    """Those that the process was the first of its tree to have."""

    contents: tuple[ContentRecord, ...]


@attrs.frozen(slots=True, eq=False, repr=False)
class Found:
    """A content of a frozen tree, and where it can be opened for reading."""

    record: ContentRecord
    opened_at: str


@attrs.frozen(slots=True, eq=False, repr=False)
class _Place:
    """Where a process has a file that may be one of these."""

    name: str
    """Part of the name of a page space."""
    proc_path: str
    link: str
    """What the link there shows."""
    status: os.stat_result
    """Of the file behind it."""
    written: bool
    """The process may write it here."""

    @property
    def path(self) -> str:
        """Its name, now or once."""
        return without_deleted(self.link)


def look(target: Target) -> Iterator[Finding]:
    """Name what cannot travel; note how much will have to be read."""
    pid, limit = target.pid, target.tree.options.ghost_limit_bytes
    with contextlib.suppress(OSError):
        links = {fd: read_link(pid, f"fd/{fd}") for fd in list_fds(pid)}
        for place in _iter_places(pid, maps.read_lines(pid), links, running=True):
            kind = _kind_of(place)
            if kind is None:
                continue
            problem, remedy = _problem_of(place, kind, limit)
            if problem:
                yield Finding(_subject(place), problem, remedy)
            else:
                sizes = target.tree.notes.setdefault(_SIZES, {})
                sizes[content_key(place.status)] = _allocated_bytes(place.status)


_SIZES = "sizes of contents"


def likely_bytes(notes: dict[str, object]) -> int:
    """Return how much the contents of a tree took when it was looked at, by `Tree.notes`."""
    sizes = notes.get(_SIZES)
    return sum(sizes.values()) if isinstance(sizes, dict) else 0


def _subject(place: _Place) -> str:
    if place.name.startswith("fd"):
        return f"fd {place.name.removeprefix('fd')} ({place.link})"
    return f"{_NAMES.get(place.name) or f'memory {place.name}'} {place.link}"


def capture(stopped: Stopped) -> Capture[ContentsRecord]:
    """Find what the frozen process has, and no other process of its tree had before it.

    Raises:
        UnsupportedState: one of them cannot travel, and was not there when the target ran.
    """
    pid, tree = stopped.pid, stopped.tree
    if tree.claim(NOTE):
        tree.notes[NOTE] = []
    found: list[Found] = []
    findings: list[Finding] = []
    for place in _iter_places(pid, stopped.task.maps_lines, stopped.notes.get(LINKS, {})):
        kind = _kind_of(place)
        if kind is None or not tree.claim((NOTE, content_key(place.status))):
            continue
        problem, remedy = _problem_of(place, kind, tree.options.ghost_limit_bytes)
        if problem:
            findings.append(Finding(_subject(place), problem, remedy))
        else:
            record = _record(place, kind, f"{kind}-{stopped.frozen.tgid}-{place.name}")
            found.append(Found(record, place.proc_path))
    if findings:
        raise UnsupportedState(pid, tuple(findings))
    tree.notes[NOTE] += found
    yield []
    return ContentsRecord(tuple(one.record for one in found))


_CWD, _EXE = "cwd", "exe"
_NAMES = {_CWD: "working directory", _EXE: "program"}


def _iter_places(
    pid: Pid, lines: Iterable[str], links: Mapping[RemoteFd, str], *, running: bool = False
) -> Iterator[_Place]:
    """Yield the places whose link looks as if it led to one of these; mappings first.

    A running process may have closed or unmapped one meanwhile; it is left out.
    """
    mapped = [line for line in lines if _DELETED in line or SHM in line or _NAMED in line]
    for vma in maps.parse_maps("\n".join(mapped)):
        if vma.inode:
            name = f"{vma.span.start:x}-{vma.span.end:x}"
            with _unless_gone(running):
                proc_path = f"/proc/{pid}/map_files/{name}"
                written = vma.shared and vma.writable
                yield _place(f"{vma.span.start:x}", proc_path, written=written)
    for fd, link in links.items():
        if link.endswith(_DELETED) or link.startswith(SHM):
            with _unless_gone(running):
                proc_path = f"/proc/{pid}/fd/{fd}"
                written = bool(os.lstat(proc_path).st_mode & stat.S_IWUSR)
                yield _place(f"fd{fd}", proc_path, written=written)
    for name in (_CWD, _EXE):
        with _unless_gone(running):
            if os.readlink(f"/proc/{pid}/{name}").endswith(_DELETED):
                yield _place(name, f"/proc/{pid}/{name}", written=False)


@contextlib.contextmanager
def _unless_gone(running: bool) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        if not running:
            raise


def _place(name: str, proc_path: str, *, written: bool) -> _Place:
    return _Place(name, proc_path, os.readlink(proc_path), os.stat(proc_path), written)


def _kind_of(place: _Place) -> ContentKind | None:
    """Return which of these a file is; None if it is none of them, or not to be known."""
    status, link = place.status, place.link
    deleted = link.endswith(_DELETED)
    kind = None
    if stat.S_ISDIR(status.st_mode):
        kind = ContentKind.DIRECTORY if deleted and not _has_its_name(place) else None
    elif not stat.S_ISREG(status.st_mode) or place.path.startswith("/SYSV"):
        pass
    elif not deleted:
        if link.startswith(SHM) and place.written and _has_its_name(place):
            kind = ContentKind.POSIX_SHM
    elif status.st_nlink == 0 or status.st_dev == _nameless_device():
        kind = ContentKind.DELETED
        if place.path.startswith("/memfd:"):
            kind = ContentKind.MEMFD
        elif status.st_dev == _nameless_device():
            kind = ContentKind.ANONYMOUS
    return kind


def identify_shown(link: str, status: os.stat_result) -> FileIdentity:
    """Return the identity of a file, with the key of its content if no name leads to it.

    (A posix-shm file has its name; its content goes by that.)

    Args:
        link: what /proc shows of it.
        status: of the file.
    """
    if _kind_of(_Place("", "", link, status, written=False)) is None:
        return identify(link, status)
    return attrs.evolve(identify(without_deleted(link), status), content=content_key(status))


def identify_link(proc_path: str) -> FileIdentity:
    """Return the identity of the file behind a link of /proc/PID.

    Raises:
        OSError: it cannot be examined.
    """
    return identify_shown(os.readlink(proc_path), os.stat(proc_path))


def own_link(fd: Fd) -> str:
    """Return a path that leads to the file behind a descriptor of ours, to open it once more."""
    return f"{OWN_LINKS}{fd}"


def _has_its_name(place: _Place) -> bool:
    try:
        return os.path.samestat(os.stat(place.link), place.status)
    except OSError:
        return False


@functools.cache
def _nameless_device() -> int:
    """Return the device of the mount that holds memfd, shared anonymous and SysV memory."""
    fd = os.memfd_create("ckpt")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _problem_of(place: _Place, kind: ContentKind, limit_bytes: int) -> tuple[str, str]:
    """Return why it cannot travel, and what the user can do; empty if it can."""
    nameless = place.status.st_dev == _nameless_device()
    if kind is ContentKind.MEMFD and not nameless:
        return "is a memfd of huge pages, which is not supported yet", ""
    if kind is ContentKind.ANONYMOUS and place.path != "/dev/zero":
        return "is memory that a driver or the kernel made, which cannot be captured", ""
    n_bytes = _allocated_bytes(place.status)
    if kind is ContentKind.DELETED and not place.path.startswith(SHM) and n_bytes > limit_bytes:
        return (
            f"is deleted, and its {n_bytes} bytes are more than may travel in the image"
            f" ({limit_bytes})",
            f"--ghost-limit {n_bytes}",
        )
    return "", ""


def _allocated_bytes(status: os.stat_result) -> int:
    return min(status.st_size, status.st_blocks * _BLOCK_BYTES)


def _record(place: _Place, kind: ContentKind, space: str) -> ContentRecord:
    status = place.status
    path = place.path.removeprefix("/memfd:") if kind is ContentKind.MEMFD else place.path
    return ContentRecord(
        key=content_key(status),
        kind=str(kind),
        space=space,
        path=path,
        size_bytes=0 if kind is ContentKind.DIRECTORY else status.st_size,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        accessed_ns=status.st_atime_ns,
        modified_ns=status.st_mtime_ns,
        seals=_seals_of(place.proc_path) if kind is ContentKind.MEMFD else 0,
    )


def _seals_of(proc_path: str) -> int:
    fd = os.open(proc_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    finally:
        os.close(fd)


def restore(_record: ContentsRecord, _rebuilt: Rebuilt) -> Restore:
    """Do nothing inside the process: the restorer has made them, and it inherited them."""
    yield []


CONTENTS = Resource(
    "contents", ContentsRecord, Stage.MEMORY, capture=capture, restore=restore, look=look
)
