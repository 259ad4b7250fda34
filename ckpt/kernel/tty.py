"""Terminals and pseudo-terminals: the ioctls of tty devices, on a descriptor of ours.

Settings of a pseudo-terminal that are asked for on its master are those of its slave: the master's
own are fixed, and no ioctl shows them.

Source: include/uapi/asm-generic/{ioctls,termbits}.h, ioctl_tty(2), pty(7), drivers/tty/pty.c.
"""

import fcntl
import os
import select
import struct
from typing import Final

from ckpt.kernel import ioctl
from ckpt.units import Fd

TERMIOS2_BYTES: Final = 44
"""`struct termios2`: four flag words, the line discipline, 19 control characters, two speeds."""
TERMIOS_BYTES: Final = 36
"""The kernel's `struct termios`: the same without the speeds."""

PTMX_DEVICE: Final = os.makedev(5, 2)
CONTROLLING_DEVICE: Final = os.makedev(5, 0)
"""/dev/tty: whoever opens it gets the terminal that controls his session."""
SLAVE_MAJOR: Final = 136
"""Of /dev/pts/N; N is the minor number."""
N_TTY: Final = 0

TIOCEXCL: Final = 0x540C
TIOCSCTTY: Final = 0x540E
TIOCSPGRP: Final = 0x5410
TIOCNOTTY: Final = 0x5422
TCSETS2: Final = ioctl.iow("T", 0x2B, TERMIOS2_BYTES)

_INT: Final = struct.Struct("<i")
_WINSIZE: Final = struct.Struct("<4H")
TIOCGWINSZ: Final = 0x5413
_TIOCSWINSZ: Final = 0x5414
_TIOCSTI: Final = 0x5412
_FIONREAD: Final = 0x541B
_TIOCPKT: Final = 0x5420
_TIOCGETD: Final = 0x5424
_TIOCGLCKTRMIOS: Final = 0x5456
_TIOCSLCKTRMIOS: Final = 0x5457
_TCGETS2: Final = ioctl.ior("T", 0x2A, TERMIOS2_BYTES)
_TIOCGPTN: Final = ioctl.ior("T", 0x30, 4)
_TIOCSPTLCK: Final = ioctl.iow("T", 0x31, 4)
_TIOCGDEV: Final = ioctl.ior("T", 0x32, 4)
_TIOCGPKT: Final = ioctl.ior("T", 0x38, 4)
_TIOCGPTLCK: Final = ioctl.ior("T", 0x39, 4)
_TIOCGEXCL: Final = ioctl.ior("T", 0x40, 4)
_TIOCGPTPEER: Final = ioctl.io("T", 0x41)

Size = tuple[int, int, int, int]
"""Rows, columns, and the same in pixels (x, y)."""


def _get_int(fd: int, request: int) -> int:
    (value,) = _INT.unpack(fcntl.ioctl(fd, request, bytes(_INT.size)))
    return int(value)


def get_settings(fd: int) -> bytes:
    """Return the `struct termios2`.

    Raises:
        OSError: ENOTTY, it is no terminal; EIO, it was hung up.
    """
    return fcntl.ioctl(fd, _TCGETS2, bytes(TERMIOS2_BYTES))


def set_settings(fd: int, settings: bytes) -> None:
    """Set the `struct termios2` at once; what is queued stays."""
    fcntl.ioctl(fd, TCSETS2, settings)


def get_locked_settings(fd: int) -> bytes:
    """Return which bits of the settings are locked (ioctl_tty(2) TIOCGLCKTRMIOS)."""
    return fcntl.ioctl(fd, _TIOCGLCKTRMIOS, bytes(TERMIOS_BYTES))


def lock_settings(fd: int, locked: bytes) -> None:
    """Lock bits of the settings, as `get_locked_settings` gave them."""
    fcntl.ioctl(fd, _TIOCSLCKTRMIOS, locked)


def get_size(fd: int) -> Size:
    """Return the size of the window."""
    rows, columns, x_pixels, y_pixels = _WINSIZE.unpack(
        fcntl.ioctl(fd, TIOCGWINSZ, bytes(_WINSIZE.size))
    )
    return rows, columns, x_pixels, y_pixels


def set_size(fd: int, size: Size) -> None:
    """Set the size of the window; a foreground group hears of a change by SIGWINCH."""
    fcntl.ioctl(fd, _TIOCSWINSZ, _WINSIZE.pack(*size))


def get_discipline(fd: int) -> int:
    """Return the number of the line discipline, of this side of a pseudo-terminal."""
    return _get_int(fd, _TIOCGETD)


def get_device(fd: int) -> int:
    """Return the device number of the terminal behind /dev/tty; of a master, its slave's."""
    return _get_int(fd, _TIOCGDEV) & 0xFFFF_FFFF


def is_exclusive(fd: int) -> bool:
    """Tell whether nobody else may open this side (TIOCEXCL)."""
    return bool(_get_int(fd, _TIOCGEXCL))


def make_exclusive(fd: int) -> None:
    """Let nobody else open this side, but whoever has CAP_SYS_ADMIN."""
    fcntl.ioctl(fd, TIOCEXCL)


def get_number(master: int) -> int:
    """Return the N of /dev/pts/N."""
    return _get_int(master, _TIOCGPTN)


def is_locked(master: int) -> bool:
    """Tell whether the slave cannot be opened (unlockpt(3))."""
    return bool(_get_int(master, _TIOCGPTLCK))


def set_locked(master: int, *, locked: bool) -> None:
    """Lock or unlock the slave."""
    fcntl.ioctl(master, _TIOCSPTLCK, _INT.pack(locked))


def is_in_packet_mode(master: int) -> bool:
    """Tell whether reads of the master begin with a byte of control (TIOCPKT)."""
    return bool(_get_int(master, _TIOCGPKT))


def set_packet_mode(master: int, *, on: bool = True) -> None:
    """Switch packet mode on or off; on, it forgets changes of state that nobody has read."""
    fcntl.ioctl(master, _TIOCPKT, _INT.pack(on))


def open_peer(master: int, flags: int) -> Fd:
    """Open the slave of a master, whatever is mounted where; flags of open(2) as they are.

    Raises:
        OSError: EIO, the slave is locked.
    """
    # Here the kernel would keep O_CLOEXEC as a flag of the description, and show it in fdinfo.
    fd = Fd(fcntl.ioctl(master, _TIOCGPTPEER, flags & ~os.O_CLOEXEC | os.O_NOCTTY))
    os.set_inheritable(fd, False)
    return fd


def push_input(fd: int, byte: bytes) -> None:
    """Do as if a byte had come in just now from the other side (TIOCSTI).

    Raises:
        OSError: EPERM or EIO, we have no CAP_SYS_ADMIN.
    """
    fcntl.ioctl(fd, _TIOCSTI, byte)


def count_readable(fd: int) -> int:
    """Return how many bytes a read would find: of canonical input, only lines that are complete."""
    return _get_int(fd, _FIONREAD)


def poll_now(fd: int) -> int:
    """Return the events of poll(2) without waiting; moves what is under way into the queue."""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLPRI | select.POLLOUT)
    return dict(poll.poll(0)).get(fd, 0)
