"""POSIX message queues of this thread's IPC namespace.

Source: mq_overview(7), mq_open(2), mq_getsetattr(2), mq_unlink(2), ipc/mqueue.c.
"""

import ctypes
import os
import re
import struct

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall, writable_address
from ckpt.units import Fd

_MQUEUE_MAGIC = 0x19800202
_STATFS_BYTES = 120
_WORD = struct.Struct("<q")
_MQ_ATTR = struct.Struct("<4q32x")
"""`struct mq_attr`: flags, maximum of messages, their maximal size, messages in it."""
_STATE = re.compile(r"QSIZE:(\d+)\s+NOTIFY:(\d+)\s+SIGNO:(\d+)\s+NOTIFY_PID:(\d+)")
_STATE_BYTES = 256
FILE_BYTES = 80
"""What stat(2) tells of the size of each queue."""


@attrs.frozen(slots=True, repr=False)
class Attributes:
    """`struct mq_attr`."""

    max_messages: int
    max_message_bytes: int
    n_messages: int


def is_mqueue(path: str) -> bool:
    """Tell whether a path leads to a message queue.

    Raises:
        OSError: it leads nowhere.
    """
    raw = bytearray(_STATFS_BYTES)
    named = os.fsencode(path) + b"\0"
    syscall(NR.statfs, readable_address(named)[0], writable_address(raw)[0])
    return bool(_WORD.unpack_from(raw)[0] == _MQUEUE_MAGIC)


def mq_open(name: str, flags: int, mode: int = 0, attributes: Attributes | None = None) -> Fd:
    """Open a queue, or make one; `name` without the slash."""
    named = ctypes.create_string_buffer(os.fsencode(name))
    raw = b""
    if attributes is not None:
        raw = _MQ_ATTR.pack(0, attributes.max_messages, attributes.max_message_bytes, 0)
    at = readable_address(raw)[0] if raw else 0
    return Fd(syscall(NR.mq_open, ctypes.addressof(named), flags, mode, at))


def mq_unlink(name: str) -> None:
    """Remove the name of a queue; given without the slash."""
    named = ctypes.create_string_buffer(os.fsencode(name))
    syscall(NR.mq_unlink, ctypes.addressof(named))


def mq_getattr(fd: Fd) -> Attributes:
    """Return what a queue may hold and how many messages are in it."""
    raw = bytearray(_MQ_ATTR.size)
    syscall(NR.mq_getsetattr, fd, 0, writable_address(raw)[0])
    _, max_messages, max_message_bytes, n_messages = _MQ_ATTR.unpack(raw)
    return Attributes(max_messages, max_message_bytes, n_messages)


def read_notified(fd: Fd) -> int:
    """Return who is to be told of the next message: a pid in our namespace, 0 for nobody."""
    found = _STATE.search(os.pread(fd, _STATE_BYTES, 0).decode("ascii"))
    return int(found[4]) if found else 0
