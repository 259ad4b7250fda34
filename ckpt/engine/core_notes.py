"""The notes of a core file, from what an image holds of a process and of its threads; pure.

In the order of the kernel's own core files (fs/binfmt_elf.c, write_note_info): the leader's status,
what is of the process, the leader's other registers, then thread after thread.

No image holds how much processor time was used (0 here), or a signal that ended the process, since
none did: NT_SIGINFO is missing. If the process was stopped, the signal that did it is the current
one. Registers are as the kernel shows them to a tracer: a thread that waited in a system call has
the kernel's own error in its result, as it has in a core file of gdb's.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence

from ckpt.engine.records import ProcessImage, ThreadImage
from ckpt.kernel.elf_core import (
    FXSAVE_BYTES,
    N_REGISTERS,
    NAME_BYTES,
    NT_AUXV,
    NT_FILE,
    NT_PRFPREG,
    NT_PRPSINFO,
    NT_PRSTATUS,
    NT_X86_XSTATE,
    PSARGS_BYTES,
    MappedFile,
    elf_prpsinfo,
    elf_prstatus,
    note,
    pack_mapped_files,
)
from ckpt.resources.credentials import CREDENTIALS
from ckpt.resources.memory import MEMORY, MemoryRecord
from ckpt.resources.registers import REGISTERS
from ckpt.resources.signals import N_SIGNALS, THREAD_SIGNALS, signal_bit
from ckpt.resources.threads import THREAD

_SIGNO_BYTES = 4
"""Of `siginfo_t`, which begins with it."""
_RUNNING, _STOPPED = (0, b"R"), (3, b"T")


def pack_notes(process: ProcessImage, command_line: bytes, files: Sequence[MappedFile]) -> bytes:
    """Return all notes of a process.

    Args:
        process: of which.
        command_line: its arguments, each with a NUL behind it; may be cut off.
        files: the mappings of files.
    """
    return b"".join(_iter_notes(process, command_line, files))


def _iter_notes(
    process: ProcessImage, command_line: bytes, files: Sequence[MappedFile]
) -> Iterator[bytes]:
    memory: MemoryRecord = process.resources[MEMORY.name]
    leader, *others = leader_first(process)
    yield note(NT_PRSTATUS, _status(process, leader))
    yield note(NT_PRPSINFO, _process_info(process, leader, command_line))
    yield note(NT_AUXV, memory.auxv)
    yield note(NT_FILE, pack_mapped_files(files))
    yield from _iter_registers(leader)
    for thread in others:
        yield note(NT_PRSTATUS, _status(process, thread))
        yield from _iter_registers(thread)


def leader_first(process: ProcessImage) -> list[ThreadImage]:
    """Return the threads of a process; the leader, if it has not ended, first."""
    return sorted(process.threads, key=lambda thread: int(thread.tid) != int(process.pid))


def _iter_registers(thread: ThreadImage) -> Iterator[bytes]:
    xstate = thread.resources[REGISTERS.name].xstate
    yield note(NT_PRFPREG, xstate[:FXSAVE_BYTES])
    yield note(NT_X86_XSTATE, xstate)


def _status(process: ProcessImage, thread: ThreadImage) -> bytes:
    place = process.place
    signals = thread.resources[THREAD_SIGNALS.name]
    raw = elf_prstatus(
        pr_cursig=process.stopped_by,
        pr_sigpend=_mask_of(signals.pending),
        pr_sighold=signals.blocked,
        pr_pid=thread.tid,
        pr_ppid=place.parent,
        pr_pgrp=place.group,
        pr_sid=place.session,
        pr_fpvalid=1,
    )
    raw.pr_info.si_signo = process.stopped_by
    raw.pr_reg[:] = struct.unpack(f"<{N_REGISTERS}Q", thread.resources[REGISTERS.name].prstatus)
    return bytes(raw)


def _mask_of(queue: Iterable[bytes]) -> int:
    mask = 0
    for info in queue:
        number = int.from_bytes(info[:_SIGNO_BYTES], "little")
        mask |= signal_bit(number) if 1 <= number <= N_SIGNALS else 0
    return mask


def _process_info(process: ProcessImage, leader: ThreadImage, command_line: bytes) -> bytes:
    place, credentials = process.place, leader.resources[CREDENTIALS.name]
    state, letter = _STOPPED if process.stopped_by else _RUNNING
    return bytes(
        elf_prpsinfo(
            pr_state=state,
            pr_sname=letter,
            pr_uid=credentials.uids[0],
            pr_gid=credentials.gids[0],
            pr_pid=process.pid,
            pr_ppid=place.parent,
            pr_pgrp=place.group,
            pr_sid=place.session,
            pr_fname=leader.resources[THREAD.name].name[:NAME_BYTES],
            pr_psargs=command_line[: PSARGS_BYTES - 1].rstrip(b"\0").replace(b"\0", b" "),
        )
    )
