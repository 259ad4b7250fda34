"""How an ioctl number is made of direction, size, type and number.

Source: include/uapi/asm-generic/ioctl.h (x86 and arm64 use it as it is), ioctl(2).
"""

import ctypes
import fcntl
from typing import Final

_NR_SHIFT: Final = 0
_TYPE_SHIFT: Final = 8
_SIZE_SHIFT: Final = 16
_DIR_SHIFT: Final = 30
_SIZE_MAX: Final = (1 << 14) - 1

_NONE: Final = 0
_WRITE: Final = 1
_READ: Final = 2

Argument = type[ctypes.Structure] | int
"""The C type behind the pointer, or its size in bytes."""


def _number(direction: int, kind: str | int, nr: int, argument: Argument) -> int:
    size = argument if isinstance(argument, int) else ctypes.sizeof(argument)
    if not 0 <= size <= _SIZE_MAX:
        raise ValueError(f"an ioctl argument has at most {_SIZE_MAX} bytes, not {size}")
    letter = kind if isinstance(kind, int) else ord(kind)
    return direction << _DIR_SHIFT | size << _SIZE_SHIFT | letter << _TYPE_SHIFT | nr << _NR_SHIFT


def io(kind: str | int, nr: int) -> int:
    """`_IO(type, nr)`: no argument. `kind` is one character or its code."""
    return _number(_NONE, kind, nr, 0)


def ior(kind: str | int, nr: int, argument: Argument) -> int:
    """`_IOR(type, nr, argument)`: user space reads, the kernel writes."""
    return _number(_READ, kind, nr, argument)


def iow(kind: str | int, nr: int, argument: Argument) -> int:
    """`_IOW(type, nr, argument)`: user space writes, the kernel reads."""
    return _number(_WRITE, kind, nr, argument)


def iowr(kind: str | int, nr: int, argument: Argument) -> int:
    """`_IOWR(type, nr, argument)`: both directions."""
    return _number(_READ | _WRITE, kind, nr, argument)


def call(fd: int, request: int, argument: ctypes.Structure) -> int:
    """Make the ioctl; what the kernel writes is in `argument` afterwards.

    Returns:
        the call's result, 0 for most.

    Raises:
        OSError: the call failed.
    """
    result: int = fcntl.ioctl(fd, request, argument, True)
    return result
