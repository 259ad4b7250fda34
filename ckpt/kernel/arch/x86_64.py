"""What of the Linux ABI depends on an x86-64 processor.

Registers, the machine code that runs in an arena, the signal frame that lets a task heal itself,
and the rules by which the kernel restarts an interrupted system call. Neighbours:
`kernel/ptrace.py` moves the registers, `process/` decides what to run.

Sources: arch/x86/include/uapi/asm/{sigcontext,ucontext,ptrace-abi}.h,
arch/x86/kernel/signal.c (Linux 6.18), System V AMD64 ABI for the red zone.
"""

import struct

from ckpt.kernel.arch import NR
from ckpt.kernel.binding import user_regs_struct
from ckpt.units import Pid, RemoteAddr


class Registers(user_regs_struct):  # type: ignore[misc]  # python-ptrace has no types
    """`struct user_regs_struct`, the PRSTATUS register set: 27 words of 8 bytes."""

    r12: int
    r13: int
    r14: int
    r15: int
    rax: int
    rbx: int
    rbp: int
    rsp: int
    rip: int
    orig_rax: int
    eflags: int
    cs: int
    fs: int
    gs: int
    ss: int


PAGE_SIZE = 4096
SYSCALL_INSN = b"\x0f\x05"
SYSCALL_RET = SYSCALL_INSN + b"\xc3"
"""`syscall; ret`."""
SIGRETURN_CODES = tuple(
    bytes.fromhex(code) + SYSCALL_INSN for code in ("48c7c00f000000", "b80f000000")
)
"""`mov rax, 15; syscall`, `mov eax, 15; syscall`: rt_sigreturn, as C libraries have it."""
MACHINE = "x86_64"
RED_ZONE = 128
"""Bytes below the stack pointer that belong to the running function."""
USER_END = RemoteAddr(0x7FFF_FFFF_F000)
"""The end of the addresses that mmap gives out with four-level page tables (TASK_SIZE)."""

_WORDS = struct.Struct("<27Q")
"""`Registers`: r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp
ss fs_base gs_base ds es fs gs."""

Xstate = bytes | memoryview
"""The XSAVE area of a thread."""

ARGUMENT_REGISTERS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")

# Errors that only the kernel itself and a tracer see (include/linux/errno.h).
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
EINTR = 4

UNINTERRUPTED_ONLY = frozenset(
    {
        NR.epoll_wait,
        NR.epoll_pwait,
        NR.epoll_pwait2,
        NR.rt_sigtimedwait,
        NR.semop,
        NR.semtimedop,
        NR.io_getevents,
        NR.io_pgetevents,
    }
)
"""Calls that return EINTR when any stop interrupts them, SA_RESTART or not (signal(7))."""

_CALL = struct.Struct("<8Q")
_NO_ARGS = (0,) * 7
"""And no result."""
CALL_SIZE = _CALL.size
"""Bytes of one entry of a batch: number, six arguments, result."""

# r12, r13, r14 are tgid, tid and the end mark's signal; r15 points behind the return address of the
# signal frame in the arena.
_MARK_ASM = """
        mov eax, 234
        mov edi, r12d
        mov esi, r13d
        mov edx, r14d
        syscall
        mov rsp, r15
        mov eax, 15
        syscall
        ud2
"""
_MARK_CODE = bytes.fromhex("b8ea000000 4489e7 4489ee 4489f2 0f05 4c89fc b80f000000 0f05 0f0b")

# rbx walks the table to rbp, then on to `done`, which follows.
_LOOP_ASM = """
next:   cmp rbx, rbp
        je done
        mov rax, [rbx]
        mov rdi, [rbx+8]
        mov rsi, [rbx+16]
        mov rdx, [rbx+24]
        mov r10, [rbx+32]
        mov r8, [rbx+40]
        mov r9, [rbx+48]
        syscall
        mov [rbx+56], rax
        add rbx, 64
        jmp next
"""
_LOOP_CODE = bytes.fromhex(
    "4839eb 7427 488b03 488b7b08 488b7310 488b5318 4c8b5320 4c8b4328 4c8b4b30 0f05"
    "48894338 4883c340 ebd4"
)

BATCH_ASM = f"""
        {_LOOP_ASM}
done:   {_MARK_ASM}
"""
BATCH_CODE = _LOOP_CODE + _MARK_CODE
"""`BATCH_ASM`, assembled: runs the table, marks the end by a signal to itself, then heals."""
HEALING_CALL = len(_LOOP_CODE) + _MARK_CODE.index(SYSCALL_INSN)
"""Where in it is a `syscall` that is followed by the way back."""

BURST_ASM = f"""
        push rbx
        push rbp
        mov rbx, rdi
        mov rbp, rsi
        {_LOOP_ASM}
done:   pop rbp
        pop rbx
        ret
"""
BURST_CODE = bytes.fromhex("5355 4889fb 4889f5") + _LOOP_CODE + bytes.fromhex("5d5bc3")
"""`BURST_ASM`, assembled: a C function (table, its end) that runs a table of calls in ourselves."""

TWIN_ASM = f"""
        mov edi, 0x4100
        xor esi, esi
        xor edx, edx
        xor r10d, r10d
        xor r8d, r8d
        mov eax, 56
        syscall
        test rax, rax
        je middle
        js failed
        mov edi, eax
        mov edx, 0x40000000
        mov eax, 61
        syscall
        jmp mark
failed: mov [rbx], rax
        jmp mark
middle: mov eax, 112
        syscall
        mov edi, 0x400
        mov eax, 56
        syscall
        test rax, rax
        je twin
        mov [rbx], rax
        xor edi, edi
        mov eax, 60
        syscall
twin:   mov ebp, 0x7fffffff
        mov ebx, 1200
nap:    lea rdi, [rip+span]
        xor esi, esi
        mov eax, 35
        syscall
        mov edi, ebp
        xor esi, esi
        mov eax, 62
        syscall
        cmp eax, -3
        je end
        dec ebx
        jne nap
end:    xor edi, edi
        mov eax, 231
        syscall
span:   .quad 0, 50000000
mark:   {_MARK_ASM}
"""
TWIN_CODE = (
    bytes.fromhex(
        "bf0041000031f631d24531d24531c0b8380000000f054885c07417781089c7ba00000040"
        "b83d0000000f05eb70488903eb6b"
        "b8700000000f05bf00040000b8380000000f054885c0740c48890331ffb83c0000000f05"
        "bdffffff7fbbb0040000488d3d2600000031f6b8230000000f0589ef31f6b83e0000000f"
        "0583f8fd7404ffcb75dc31ffb8e70000000f05000000000000000080f0fa0200000000"
    )
    + _MARK_CODE
)
"""`TWIN_ASM`, assembled: makes a copy of the address space that is no child of the target.

clone(CLONE_VM | CLONE_VFORK) makes a middle one that shares all memory; it makes a session of its
own (so that the target's number is not in use for longer than the target), then the twin
(CLONE_FILES: no descriptor is copied), puts the twin's pid where rbx points, and exits; the target
reaps it with wait4(__WALL). Neither has an exit signal. The twin sleeps until it is seized; each
50 ms it asks by kill(pid, 0) whether ckpt is there (the pid is missing, see `twinned`), and exits
if not, or after a minute. No instruction touches the stack, which the middle one shares.
"""
_TWIN_OWNER = 87
"""Offset of ckpt's pid in `TWIN_CODE`."""

PAUSE_ASM = """
again:  mov eax, 34
        syscall
        jmp again
"""
PAUSE_CODE = bytes.fromhex("b822000000 0f05 ebf7")
"""`PAUSE_ASM`, assembled: waits for ever; what the seed does until it is taken over."""

POLL_ASM = """
        mov rax, 0x100000000
        push rax
again:  mov rdi, rsp
        mov esi, 1
        mov edx, -1
        mov eax, 7
        syscall
        cmp eax, -4
        je again
        xor edi, edi
        mov eax, 231
        syscall
"""
POLL_CODE = bytes.fromhex(
    "48b80000000001000000504889e7be01000000baffffffffb8070000000f0583f8fc74e731ffb8e70000000f05"
)
"""`POLL_ASM`, assembled: waits for ever (but for EINTR) until descriptor 0 is readable, then exits;
the keeper's body. The pollfd is on the stack: the kernel writes to it."""

NAME_ASM = """
        movabs rax, 0
        push rax
        movabs rax, 0
        push rax
        mov rsi, rsp
        mov edi, 15
        mov eax, 157
        syscall
"""
NAME_CODE = bytes.fromhex(
    "48b80000000000000000 50 48b80000000000000000 50 4889e6 bf0f000000 b89d000000 0f05"
)
"""`NAME_ASM`, assembled: prctl(PR_SET_NAME); the name itself is missing, see `named`."""
_NAME_HIGH, _NAME_LOW = 2, 13
"""Offsets of the two halves of the name in `NAME_CODE`."""

BIND_ASM = """
        mov edi, 1
        mov esi, 9
        mov eax, 157
        syscall
        mov eax, 110
        syscall
        cmp eax, 0x7fffffff
        je stays
        xor edi, edi
        mov eax, 231
        syscall
stays:
"""
BIND_CODE = bytes.fromhex(
    "bf01000000 be09000000 b89d000000 0f05 b86e000000 0f05 3dffffff7f 7409 31ff b8e7000000 0f05"
)
"""`BIND_ASM`, assembled: prctl(PR_SET_PDEATHSIG, SIGKILL), and the end if the parent is not there
any more; whose pid that is is missing, see `bound`."""
_BIND_PARENT = 25
"""Offset of the parent's pid in `BIND_CODE`."""


def copy_registers(registers: Registers) -> Registers:
    """Return an independent copy."""
    copy: Registers = Registers.from_buffer_copy(registers)
    return copy


def named(name: str) -> bytes:
    """Return code that gives the program it is part of a name (ASCII, 15 characters at most)."""
    raw = name.encode("ascii").ljust(16, b"\0")
    code = bytearray(NAME_CODE)
    code[_NAME_LOW : _NAME_LOW + 8] = raw[:8]
    code[_NAME_HIGH : _NAME_HIGH + 8] = raw[8:]
    return bytes(code)


def bound(parent: Pid) -> bytes:
    """Return code after which the program it is part of dies with `parent`, which started it."""
    code = bytearray(BIND_CODE)
    struct.pack_into("<I", code, _BIND_PARENT, parent)
    return bytes(code)


def twinned(owner: Pid) -> bytes:
    """Return code that makes a twin which does not outlive `owner`, seized or not."""
    code = bytearray(TWIN_CODE)
    struct.pack_into("<I", code, _TWIN_OWNER, owner)
    return bytes(code)


def pack_call(nr: int, args: tuple[int, ...]) -> bytes:
    """Pack one entry of a batch; missing arguments are 0, negative ones become unsigned."""
    padding = _NO_ARGS[len(args) :]
    try:
        return _CALL.pack(nr, *args, *padding)
    except struct.error:
        return _CALL.pack(nr, *(arg & 0xFFFF_FFFF_FFFF_FFFF for arg in args), *padding)


def unpack_args(batch: bytes, index: int) -> tuple[int, ...]:
    """Return the six argument words of entry `index` of a packed batch."""
    return _CALL.unpack_from(batch, index * CALL_SIZE)[1:7]


def unpack_result(entry: bytes) -> int:
    """Return the signed result word of an entry that has run."""
    return int(struct.unpack_from("<q", entry, 56)[0])


def result_of(registers: Registers) -> int:
    """Return the signed result of the system call that has just returned."""
    value = int(registers.rax)
    return value - (1 << 64) if value >> 63 else value


_SURPRISING_FLAGS = 0x500
"""Direction flag and trap flag: clear at a function's entry."""


def single_call_registers(
    base: Registers, at: RemoteAddr, nr: int, args: tuple[int, ...], frame: int | None = None
) -> Registers:
    """Return registers that make the `syscall` instruction at `at` run one call.

    `frame` is the address of what `signal_frame` made, where the code behind `at` leads into it: a
    `ret`, or `HEALING_CALL`.
    """
    registers = copy_registers(base)
    if frame is not None:
        registers.rsp, registers.r15 = frame, frame + 8
        registers.eflags &= ~_SURPRISING_FLAGS
    registers.rip = at
    registers.rax = nr
    # No system call is in progress any more: the kernel must not apply its restart rules.
    registers.orig_rax = 0xFFFF_FFFF_FFFF_FFFF
    for name, value in zip(ARGUMENT_REGISTERS, args + (0,) * (6 - len(args)), strict=True):
        setattr(registers, name, value & 0xFFFF_FFFF_FFFF_FFFF)
    return registers


def batch_registers(
    base: Registers, code: int, table: int, n_calls: int, tgid: int, tid: int, sig: int, frame: int
) -> Registers:
    """Return registers that run a batch of `n_calls` at `table` with the loop at `code`.

    `frame` is the address of what `signal_frame` made, `sig` the signal that marks the end.
    """
    registers = copy_registers(base)
    registers.rip, registers.orig_rax, registers.rax = code, 0xFFFF_FFFF_FFFF_FFFF, 0
    registers.rbx, registers.rbp = table, table + n_calls * CALL_SIZE
    registers.r12, registers.r13, registers.r14 = tgid, tid, sig
    registers.r15 = frame + 8
    registers.eflags &= ~_SURPRISING_FLAGS
    return registers


_FRAME_HEAD = struct.Struct("<QQQQiiQ18Q4H4QQ64xQ120x")
"""Return address; `struct ucontext`: flags and link, stack, sigcontext, mask (with its padding)."""
_UC_FLAGS = 0x1 | 0x2 | 0x4  # UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
_FP_XSTATE_MAGIC1 = 0x46505853
_FRAME_END = struct.pack("<I", 0x46505845)
"""FP_XSTATE_MAGIC2, behind the XSAVE area."""
_SW_RESERVED = 464
"""Offset of `struct _fpx_sw_bytes` in the XSAVE area (sigcontext.h)."""
_SOFTWARE_BYTES = struct.Struct("<IIQI28x")
_XFEATURES = 512
"""Offset of the XSAVE header: the bitmap of components in use."""
_NO_ALTSTACK_CHANGE = 3
"""An invalid ss_flags: the kernel leaves the alternative stack as it is (do_sigaltstack)."""


def _software_bytes(xstate: Xstate) -> bytes:
    """Return what stands in an extended frame at `_SW_RESERVED`, by which the kernel knows it."""
    size, mask = len(xstate), xfeatures_mask(xstate)
    return _SOFTWARE_BYTES.pack(_FP_XSTATE_MAGIC1, size + 4, mask, size)


def xfeatures_mask(xstate: Xstate) -> int:
    """Return the components that this kernel saves: XCR0, kept where ptrace puts it (464)."""
    return int(struct.unpack_from("<Q", xstate, _SW_RESERVED)[0])


def xfeatures_used(xstate: bytes) -> int:
    """Return the components that are not in their initial state (XSTATE_BV)."""
    return int(struct.unpack_from("<Q", xstate, _XFEATURES)[0])


def signal_frame(
    registers: Registers, xstate: Xstate, sigmask: int, at: RemoteAddr, returns_to: int = 0
) -> bytes:
    """Return a `struct rt_sigframe` for address `at` (16-byte aligned) that restores a task.

    rt_sigreturn with the stack pointer at `at + 8` gives back every register, the whole XSTATE
    and the mask. Interrupted system calls follow the kernel's restart rule, since rt_sigreturn
    itself applies none.
    """
    words = _WORDS.unpack(restarted(registers))
    r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi = words[:15]
    _orig_rax, rip, cs, eflags, rsp, ss, _fs_base, _gs_base, _ds, _es, fs, gs = words[15:]
    fpstate = (at + _FRAME_HEAD.size + 63) // 64 * 64
    head = _FRAME_HEAD.pack(
        *(returns_to, _UC_FLAGS, 0),
        *(0, _NO_ALTSTACK_CHANGE, 0, 0),
        *(r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip),
        *(eflags, cs & 0xFFFF, gs & 0xFFFF, fs & 0xFFFF, ss & 0xFFFF, 0, 0, 0, 0, fpstate),
        sigmask,
    )
    return b"".join(
        (
            head.ljust(fpstate - at, b"\0"),
            xstate[:_SW_RESERVED],
            _software_bytes(xstate),
            xstate[_XFEATURES:],
            _FRAME_END,
        )
    )


def signal_frame_size(xstate: Xstate) -> int:
    """Return how many bytes a signal frame has that starts at a multiple of 64."""
    return (_FRAME_HEAD.size + 63) // 64 * 64 + len(xstate) + len(_FRAME_END)


def interrupted_call(registers: Registers) -> int | None:
    """Return the number of the system call that the stop interrupted and that must go on.

    None if the task was in user space, or its call had ended with a result of its own.
    """
    nr = int(registers.orig_rax)
    if nr >> 63:
        return None
    result = result_of(registers)
    if -result in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK):
        return nr
    if result == -EINTR and nr in UNINTERRUPTED_ONLY:
        return nr
    return None


def needs_our_restart(registers: Registers) -> bool:
    """Tell whether the kernel would hand EINTR to the task although only our stop came by."""
    return result_of(registers) == -EINTR and interrupted_call(registers) is not None


def restarted(registers: Registers) -> Registers:
    """Return registers that issue the interrupted call again with its own arguments.

    The same as arch_do_signal_or_restart does for -ERESTARTSYS and its kin; with
    -ERESTART_RESTARTBLOCK the time that has passed is lost unless the caller adapts the argument.
    """
    nr = interrupted_call(registers)
    again = copy_registers(registers)
    if nr is not None:
        again.rax = nr
        again.rip -= len(SYSCALL_INSN)
        again.orig_rax = 0xFFFF_FFFF_FFFF_FFFF
    return again
