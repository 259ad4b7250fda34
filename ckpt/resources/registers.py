"""The registers of a thread: general ones and all of XSTATE, and the call that was interrupted.

Kernel: PTRACE_GETREGSET with NT_PRSTATUS and NT_X86_XSTATE; arch/x86/kernel/signal.c for what the
kernel does with an interrupted system call.

A restored thread has no restart block in the kernel, so its interrupted call is issued again with
its own arguments. The XSTATE of a processor with more features than this one is refused before
anything starts (`HostMismatch`).
"""

import attrs

from ckpt.kernel import ptrace
from ckpt.kernel.arch import x86_64 as arch
from ckpt.resources.base import Capture, Rebuilt, Resource, Restore, Stage, Stopped


@attrs.frozen(slots=True)
class RegistersRecord:
    """What a thread had in its processor."""

    machine: str
    prstatus: bytes
    """`struct user_regs_struct`, 216 bytes."""
    xstate: bytes
    """The XSAVE area in standard format."""


def capture(stopped: Stopped) -> Capture[RegistersRecord]:
    """Read both register sets as they were at the stop."""
    yield []
    return RegistersRecord(
        machine=arch.MACHINE,
        prstatus=bytes(stopped.task.registers),
        xstate=stopped.task.xstate,
    )


def restore(record: RegistersRecord, rebuilt: Rebuilt) -> Restore:
    """Make them what the thread gets when it is let go."""
    yield []
    registers = arch.Registers.from_buffer_copy(record.prstatus)
    task = rebuilt.task
    task.registers = arch.restarted(registers)
    task.disturbed = True
    ptrace.set_xstate(task.tid, record.xstate)


REGISTERS = Resource(
    "registers", RegistersRecord, Stage.CREDENTIALS, capture=capture, restore=restore
)
