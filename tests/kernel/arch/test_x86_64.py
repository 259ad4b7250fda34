"""The promise: the machine code is what its listing says, the signal frame what the C headers say,
and an interrupted call is issued again where the kernel would do it."""

import re
import shutil
import struct
import subprocess

import pytest

from ckpt.kernel.arch import NR
from ckpt.kernel.arch import x86_64 as arch
from ckpt.units import RemoteAddr
from tests.kernel.c_headers import read_defines, run_c

LISTINGS = {
    "batch": (arch.BATCH_ASM, arch.BATCH_CODE),
    "burst": (arch.BURST_ASM, arch.BURST_CODE),
    "twin": (arch.TWIN_ASM, arch.TWIN_CODE),
    "pause": (arch.PAUSE_ASM, arch.PAUSE_CODE),
    "poll": (arch.POLL_ASM, arch.POLL_CODE),
    "name": (arch.NAME_ASM, arch.NAME_CODE),
    "bind": (arch.BIND_ASM, arch.BIND_CODE),
}


def assemble(listing, folder):
    """Return the bytes of a listing, by the assembler that comes with gcc."""
    objects, raw = folder / "code.o", folder / "code.bin"
    source = f".intel_syntax noprefix\n.text\n{listing}"
    subprocess.run(["as", "-o", objects, "-"], input=source.encode(), check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", objects, raw], check=True)
    return raw.read_bytes()


@pytest.mark.parametrize("name", LISTINGS)
def test_the_bytes_are_the_listing(name, tmp_path):
    listing, code = LISTINGS[name]
    assert shutil.which("as"), "binutils comes with gcc"
    assert assemble(listing, tmp_path).hex() == code.hex()


@pytest.mark.parametrize("name", LISTINGS)
def test_the_code_lies_anywhere(name):
    """It has no absolute address: every operand is a register, a constant, or a label nearby."""
    labels = set(re.findall(r"^(\w+):", LISTINGS[name][0], re.MULTILINE))
    for line in LISTINGS[name][0].splitlines():
        words = line.split(":")[-1].split()
        if words and words[0].startswith("j"):
            assert words[1] in labels
        assert set(re.findall(r"\[rip\+(\w+)", line)) <= labels


def test_numbers_in_the_listings():
    numbers = [(arch.BATCH_ASM, 234, NR.tgkill), (arch.BATCH_ASM, 15, NR.rt_sigreturn)]
    numbers += [(arch.TWIN_ASM, 56, NR.clone), (arch.TWIN_ASM, 61, NR.wait4)]
    numbers += [(arch.TWIN_ASM, 60, NR.exit), (arch.TWIN_ASM, 35, NR.nanosleep)]
    numbers += [(arch.TWIN_ASM, 112, NR.setsid), (arch.TWIN_ASM, 62, NR.kill)]
    numbers += [(arch.TWIN_ASM, 231, NR.exit_group)]
    numbers += [(arch.PAUSE_ASM, 34, NR.pause)]
    numbers += [(arch.POLL_ASM, 7, NR.poll), (arch.POLL_ASM, 231, NR.exit_group)]
    numbers += [(arch.NAME_ASM, 157, NR.prctl), (arch.BIND_ASM, 157, NR.prctl)]
    numbers += [(arch.BIND_ASM, 110, NR.getppid), (arch.BIND_ASM, 231, NR.exit_group)]
    for listing, number, name in numbers:
        assert f"mov eax, {number}\n" in listing
        assert number == name


def test_a_name_and_a_parent_are_where_the_listing_has_room_for_them(tmp_path):
    name = arch.NAME_ASM.replace("rax, 0\n", f"rax, {int.from_bytes(b'ijk', 'little')}\n", 1)
    name = name.replace("rax, 0\n", f"rax, {int.from_bytes(b'abcdefgh', 'little')}\n", 1)
    assert assemble(name, tmp_path) == arch.named("abcdefghijk")
    parent = arch.BIND_ASM.replace("0x7fffffff", "0x1234567")
    assert assemble(parent, tmp_path) == arch.bound(0x1234567)
    owner = arch.TWIN_ASM.replace("0x7fffffff", "0x1234567")
    assert assemble(owner, tmp_path) == arch.twinned(0x1234567)


# -- the signal frame ------------------------------------------------------------------------------

# sys/ucontext.h and asm/sigcontext.h cannot be included together; the first names the registers.
GREGS = [
    *["r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"],
    *["rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx", "rsp", "rip"],
]
AT = RemoteAddr(0x7F12_3456_7000)
XSTATE_BYTES = 2696
MASK = 0x8000_0000_0001_0203


def registers_with_distinct_words():
    registers = arch.Registers()
    for index, (name, _) in enumerate(arch.Registers._fields_):
        setattr(registers, name, 0x1000 + index)
    registers.orig_rax = 0xFFFF_FFFF_FFFF_FFFF
    return registers


def xstate_with(features, size=XSTATE_BYTES):
    area = bytearray(range(256)) * (size // 256 + 1)
    area = area[:size]
    area[464:512] = struct.pack("<Q40x", features)
    return bytes(area)


@pytest.fixture(scope="module")
def offsets():
    """Where the C library sees each register in a `ucontext_t`, and more of the frame."""
    names = {f"gregs.{name}": f"uc_mcontext.gregs[REG_{name.upper()}]" for name in GREGS}
    names |= {
        "eflags": "uc_mcontext.gregs[REG_EFL]",
        "segments": "uc_mcontext.gregs[REG_CSGSFS]",
        "fpregs": "uc_mcontext.fpregs",
        "mask": "uc_sigmask",
        "flags": "uc_flags",
        "link": "uc_link",
        "stack": "uc_stack",
        "stack_flags": "uc_stack.ss_flags",
    }
    prints = [
        f'printf("{name} %zu\\n", offsetof(ucontext_t, {member}));'
        for name, member in names.items()
    ]
    rows = run_c(["ucontext.h"], "\n".join(prints)).splitlines()
    return {name: int(offset) for name, offset in (row.split() for row in rows)}


@pytest.fixture(scope="module")
def frame():
    registers = registers_with_distinct_words()
    return registers, arch.signal_frame(registers, xstate_with(0xE7), MASK, AT)


def word(frame, offset):
    """Return the word at `offset` of the ucontext, which follows the return address."""
    return struct.unpack_from("<Q", frame, 8 + offset)[0]


@pytest.mark.parametrize("name", GREGS)
def test_register_lies_where_the_c_library_sees_it(frame, offsets, name):
    registers, raw = frame
    assert word(raw, offsets[f"gregs.{name}"]) == getattr(registers, name)


def test_flags_and_segments(frame, offsets):
    registers, raw = frame
    assert word(raw, offsets["eflags"]) == registers.eflags
    cs, gs, fs, ss = struct.unpack_from("<4H", raw, 8 + offsets["segments"])
    assert (cs, ss) == (registers.cs, registers.ss)
    assert (gs, fs) == (registers.gs & 0xFFFF, registers.fs & 0xFFFF)


def test_mask(frame, offsets):
    assert word(frame[1], offsets["mask"]) == MASK


def test_flags_say_what_is_in_it(frame, offsets):
    defines = read_defines("asm/ucontext.h")
    names = ["UC_FP_XSTATE", "UC_SIGCONTEXT_SS", "UC_STRICT_RESTORE_SS"]
    assert word(frame[1], offsets["flags"]) == sum(int(defines[name], 0) for name in names)
    assert word(frame[1], offsets["link"]) == 0


def test_the_alternative_stack_is_left_alone(frame, offsets):
    """By flags that sigaltstack refuses: neither SS_ONSTACK, SS_DISABLE nor 0."""
    (flags,) = struct.unpack_from("<i", frame[1], 8 + offsets["stack_flags"])
    known = run_c(["signal.h"], 'printf("%d %d", SS_ONSTACK, SS_DISABLE);').split()
    assert flags not in {0, *map(int, known)}
    assert flags & 0x8000_0000 == 0, "SS_AUTODISARM is cut off before the comparison"


def test_xstate_is_aligned_and_has_the_magic_words(frame, offsets):
    _, raw = frame
    pointer = word(raw, offsets["fpregs"])
    assert pointer % 64 == 0, "XRSTOR faults otherwise"
    area = raw[pointer - AT :]
    prints = 'printf("%d %d %zu %zu", FP_XSTATE_MAGIC1, FP_XSTATE_MAGIC2,'
    prints += " offsetof(struct _fpstate_64, sw_reserved), sizeof(struct _fpx_sw_bytes));"
    magic1, magic2, at, size = map(int, run_c(["asm/sigcontext.h"], prints).split())
    assert (at, size) == (464, 48)
    head = struct.unpack_from("<IIQI", area, at)
    assert head == (magic1, XSTATE_BYTES + 4, 0xE7, XSTATE_BYTES)
    assert struct.unpack_from("<I", area, XSTATE_BYTES)[0] == magic2
    assert len(area) == XSTATE_BYTES + 4


def test_the_rest_of_xstate_is_as_it_was(frame, offsets):
    _, raw = frame
    area = raw[word(raw, offsets["fpregs"]) - AT :]
    before = xstate_with(0xE7)
    assert area[:464] == before[:464]
    assert area[512:XSTATE_BYTES] == before[512:]


@pytest.mark.parametrize("at", [AT, AT + 16, AT + 32, AT + 48])
def test_xstate_does_not_overlap_the_context_anywhere(at, offsets):
    raw = arch.signal_frame(registers_with_distinct_words(), xstate_with(7), MASK, RemoteAddr(at))
    pointer = word(raw, offsets["fpregs"])
    assert pointer % 64 == 0
    assert pointer - at >= 8 + offsets["mask"] + 128


# -- which call goes on ----------------------------------------------------------------------------


def stopped_in(nr, result, rip=0x40_1002):
    registers = arch.Registers()
    registers.orig_rax = nr & 0xFFFF_FFFF_FFFF_FFFF
    registers.rax = result & 0xFFFF_FFFF_FFFF_FFFF
    registers.rip = rip
    return registers


@pytest.mark.parametrize("result", [-512, -513, -514, -516])
def test_a_call_that_the_kernel_restarts_is_issued_again(result):
    registers = stopped_in(NR.read, result)
    assert arch.interrupted_call(registers) == NR.read
    again = arch.restarted(registers)
    assert (again.rax, again.rip) == (NR.read, 0x40_1000)
    assert again.orig_rax == 0xFFFF_FFFF_FFFF_FFFF, "the kernel must not do it once more"


@pytest.mark.parametrize(
    ("nr", "result"),
    [
        (-1, -512),  # user space; what happens to be in rax means nothing
        (NR.read, 5),
        (NR.read, 0),
        (NR.read, -4),  # EINTR of its own: a handler without SA_RESTART has run
        (NR.read, -515),
        (NR.read, -11),
        (NR.read, -517),
    ],
)
def test_a_call_that_has_ended_is_left_alone(nr, result):
    registers = stopped_in(nr, result)
    assert arch.interrupted_call(registers) is None
    assert not arch.needs_our_restart(registers)
    assert bytes(arch.restarted(registers)) == bytes(registers)


@pytest.mark.parametrize("nr", sorted(arch.UNINTERRUPTED_ONLY))
def test_a_call_that_any_stop_ends_is_issued_again(nr):
    registers = stopped_in(nr, -arch.EINTR)
    assert arch.needs_our_restart(registers)
    assert arch.restarted(registers).rip == 0x40_1000


def test_restarting_changes_no_argument_and_copies():
    registers = registers_with_distinct_words()
    registers.orig_rax, registers.rax = int(NR.futex), -512 & 0xFFFF_FFFF_FFFF_FFFF
    again = arch.restarted(registers)
    for name in arch.ARGUMENT_REGISTERS:
        assert getattr(again, name) == getattr(registers, name)
    assert registers.rip != again.rip


# -- registers that run something ------------------------------------------------------------------


def test_registers_of_a_single_call():
    base = registers_with_distinct_words()
    registers = arch.single_call_registers(base, RemoteAddr(0x5000), NR.mmap, (1, 2, 3, 4, -1))
    assert (registers.rip, registers.rax) == (0x5000, NR.mmap)
    assert registers.orig_rax == 0xFFFF_FFFF_FFFF_FFFF
    args = [getattr(registers, name) for name in arch.ARGUMENT_REGISTERS]
    assert args == [1, 2, 3, 4, 0xFFFF_FFFF_FFFF_FFFF, 0]
    assert registers.rsp == base.rsp


def test_registers_of_a_batch():
    base = registers_with_distinct_words()
    base.eflags = 0x0700  # trap flag, interrupts, direction flag
    registers = arch.batch_registers(base, 0x5000, 0x9000, 3, 70, 71, 23, 0x6000)
    assert registers.rip == 0x5000
    assert (registers.rbx, registers.rbp) == (0x9000, 0x9000 + 3 * 64)
    assert (registers.r12, registers.r13, registers.r14) == (70, 71, 23)
    assert registers.r15 == 0x6008, "rt_sigreturn expects the return address to be popped"
    assert registers.orig_rax == 0xFFFF_FFFF_FFFF_FFFF
    assert registers.eflags == 0x0200
    assert (registers.fs_base, registers.gs_base) == (base.fs_base, base.gs_base)


@pytest.mark.parametrize(("rax", "value"), [(5, 5), ((1 << 64) - 4, -4), (1 << 63, -(1 << 63))])
def test_results_are_signed(rax, value):
    registers = arch.Registers()
    registers.rax = rax
    assert arch.result_of(registers) == value
