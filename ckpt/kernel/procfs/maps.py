"""/proc/PID/maps and the VmFlags of smaps: the mappings of an address space.

Source: proc_pid_maps(5), proc_pid_smaps(5), fs/proc/task_mmu.c.

Two things the text cannot tell apart, because the kernel escapes nothing but newlines: a file
whose name contains a backslash followed by 012, and a file whose name really ends in
" (deleted)". Where it matters, ask the link in /proc/PID/map_files.
"""

from collections.abc import Iterable, Iterator

import attrs

from ckpt.kernel.procfs.files import read_text
from ckpt.units import AddrRange, Pid, RemoteAddr, Tid

_DELETED = " (deleted)"
_NEWLINE_ESCAPE = "\\012"


@attrs.frozen(slots=True, repr=False)
class Vma:
    """One mapping, as /proc shows it."""

    span: AddrRange
    readable: bool
    writable: bool
    executable: bool
    shared: bool
    offset_bytes: int
    """Where in the file it starts; for System V memory too; 0 if anonymous."""
    dev: tuple[int, int]
    """Major and minor number; (0, 0) if anonymous. On btrfs and overlayfs not those of stat."""
    inode: int
    """0 if anonymous; of System V memory it is the id, which may be 0 too."""
    path: str | None
    """As seen from the root of the reader, without " (deleted)"; `[heap]` and the like as they
    are; None if there is none."""
    deleted: bool
    """The file has no name any more (all of memfd, shared anonymous and System V memory)."""
    flags: frozenset[str] = frozenset()
    """The two-letter codes of VmFlags (`rd`, `gd`, `um`, ...); empty if parsed from maps."""
    protection_key: int = 0
    """Of pkey_mprotect(2); 0, which all memory has at first, also if parsed from maps."""

    @property
    def perms(self) -> str:
        """Four letters, as in maps: `rw-p`."""
        return (
            ("r" if self.readable else "-")
            + ("w" if self.writable else "-")
            + ("x" if self.executable else "-")
            + ("s" if self.shared else "p")
        )

    @property
    def is_file(self) -> bool:
        """Tell whether a file is behind it: also a nameless one, such as memfd or /dev/zero."""
        return self.inode != 0 or self.dev != (0, 0)

    @property
    def anon_name(self) -> str | None:
        """The name given by PR_SET_VMA_ANON_NAME, if any."""
        for prefix in ("[anon:", "[anon_shmem:"):
            if self.path is not None and self.path.startswith(prefix):
                return self.path[len(prefix) : -1]
        return None


def parse_maps(text: str) -> list[Vma]:
    """Parse /proc/PID/maps; ascending and disjoint, as the kernel lists them.

    Raises:
        ValueError: a line is not of the known form.
    """
    return [_parse_line(line) for line in _lines_of(text)]


def _lines_of(text: str) -> list[str]:
    # Not splitlines: a file name may contain the other characters that end a line in Unicode.
    return [line for line in text.split("\n") if line]


def parse_smaps(text: str) -> list[Vma]:
    """Parse /proc/PID/smaps; like `parse_maps`, with flags and key set and all sizes left out.

    Raises:
        ValueError: a line is not of the known form.
    """
    return [vma for _, vma in iter_smaps(text)]


def iter_smaps(text: str) -> Iterator[tuple[str, Vma]]:
    """Parse /proc/PID/smaps; yield each mapping with the line that maps has for it.

    Raises:
        ValueError: a line is not of the known form.
    """
    header = ""
    flags: frozenset[str] = frozenset()
    key = 0
    for line in text.split("\n"):
        if line.startswith("VmFlags:"):
            flags = frozenset(line[len("VmFlags:") :].split())
        elif line.startswith("ProtectionKey:"):
            key = int(line[len("ProtectionKey:") :])
        elif line and not line[0].isupper():
            # Fields start with a capital letter, mappings with a hexadecimal (small) digit.
            if header:
                yield header, _parse_line(header, flags, key)
            header, flags, key = line, frozenset(), 0
    if header:
        yield header, _parse_line(header, flags, key)


def _parse_line(line: str, flags: frozenset[str] = frozenset(), protection_key: int = 0) -> Vma:
    fields = line.split(" ", 5)
    if len(fields) < 5 or len(fields[1]) != 4:
        raise ValueError(f"not a line of /proc/PID/maps: {line!r}")
    start, _, end = fields[0].partition("-")
    major, _, minor = fields[3].partition(":")
    path: str | None = fields[5].lstrip(" ") if len(fields) > 5 else None
    deleted = False
    if path:
        # Names in brackets are the kernel's or checked by it: nothing in them is escaped.
        if not path.startswith("["):
            deleted = path.endswith(_DELETED)
            path = path.removesuffix(_DELETED).replace(_NEWLINE_ESCAPE, "\n")
    else:
        path = None
    perms = fields[1]
    return Vma(
        span=AddrRange(RemoteAddr(int(start, 16)), RemoteAddr(int(end, 16))),
        readable=perms[0] == "r",
        writable=perms[1] == "w",
        executable=perms[2] == "x",
        shared=perms[3] == "s",
        offset_bytes=int(fields[2], 16),
        dev=(int(major, 16), int(minor, 16)),
        inode=int(fields[4]),
        path=path,
        deleted=deleted,
        flags=flags,
        protection_key=protection_key,
    )


def read_maps(pid: Pid | Tid) -> list[Vma]:
    """Read /proc/PID/maps; empty for a kernel thread and for a zombie.

    State:  while the target runs, mappings that change during the reading may be there twice,
        in part, or not at all.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access is refused.
    """
    return parse_lines(read_lines(pid))


def parse_lines(lines: Iterable[str]) -> list[Vma]:
    """Parse what `read_lines` returns.

    Raises:
        ValueError: a line is not of the known form.
    """
    parsed = {line: _known.get(line) or _parse_line(line) for line in lines}
    if len(_known) > _MOST_KNOWN:
        _known.clear()
    _known.update(parsed)
    return list(parsed.values())


_known: dict[str, Vma] = {}
"""Lines that were parsed, of any process. A dump reads those of a tree several times, and little
has changed each time; to parse ten thousand takes 30 ms."""
_MOST_KNOWN = 20_000
"""With so many it begins anew: some 10 MB."""


def read_lines(pid: Pid | Tid) -> list[str]:
    """Read the lines of /proc/PID/maps, as they are.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access is refused.
    """
    return _lines_of(read_text(pid, "maps"))


def read_smaps(pid: Pid | Tid) -> list[Vma]:
    """Read /proc/PID/smaps, for the flags; walks all page tables: some 10 ms a GiB.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access is refused.
    """
    return list(read_smaps_by_line(pid).values())


def read_smaps_by_line(pid: Pid | Tid) -> dict[str, Vma]:
    """Read /proc/PID/smaps; the key of each mapping is the line that maps has for it.

    Raises:
        TargetGone: the process ended.
        NotPermitted: ptrace access is refused.
    """
    return dict(iter_smaps(read_text(pid, "smaps")))
