"""Whether a file is still the one that a process had open or mapped.

A file is the same if size and modification time are equal; an ELF file also if its build-id is,
which survives a copy to another host.

Source: stat(2); the GNU build-id note (elf(5), NT_GNU_BUILD_ID).
"""

import os
import stat

import attrs


@attrs.frozen(slots=True)
class FileIdentity:
    """A file as it was when the image was made."""

    path: str
    size_bytes: int
    mtime_ns: int
    build_id: str = ""
    """Hexadecimal; empty if it is no ELF file or has none."""


def identify(path: str, status: os.stat_result, *, executable: bool) -> FileIdentity:
    """Return the identity of an open or mapped file.

    Args:
        path: its name, as a restore will open it.
        status: of the very file that the process has, which `path` may no longer name.
        executable: whether it is mapped executable; only then a build-id is looked for.
    """
    build_id = read_build_id(path) if executable and stat.S_ISREG(status.st_mode) else ""
    return FileIdentity(path, status.st_size, status.st_mtime_ns, build_id)


def read_build_id(path: str) -> str:
    """Return the build-id of an ELF file in hexadecimal, empty if there is none."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import NoteSegment

    try:
        with open(path, "rb") as file:
            for segment in ELFFile(file).iter_segments():
                if not isinstance(segment, NoteSegment):
                    continue
                for note in segment.iter_notes():
                    if note["n_type"] == "NT_GNU_BUILD_ID":
                        return str(note["n_desc"])
    except (OSError, ELFError):
        pass
    return ""


def describe_change(recorded: FileIdentity) -> str:
    """Return how the file differs from what was recorded; empty if it is the same."""
    try:
        now = os.stat(recorded.path)
    except FileNotFoundError:
        return "does not exist any more"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if now.st_size == recorded.size_bytes and now.st_mtime_ns == recorded.mtime_ns:
        return ""
    if recorded.build_id and read_build_id(recorded.path) == recorded.build_id:
        return ""
    if now.st_size != recorded.size_bytes:
        return f"has {now.st_size} bytes now, had {recorded.size_bytes}"
    return "was written to since the checkpoint"
