"""Memory for page frames on their way in: touched once, used again and again.

Fresh memory costs more than decrypting what is read into it. How many there are is what the sender
can be ahead of us; when all are in use, it waits. Neighbours: `channel` asks for a `Place`.
"""

import mmap
from queue import SimpleQueue

from ckpt.image.pages import MAX_FRAME_BYTES


class FrameBuffers:
    """`channel.receive(Pages, place=buffers.take)`, and `give_back(pages.frame.stored)` later."""

    def __init__(self, n_frames: int) -> None:
        """Make room for `n_frames` page frames of any size."""
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        for _ in range(n_frames):
            self._free.put(mmap.mmap(-1, MAX_FRAME_BYTES, flags=flags))

    def take(self, n_bytes: int) -> memoryview:
        """Return the beginning of a free buffer; waits until one is given back."""
        return memoryview(self._free.get())[:n_bytes]

    def give_back(self, stored: bytes | memoryview) -> None:
        """Free what `take` returned, from any thread; anything else is left alone."""
        if isinstance(stored, memoryview) and isinstance(stored.obj, mmap.mmap):
            self._free.put(stored.obj)
