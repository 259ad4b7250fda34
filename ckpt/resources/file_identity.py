"""Whether a file is still the one that a process had open or mapped.

A file is the same if size and modification time are equal; an ELF file also if its build-id is,
which survives a copy to another host.

Source: stat(2); the GNU build-id note (elf(5), NT_GNU_BUILD_ID).
"""

import os
import struct

import attrs


@attrs.frozen(slots=True, repr=False)
class FileIdentity:
    """A file as it was when the image was made."""

    path: str
    size_bytes: int
    mtime_ns: int
    build_id: str = ""
    """Hexadecimal; empty if it is no ELF file or has none."""
    content: str = ""
    """The key of its content in the image (`content_key`), if no name leads to the file."""


def content_key(status: os.stat_result) -> str:
    """Return what tells a file from all others of a moment."""
    return f"{status.st_dev:x}:{status.st_ino:x}"


def without_deleted(link: str) -> str:
    """Return the name that a file without a name once had, from what /proc shows of it."""
    return link.removesuffix(" (deleted)")


def identify(path: str, status: os.stat_result) -> FileIdentity:
    """Return the identity of an open or mapped file, without its build-id.

    Args:
        path: its name, as a restore will open it.
        status: of the very file that the process has, which `path` may no longer name.
    """
    return FileIdentity(path, status.st_size, status.st_mtime_ns)


def with_build_id(identity: FileIdentity) -> FileIdentity:
    """Return the identity completed by the build-id that the file has; takes milliseconds."""
    if identity.content:
        return identity
    return attrs.evolve(identity, build_id=read_build_id(identity.path))


_EI_CLASS64_LSB = b"\x7fELF\x02\x01"
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_PT_NOTE, _NT_GNU_BUILD_ID = 4, 3
_MAX_NOTES_BYTES = 1 << 16


def read_build_id(path: str) -> str:
    """Return the build-id of a 64-bit ELF file in hexadecimal, empty if there is none.

    Reads the program headers and the notes, nothing else: a library parses all sections, 40 ms for
    each file.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(_EHDR.size)
            if len(header) < _EHDR.size or not header.startswith(_EI_CLASS64_LSB):
                return ""
            fields = _EHDR.unpack(header)
            offset, size, count = fields[5], fields[9], fields[10]
            if size != _PHDR.size:
                return ""
            file.seek(offset)
            raw = file.read(size * count)
            for kind, _, at, _, _, len_bytes, _, _ in _PHDR.iter_unpack(raw[: len(raw) // 56 * 56]):
                if kind == _PT_NOTE and len_bytes <= _MAX_NOTES_BYTES:
                    file.seek(at)
                    build_id = _find_build_id(file.read(len_bytes))
                    if build_id:
                        return build_id
    except OSError:
        pass
    return ""


def _find_build_id(notes: bytes) -> str:
    at = 0
    while at + _NOTE.size <= len(notes):
        name_bytes, desc_bytes, kind = _NOTE.unpack_from(notes, at)
        name_at = at + _NOTE.size
        desc_at = name_at + (name_bytes + 3) // 4 * 4
        if kind == _NT_GNU_BUILD_ID and notes[name_at : name_at + name_bytes] == b"GNU\0":
            return notes[desc_at : desc_at + desc_bytes].hex()
        at = desc_at + (desc_bytes + 3) // 4 * 4
    return ""


def describe_absence(recorded: FileIdentity) -> str:
    """Return why there is no file of that name; empty if there is one, whatever is in it."""
    try:
        os.stat(recorded.path)
    except FileNotFoundError:
        return "does not exist any more"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def describe_loss(recorded: FileIdentity) -> str:
    """Return what is gone of a file that may have changed; empty if it is as long as it was."""
    absence = describe_absence(recorded)
    if absence:
        return absence
    now = os.stat(recorded.path)
    if now.st_size < recorded.size_bytes:
        return f"has {now.st_size} bytes now, had {recorded.size_bytes}"
    return ""


def describe_change(recorded: FileIdentity) -> str:
    """Return how the file differs from what was recorded; empty if it is the same."""
    absence = describe_absence(recorded)
    if absence:
        return absence
    now = os.stat(recorded.path)
    if now.st_size == recorded.size_bytes and now.st_mtime_ns == recorded.mtime_ns:
        return ""
    if recorded.build_id and read_build_id(recorded.path) == recorded.build_id:
        return ""
    if now.st_size != recorded.size_bytes:
        return f"has {now.st_size} bytes now, had {recorded.size_bytes}"
    return "was written to since the checkpoint"
