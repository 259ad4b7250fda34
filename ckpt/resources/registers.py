"""The registers of a thread: general ones and all of XSTATE, and the call that was interrupted.

Kernel: PTRACE_GETREGSET with NT_PRSTATUS and NT_X86_XSTATE; arch/x86/kernel/signal.c for what the
kernel does with an interrupted system call.

A restored thread has no restart block in the kernel: `process/interrupted.py` says how its
interrupted call goes on, and with which time left. The XSTATE of a processor with more features
than this one is refused before anything starts (`HostMismatch`).
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
from ckpt.resources.base import Capture, Rebuilt, Resource, Restore, Stage, Stopped

_MIN_XSTATE = 512 + 64
"""The legacy area and the header (Intel SDM volume 1, 13.4)."""


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

    def __attrs_post_init__(self) -> None:
        """Refuse register sets that ptrace would not take."""
        if len(self.prstatus) != ctypes.sizeof(arch.Registers):
            raise ValueError(f"{len(self.prstatus)} bytes are no set of general registers")
        if not _MIN_XSTATE <= len(self.xstate) <= ptrace.MAX_XSTATE:
            raise ValueError(f"{len(self.xstate)} bytes are no extended state")


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


def check_host(record: RegistersRecord, features: Features) -> Iterator[Finding]:
    """Name what this processor cannot hold."""
    if record.machine != arch.MACHINE:
        yield Finding("processor", f"the image is of a {record.machine}, this is {arch.MACHINE}")
    elif features.xsave_bytes and len(record.xstate) != features.xsave_bytes:
        yield Finding(
            "processor",
            f"it saves {features.xsave_bytes} bytes of extended state, the image has"
            f" {len(record.xstate)}",
            "restore on a machine with the same processor features",
        )


REGISTERS = Resource(
    "registers",
    RegistersRecord,
    Stage.CREDENTIALS,
    capture=capture,
    restore=restore,
    check_host=check_host,
)
