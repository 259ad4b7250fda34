"""The registers of a thread: general ones and all of XSTATE, and the call that was interrupted.

Kernel: PTRACE_GETREGSET with NT_PRSTATUS and NT_X86_XSTATE; arch/x86/kernel/signal.c for what the
kernel does with an interrupted system call.

A restored thread has no restart block in the kernel: `process/interrupted.py` says how its
interrupted call goes on, and with which time left. Refused before anything starts (`HostMismatch`):
an image of another architecture; an XSAVE area of another size than here, be it larger or smaller,
since the standard format has no sizes in it; and a component in use (XSTATE_BV) that this processor
does not offer. What instructions the program found with cpuid is not compared.
"""

import ctypes
from collections.abc import Iterator

import attrs

from ckpt.errors import Finding
from ckpt.kernel import ptrace
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.features import Features
from ckpt.process import interrupted
from ckpt.process.sleeping import Sleep
from ckpt.resources.base import Capture, Later, Rebuilt, Resource, Restore, Stage, Stopped

_MIN_XSTATE = 512 + 64
"""The legacy area and the header (Intel SDM volume 1, 13.4)."""
_REMEDY = "restore on a machine with the same processor features"


@attrs.frozen(slots=True, repr=False)
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

    def __attrs_post_init__(self) -> None:
        """Refuse register sets that ptrace would not take."""
        if len(self.prstatus) != ctypes.sizeof(arch.Registers):
            raise ValueError(f"{len(self.prstatus)} bytes are no set of general registers")
        if not _MIN_XSTATE <= len(self.xstate) <= ptrace.MAX_XSTATE:
            raise ValueError(f"{len(self.xstate)} bytes are no extended state")


def capture(stopped: Stopped) -> Capture[RegistersRecord]:
    """Take both register sets as they were at the stop; which call goes on is asked now."""
    yield []
    task = stopped.task
    registers, xstate = task.registers, task.xstate
    going_on = interrupted.describe(task, stopped.frozen.sleeps.get(stopped.tid))
    return Later(
        lambda: RegistersRecord(
            machine=arch.MACHINE,
            prstatus=bytes(registers),
            xstate=bytes(xstate),
            call=going_on.call,
            slept_ns=going_on.slept_ns,
        )
    )


def restore(record: RegistersRecord, rebuilt: Rebuilt) -> Restore:
    """Make them what the thread gets when it is let go."""
    yield []
    registers = arch.Registers.from_buffer_copy(record.prstatus)
    task = rebuilt.task
    task.registers = interrupted.resume(task.tid, registers, Sleep(record.call, record.slept_ns))
    task.disturbed = True
    ptrace.set_xstate(task.tid, record.xstate)


def check_host(record: RegistersRecord, features: Features) -> Iterator[Finding]:
    """Name what this processor cannot hold."""
    if record.machine != arch.MACHINE:
        yield Finding("processor", f"the image is of a {record.machine}, this is {arch.MACHINE}")
        return
    if features.xsave_bytes and len(record.xstate) != features.xsave_bytes:
        yield Finding(
            "processor",
            f"it saves {features.xsave_bytes} bytes of extended state, the image has"
            f" {len(record.xstate)}",
            _REMEDY,
        )
    lacking = arch.xfeatures_used(record.xstate) & ~features.xsave_components
    if features.xsave_components and lacking:
        yield Finding(
            "processor",
            f"the image uses components of extended state that it lacks (XCR0 bits {lacking:#x})",
            _REMEDY,
        )


REGISTERS = Resource(
    "registers",
    RegistersRecord,
    Stage.CREDENTIALS,
    capture=capture,
    restore=restore,
    check_host=check_host,
)
