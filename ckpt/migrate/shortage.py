"""What Python raises where a host has no room, told to the peer like any other trouble."""

import contextlib
import errno
from collections.abc import Iterator

from ckpt.errors import HostFull

_NO_ROOM = {errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
_REMEDY = "make room there and try again"


class Untold(Exception):
    """There was no room when it was too late to refuse: the tree may run here."""


@contextlib.contextmanager
def shortage_named() -> Iterator[None]:
    """Name a shortage of memory, processes, descriptors or space in the block.

    Raises:
        HostFull: there was one.
    """
    try:
        yield
    except MemoryError as error:
        raise HostFull("no memory is left", _REMEDY) from error
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise HostFull(f"this host is full ({error.strerror})", _REMEDY) from error
    except RuntimeError as error:
        # So says Python when the kernel makes no thread.
        if "start new thread" not in str(error):
            raise
        raise HostFull("no process or thread can be made", _REMEDY) from error


@contextlib.contextmanager
def shortage_untold() -> Iterator[None]:
    """Keep one from being told in the block as a refusal: a source takes that for its own tree.

    Raises:
        Untold: there was one; the heir finds out what became of the tree.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        raise Untold from error
