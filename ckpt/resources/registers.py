"""The registers of a thread: general ones and all of XSTATE, and the call that was interrupted.

Kernel: PTRACE_GETREGSET with NT_PRSTATUS and NT_X86_XSTATE; arch/x86/kernel/signal.c for what the
kernel does with an interrupted system call.

A restored thread has no restart block in the kernel: `process/interrupted.py` says how its
interrupted call goes on, and with which time left. The XSTATE of a processor with more features
than this one is refused before anything starts (`HostMismatch`).
"""

import attrs

from ckpt.kernel import ptrace
from ckpt.kernel.arch import x86_64 as arch
from ckpt.process import interrupted
from ckpt.process.sleeping import Sleep
from ckpt.resources.base import Capture, Rebuilt, Resource, Restore, Stage, Stopped


@attrs.frozen(slots=True)
class RegistersRecord:
    """What a thread had in its processor."""

    machine: str
    prstatus: bytes
    """`struct user_regs_struct`, 216 bytes."""
    xstate: bytes
    """The XSAVE area in standard format."""
    call: int
    """The system call that was interrupted and must go on; -1 if none."""
    slept_ns: int
    """How much of its relative timeout had passed; 0 if it has none."""


def capture(stopped: Stopped) -> Capture[RegistersRecord]:
    """Read both register sets as they were at the stop."""
    yield []
    going_on = interrupted.describe(stopped.task, stopped.frozen.sleeps.get(stopped.tid))
    return RegistersRecord(
        machine=arch.MACHINE,
        prstatus=bytes(stopped.task.registers),
        xstate=stopped.task.xstate,
        call=going_on.call,
        slept_ns=going_on.slept_ns,
    )


def restore(record: RegistersRecord, rebuilt: Rebuilt) -> Restore:
    """Make them what the thread gets when it is let go."""
    yield []
    registers = arch.Registers.from_buffer_copy(record.prstatus)
    task = rebuilt.task
    task.registers = interrupted.resume(task.tid, registers, Sleep(record.call, record.slept_ns))
    task.disturbed = True
    ptrace.set_xstate(task.tid, record.xstate)


REGISTERS = Resource(
    "registers", RegistersRecord, Stage.CREDENTIALS, capture=capture, restore=restore
)
