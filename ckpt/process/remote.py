"""Remote system calls as data: what a stopped task shall ask the kernel, and what came back.

Pure: packs calls with their memory arguments into the bytes that an arena holds, and reads the
replies from those bytes after the run. `arena.py` runs them.

A memory argument is named by what it is, and the arena gives it an address:

    call(NR.getitimer, ITIMER_REAL, Out(32))      the kernel fills 32 bytes
    call(NR.sched_setaffinity, 0, 8, In(mask))    the kernel reads these bytes
"""

import errno
import os
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import overload

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.units import RemoteAddr

_ALIGN = 16
_MAX_ERRNO = 4095
_LARGE = 4096


@attrs.frozen(slots=True, repr=False)
class In:
    """Bytes that the call reads."""

    data: bytes
    pointers: tuple[tuple[int, bytes], ...] = ()
    """Where `data` holds a pointer (offset in bytes), and the bytes that it shall point to."""


@attrs.frozen(slots=True, repr=False)
class Out:
    """Room that the call fills; the reply holds it."""

    size: int


@attrs.frozen(slots=True, repr=False)
class InOut:
    """Bytes that the call reads and changes; the reply holds the changed ones."""

    data: bytes


Argument = int | In | Out | InOut


@attrs.frozen(slots=True, repr=False)
class Call:
    """One system call to be run by a stopped task."""

    nr: NR
    args: tuple[Argument, ...]

    def __str__(self) -> str:
        """Write it like strace, memory arguments by their size."""
        return f"{self.nr.name}({', '.join(map(_show, self.args))})"


def _show(argument: Argument) -> str:
    if not isinstance(argument, int):
        return "&..."
    return hex(argument) if argument > _LARGE else str(argument)


def call(nr: NR, *args: Argument) -> Call:
    """Return the call `nr(args...)`."""
    return Call(nr, args)


@attrs.frozen(slots=True, repr=False)
class Reply:
    """What one call returned: the kernel's own word and the memory it filled."""

    asked: Call
    value: int
    outs: tuple[bytes, ...] = ()

    @property
    def error(self) -> int:
        """The errno, 0 if the call did what it should."""
        return -self.value if -_MAX_ERRNO <= self.value < 0 else 0

    @property
    def ok(self) -> bool:
        """Tell whether the call did what it should."""
        return not self.error

    def __str__(self) -> str:
        """Write call and result like strace."""
        if self.ok:
            return f"{self.asked} = {self.value}"
        name = errno.errorcode.get(self.error, str(self.error))
        return f"{self.asked} = {name} ({os.strerror(self.error)})"


@attrs.define(slots=False, eq=False, repr=False)
class BatchLayout:
    """Where the calls of a batch have their memory; one for all tasks that are asked the same."""

    calls: Sequence[Call]

    @cached_property
    def memory_at(self) -> list[int]:
        """Offset in the batch of the memory of each call."""
        sizes = (size_of(asked) - arch.CALL_SIZE for asked in self.calls)
        return list(accumulate(sizes, initial=len(self.calls) * arch.CALL_SIZE))


class Replies(Sequence[Reply]):
    """The replies of a batch that has run, each taken out of its bytes when it is looked at."""

    def __init__(self, layout: BatchLayout, batch: bytes) -> None:
        """Take the calls, and the bytes of the batch after its run."""
        self._layout = layout
        self._batch = batch

    def __len__(self) -> int:
        """Return how many there are, one for each call."""
        return len(self._layout.calls)

    @overload
    def __getitem__(self, index: int) -> Reply: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Reply]: ...

    def __getitem__(self, index: int | slice) -> Reply | Sequence[Reply]:
        """Return one, or some of them."""
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            return self._unpack(numbers)
        return [self._unpack(number) for number in numbers]

    def _unpack(self, index: int) -> Reply:
        asked = self._layout.calls[index]
        return _unpack_reply(asked, self._batch, index, self._layout.memory_at[index])


class _Part(Sequence[Reply]):
    """Some consecutive replies of a batch, without looking at them."""

    __slots__ = ("_end", "_replies", "_start")

    def __init__(self, replies: Sequence[Reply], start: int, end: int) -> None:
        self._replies, self._start, self._end = replies, start, end

    def __len__(self) -> int:
        return self._end - self._start

    @overload
    def __getitem__(self, index: int) -> Reply: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Reply]: ...

    def __getitem__(self, index: int | slice) -> Reply | Sequence[Reply]:
        mine = range(self._start, self._end)
        if isinstance(index, slice):
            return [self._replies[at] for at in mine[index]]
        return self._replies[mine[index]]


def part_of(replies: Sequence[Reply], start: int, end: int) -> Sequence[Reply]:
    """Return `replies[start:end]`, to be looked at when it is needed."""
    return _Part(replies, start, end)


def _size_of_memory(argument: Argument) -> int:
    """Return how many bytes of arena an argument occupies; 0 for a plain number."""
    if isinstance(argument, int):
        return 0
    if isinstance(argument, Out):
        return _round_up(argument.size)
    pointers = argument.pointers if isinstance(argument, In) else ()
    return _round_up(len(argument.data)) + sum(_round_up(len(data)) for _, data in pointers)


def _lay_out(argument: Argument, at: int) -> bytes:
    """Return the bytes of a memory argument for address `at`, its pointers resolved."""
    if isinstance(argument, In) and argument.pointers:
        head = bytearray(argument.data.ljust(_round_up(len(argument.data)), b"\0"))
        tail = bytearray()
        for offset, data in argument.pointers:
            head[offset : offset + 8] = (at + len(head) + len(tail)).to_bytes(8, "little")
            tail += data.ljust(_round_up(len(data)), b"\0")
        return bytes(head + tail)
    data = b"" if isinstance(argument, int | Out) else argument.data
    return data.ljust(_size_of_memory(argument), b"\0")


def size_of(asked: Call) -> int:
    """Return how many bytes of arena one call needs: its table entry and its memory."""
    size = arch.CALL_SIZE
    for argument in asked.args:
        if not isinstance(argument, int):
            size += _size_of_memory(argument)
    return size


def _round_up(size: int) -> int:
    return (size + _ALIGN - 1) // _ALIGN * _ALIGN


def pack_batch(calls: Sequence[Call], at: RemoteAddr) -> bytes:
    """Return the bytes for address `at`: the table of calls, then all memory arguments."""
    table = bytearray()
    scratch = bytearray()
    scratch_at = at + len(calls) * arch.CALL_SIZE
    for asked in calls:
        words: list[int] = []
        for argument in asked.args:
            if isinstance(argument, int):
                words.append(argument)
            else:
                at_argument = scratch_at + len(scratch)
                words.append(at_argument)
                scratch += _lay_out(argument, at_argument)
        table += arch.pack_call(asked.nr, tuple(words))
    return bytes(table + scratch)


def unpack_replies(calls: Sequence[Call], batch: bytes) -> list[Reply]:
    """Return the replies from the bytes of a batch that has run."""
    return list(Replies(BatchLayout(calls), batch))


def _unpack_reply(asked: Call, batch: bytes, index: int, memory_at: int) -> Reply:
    outs: list[bytes] = []
    for argument in asked.args:
        if isinstance(argument, int):
            continue
        if isinstance(argument, Out):
            outs.append(batch[memory_at : memory_at + argument.size])
        elif isinstance(argument, InOut):
            outs.append(batch[memory_at : memory_at + len(argument.data)])
        memory_at += _size_of_memory(argument)
    entry = batch[index * arch.CALL_SIZE : (index + 1) * arch.CALL_SIZE]
    return Reply(asked, arch.unpack_result(entry), tuple(outs))
