"""Memory that the kernel may drop (MAP_DROPPABLE, Linux 6.11), and whether there is any here."""

import mmap

MAP_DROPPABLE = 0x08


def can_be_dropped():
    try:
        mmap.mmap(-1, mmap.PAGESIZE, flags=MAP_DROPPABLE | mmap.MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True
