"""System V IPC: shared memory segments, semaphore sets, message queues of this IPC namespace.

Source: sysvipc(7), shmget(2), shmop(2), shmctl(2), semget(2), semctl(2), msgget(2), msgop(2),
msgctl(2), proc_sysvipc(5); include/uapi/linux/{ipc,shm,sem,msg}.h,
include/uapi/asm-generic/{ipcbuf,shmbuf,msgbuf}.h; Documentation/admin-guide/sysctl/kernel.rst
(`shm_next_id` and its like, CONFIG_CHECKPOINT_RESTORE).
"""

import ctypes
import errno
import re
import struct
from pathlib import Path

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall, writable_address
from ckpt.units import RemoteAddr

IPC_PRIVATE = 0
IPC_CREAT, IPC_EXCL, IPC_NOWAIT = 0o1000, 0o2000, 0o4000
IPC_RMID, IPC_SET, IPC_STAT = 0, 1, 2
SHM_LOCK = 11
SHM_RDONLY, SHM_EXEC = 0o10000, 0o100000
SHM_DEST, SHM_LOCKED = 0o1000, 0o2000
"""In the mode of a segment: it ends with its last attachment; it may not be swapped."""
PERMISSIONS = 0o777
GETALL, SETALL = 13, 17
MSG_COPY = 0o40000

SEGMENT_PATH = "/SYSV"
"""How /proc/PID/maps calls an attached segment, before its key in hexadecimal digits."""
_SEGMENT = re.compile(rf"{SEGMENT_PATH}[0-9a-f]{{8}}")

_PERM = struct.Struct("<i5I24x")
"""`struct ipc64_perm`, 48 bytes: key, uid, gid, cuid, cgid, mode."""
_SHMID_DS_BYTES, _SEMID_DS_BYTES, _MSQID_DS_BYTES = 112, 104, 120
_SHM_SEGSZ_AT, _SHM_NATTCH_AT, _MSG_QBYTES_AT = 48, 88, 88
_WORD = struct.Struct("<Q")
_SYSCTL = Path("/proc/sys/kernel")


@attrs.frozen(slots=True, repr=False)
class Permissions:
    """Whose an object is and who may use it."""

    key: int
    """As a signed number; 0 (IPC_PRIVATE) if it has none."""
    uid: int
    gid: int
    mode: int
    """Permission bits; of a segment also SHM_DEST and SHM_LOCKED."""


@attrs.frozen(slots=True, repr=False)
class Listed:
    """One line of /proc/sysvipc/shm, sem or msg."""

    id: int
    permissions: Permissions
    fields: dict[str, int]
    """All columns but the permissions, by the names in the first line."""


def parse_sysvipc(text: str) -> list[Listed]:
    """Parse /proc/sysvipc/shm, sem or msg.

    Raises:
        ValueError: a line has not as many numbers as the first one has names.
    """
    head, *lines = text.splitlines()
    names = head.split()
    listed = []
    for line in lines:
        raw = dict(zip(names, line.split(), strict=True))
        mode = int(raw.pop("perms"), 8)
        fields = {name: int(word) for name, word in raw.items()}
        permissions = Permissions(fields["key"], fields["uid"], fields["gid"], mode)
        number = next(fields[name] for name in names if name.endswith("id"))
        listed.append(Listed(number, permissions, fields))
    return listed


def read_sysvipc(name: str) -> list[Listed]:
    """Read /proc/sysvipc/`name` (shm, sem or msg) of this thread's IPC namespace."""
    try:
        return parse_sysvipc(Path(f"/proc/sysvipc/{name}").read_text(encoding="ascii"))
    except FileNotFoundError:
        # A kernel without CONFIG_SYSVIPC has no such objects.
        return []


def choose_next_id(name: str, number: int) -> None:
    """Have the next object of a kind (shm, sem or msg) get this id, if nobody has it. Linux 3.9.

    Raises:
        OSError: we may not (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE), or cannot.
    """
    (_SYSCTL / f"{name}_next_id").write_text(str(number), encoding="ascii")


def _pack_perm(permissions: Permissions) -> bytes:
    mode = permissions.mode & PERMISSIONS
    return _PERM.pack(permissions.key, permissions.uid, permissions.gid, 0, 0, mode)


def _control(nr: NR, number: int, command: int, raw: bytearray) -> None:
    address, _ = writable_address(raw)
    if nr is NR.semctl:
        syscall(nr, number, 0, command, address)
    else:
        syscall(nr, number, command, address)


def is_segment(path: str | None) -> bool:
    """Tell whether a path of /proc/PID/maps is that of an attached segment."""
    return path is not None and _SEGMENT.fullmatch(path) is not None


# -- shared memory -------------------------------------------------------------------------------


def shmget(key: int, size_bytes: int, flags: int) -> int:
    """Make or find a segment."""
    return syscall(NR.shmget, key & 0xFFFF_FFFF, size_bytes, flags)


def shmat(number: int, flags: int = 0) -> RemoteAddr:
    """Attach a segment to this process wherever there is room; see shmop(2)."""
    return RemoteAddr(syscall(NR.shmat, number, 0, flags))


def shmdt(address: RemoteAddr) -> None:
    """Detach what is attached at an address; see shmop(2)."""
    syscall(NR.shmdt, address)


def read_segment_size(number: int) -> int:
    """Return how many bytes a segment has.

    Raises:
        OSError: there is none, or we may not read it.
    """
    raw = bytearray(_SHMID_DS_BYTES)
    _control(NR.shmctl, number, IPC_STAT, raw)
    return int(_WORD.unpack_from(raw, _SHM_SEGSZ_AT)[0])


def read_attachments(number: int) -> int:
    """Return how often a segment is attached.

    Raises:
        OSError: there is none, or we may not read it.
    """
    raw = bytearray(_SHMID_DS_BYTES)
    _control(NR.shmctl, number, IPC_STAT, raw)
    return int(_WORD.unpack_from(raw, _SHM_NATTCH_AT)[0])


def set_segment(number: int, permissions: Permissions) -> None:
    """Give a segment owner and mode."""
    raw = bytearray(_pack_perm(permissions).ljust(_SHMID_DS_BYTES, b"\0"))
    _control(NR.shmctl, number, IPC_SET, raw)
    if permissions.mode & SHM_LOCKED:
        syscall(NR.shmctl, number, SHM_LOCK, 0)


def remove_segment(number: int) -> None:
    """Remove a segment; it lives on for as long as somebody has it attached."""
    syscall(NR.shmctl, number, IPC_RMID, 0)


# -- semaphores ----------------------------------------------------------------------------------


def semget(key: int, n_semaphores: int, flags: int) -> int:
    """Make or find a set of semaphores."""
    return syscall(NR.semget, key & 0xFFFF_FFFF, n_semaphores, flags)


def read_semaphores(number: int, n_semaphores: int) -> tuple[int, ...]:
    """Return the values of a set."""
    raw = bytearray(2 * n_semaphores)
    _control(NR.semctl, number, GETALL, raw)
    return struct.unpack(f"<{n_semaphores}H", raw)


def set_semaphores(number: int, values: tuple[int, ...], permissions: Permissions) -> None:
    """Give a set its values, owner and mode."""
    _control(NR.semctl, number, SETALL, bytearray(struct.pack(f"<{len(values)}H", *values)))
    raw = bytearray(_pack_perm(permissions).ljust(_SEMID_DS_BYTES, b"\0"))
    _control(NR.semctl, number, IPC_SET, raw)


def remove_semaphores(number: int) -> None:
    """Remove a set."""
    syscall(NR.semctl, number, 0, IPC_RMID, 0)


# -- message queues ------------------------------------------------------------------------------


def msgget(key: int, flags: int) -> int:
    """Make or find a queue."""
    return syscall(NR.msgget, key & 0xFFFF_FFFF, flags)


def read_queue_limit(number: int) -> int:
    """Return how many bytes a queue may hold."""
    raw = bytearray(_MSQID_DS_BYTES)
    _control(NR.msgctl, number, IPC_STAT, raw)
    return int(_WORD.unpack_from(raw, _MSG_QBYTES_AT)[0])


def set_queue(number: int, limit_bytes: int, permissions: Permissions) -> None:
    """Give a queue its limit, owner and mode."""
    raw = bytearray(_pack_perm(permissions).ljust(_MSQID_DS_BYTES, b"\0"))
    _WORD.pack_into(raw, _MSG_QBYTES_AT, limit_bytes)
    _control(NR.msgctl, number, IPC_SET, raw)


def copy_message(number: int, index: int, room_bytes: int) -> tuple[int, bytes] | None:
    """Return type and text of a message that stays in its queue; None behind the last one.

    Linux 3.8, CONFIG_CHECKPOINT_RESTORE.
    """
    raw = bytearray(_WORD.size + room_bytes)
    address, _ = writable_address(raw)
    flags = MSG_COPY | IPC_NOWAIT
    try:
        n = syscall(NR.msgrcv, number, address, room_bytes, index, flags)
    except OSError as error:
        if error.errno == errno.ENOMSG:
            return None
        raise
    return int(_WORD.unpack_from(raw)[0]), bytes(raw[_WORD.size : _WORD.size + n])


def send_message(number: int, kind: int, text: bytes) -> None:
    """Append a message to a queue that has room."""
    raw = _WORD.pack(kind) + text
    address, _ = readable_address(raw)
    syscall(NR.msgsnd, number, address, len(text), IPC_NOWAIT)


def remove_queue(number: int) -> None:
    """Remove a queue and all that is in it."""
    syscall(NR.msgctl, number, IPC_RMID, 0)


def write_attached(address: RemoteAddr, offset: int, data: bytes) -> None:
    """Write into a segment that is attached to this process."""
    ctypes.memmove(address + offset, data, len(data))
