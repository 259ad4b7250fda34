"""How the processes of an image are shown: as ps, pmap and lsof would show them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ckpt.cli.output import say
from ckpt.engine.portrait import FileView, MappingView, ProcessView
from ckpt.engine.records import ZombieImage

_KIB = 1024
_FIRST_SURROGATE, _LAST_SURROGATE = "\ud800", "\udfff"
_PROCESS = "{:>8} {:>8} {:>8} {:>8} {:>6} {:>5} {:>7} {:>11} {:>11}  {}"
_MAPPING = "{:>26} {:4} {:>10} {:>10} {:>10} {:>10}  {}"
_FILE = "{:>5}{:1} {:14} {:>11} {:>5}  {}"


def say_processes(
    processes: Sequence[ProcessView], zombies: Sequence[ZombieImage], page_size: int
) -> None:
    """Print a line for each process, children below their parents."""
    say(
        _PROCESS.format(
            *("pid", "parent", "session", "group", "uid", "state", "threads"),
            *("virtual kB", "stored kB", "command"),
        )
    )
    depths = _depths(processes)
    for one in processes:
        say(
            _PROCESS.format(
                *(one.pid, one.parent or "-", one.session, one.group or "-", one.uid),
                *("T" if one.stopped else "R", len(one.threads)),
                one.virtual_bytes // _KIB,
                f"(of {one.shares_memory_of})"
                if one.shares_memory_of
                else one.stored_pages * page_size // _KIB,
                "  " * depths[one.pid] + _command_of(one),
            )
        )
    for zombie in zombies:
        place = zombie.place
        say(
            _PROCESS.format(
                *(zombie.pid, place.parent, place.session, place.group or "-", "-", "Z", 0, 0, 0),
                printable(f"[{zombie.comm}] <ended>"),
            )
        )


def _depths(processes: Iterable[ProcessView]) -> Mapping[int, int]:
    """Return how far below the root each process is; parents stand before their children."""
    depths: dict[int, int] = {}
    for one in processes:
        depths[one.pid] = depths.get(one.parent, -1) + 1
    return depths


def title_of(process: ProcessView) -> str:
    """Return pid and command, as they stand above what is told of a process."""
    return f"{process.pid} {_command_of(process)}"


def _command_of(process: ProcessView) -> str:
    """Return the arguments, or what ps shows where they are not to be found."""
    return printable(" ".join(process.command) or f"[{process.name}]")


def printable(name: str) -> str:
    """Return a name without what would move the cursor; bytes that are no text are left alone."""
    return "".join(
        letter
        if letter.isprintable() or _FIRST_SURROGATE <= letter <= _LAST_SURROGATE
        else letter.encode("unicode_escape").decode("ascii")
        for letter in name
    )


def say_mappings(process: ProcessView, page_size: int) -> None:
    """Print the mappings of a process, with how much of each the image holds."""
    say(title_of(process))
    say(_MAPPING.format("addresses", "", "kB", "stored kB", "zero kB", "file kB", "mapping"))
    for one in process.mappings:
        say(
            _MAPPING.format(
                f"{one.start:x}-{one.end:x}",
                one.access,
                one.size_bytes // _KIB,
                one.stored_pages * page_size // _KIB,
                one.zero_pages * page_size // _KIB,
                one.file_pages * page_size // _KIB,
                printable(one.name) or "(anonymous)",
            )
        )


def say_files(process: ProcessView) -> None:
    """Print the descriptors of a process; those with the same number share a description."""
    say(title_of(process))
    say(_FILE.format("fd", "", "kind", "offset", "open", "name"))
    say(_FILE.format("cwd", "", "directory", "", "", printable(process.directory)))
    say(_FILE.format("exe", "", "file", "", "", printable(process.executable)))
    for one in process.files:
        offset = "" if one.offset_bytes is None else str(one.offset_bytes)
        say(
            _FILE.format(one.fd, one.access, one.kind, offset, one.description, printable(one.name))
        )


def processes_as_json(processes: Iterable[ProcessView]) -> Iterator[dict[str, object]]:
    """Yield all that is known of each process."""
    for one in processes:
        yield {
            "pid": one.pid,
            "parent": one.parent,
            "session": one.session,
            "group": one.group,
            "stopped": one.stopped,
            "name": one.name,
            "command": list(one.command),
            "executable": one.executable,
            "directory": one.directory,
            "uid": one.uid,
            "gid": one.gid,
            "shares_memory_of": one.shares_memory_of or None,
            "virtual_bytes": one.virtual_bytes,
            "stored_pages": one.stored_pages,
            "threads": [{"tid": thread.tid, "name": thread.name} for thread in one.threads],
            "mappings": [mapping_as_json(mapping) for mapping in one.mappings],
            "files": [file_as_json(file) for file in one.files],
        }


def mapping_as_json(one: MappingView) -> dict[str, object]:
    """Return a mapping; addresses are numbers."""
    return {
        "start": one.start,
        "end": one.end,
        "access": one.access,
        "offset": one.offset_bytes,
        "name": one.name,
        "stored_pages": one.stored_pages,
        "zero_pages": one.zero_pages,
        "file_pages": one.file_pages,
    }


def file_as_json(one: FileView) -> dict[str, object]:
    """Return a descriptor."""
    return {
        "fd": one.fd,
        "access": one.access,
        "kind": one.kind,
        "name": one.name,
        "offset": one.offset_bytes,
        "close_on_exec": one.close_on_exec,
        "description": one.description,
    }
