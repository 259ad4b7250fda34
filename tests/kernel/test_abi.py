"""The promise: every struct and number of `ckpt.kernel` is the one of the system's C headers.

What these headers are too old to know is listed here by name, with the size and the value that
the newer header specifies.
"""

import ctypes
import importlib
import pkgutil

import pytest

import ckpt.kernel
from ckpt.kernel import clone3, elf_core, ioctl, pagemap, prctl, sched, userfaultfd
from ckpt.kernel.arch import NR
from ckpt.kernel.capabilities import CAPABILITY_NAMES, LINUX_CAPABILITY_VERSION_3
from ckpt.kernel.kcmp import KcmpType
from ckpt.kernel.pidfd import PIDFD_NONBLOCK
from tests.kernel.c_headers import read_defines, read_layout, read_numbers, run_c

C_STRUCTS = {
    "pagemap.page_region": ("struct page_region", "linux/fs.h"),
    "pagemap.pm_scan_arg": ("struct pm_scan_arg", "linux/fs.h"),
    "userfaultfd.uffdio_api": ("struct uffdio_api", "linux/userfaultfd.h"),
    "userfaultfd.uffdio_range": ("struct uffdio_range", "linux/userfaultfd.h"),
    "userfaultfd.uffdio_register": ("struct uffdio_register", "linux/userfaultfd.h"),
    "userfaultfd.uffdio_copy": ("struct uffdio_copy", "linux/userfaultfd.h"),
    "userfaultfd.uffdio_zeropage": ("struct uffdio_zeropage", "linux/userfaultfd.h"),
    "userfaultfd.uffdio_writeprotect": ("struct uffdio_writeprotect", "linux/userfaultfd.h"),
    "kcmp.kcmp_epoll_slot": ("struct kcmp_epoll_slot", "linux/kcmp.h"),
    "clone3.clone_args": ("struct clone_args", "linux/sched.h"),
    "sched.sched_attr": ("struct sched_attr", "linux/sched/types.h"),
    "prctl.prctl_mm_map": ("struct prctl_mm_map", "linux/prctl.h"),
    "capabilities.user_cap_header": ("struct __user_cap_header_struct", "linux/capability.h"),
    "capabilities.user_cap_data": ("struct __user_cap_data_struct", "linux/capability.h"),
    "ptrace._PeekSiginfoArgs": ("struct ptrace_peeksiginfo_args", "linux/ptrace.h"),
    "ptrace._SeccompMetadata": ("struct seccomp_metadata", "linux/ptrace.h"),
    "ptrace.raw_rseq_configuration": ("struct ptrace_rseq_configuration", "linux/ptrace.h"),
    "arch.x86_64.Registers": ("struct user_regs_struct", "sys/user.h"),
    "elf_core.Elf64_Ehdr": ("Elf64_Ehdr", "elf.h"),
    "elf_core.Elf64_Phdr": ("Elf64_Phdr", "elf.h"),
    "elf_core.Elf64_Shdr": ("Elf64_Shdr", "elf.h"),
    "elf_core.elf_siginfo": ("struct elf_siginfo", "sys/procfs.h"),
    "elf_core.elf_timeval": ("struct timeval", "sys/time.h"),
    "elf_core.elf_prstatus": ("struct elf_prstatus", "sys/procfs.h"),
    "elf_core.elf_prpsinfo": ("struct elf_prpsinfo", "sys/procfs.h"),
}

UNKNOWN_TO_OLD_HEADERS = {"pagemap.page_region": 24, "pagemap.pm_scan_arg": 96}
"""Size in bytes (6.7); every member is a __u64, one after the other."""

NOT_OF_THE_KERNEL = {"libc._PyBuffer"}


def declared_structs():
    found = {}
    for module in pkgutil.walk_packages(ckpt.kernel.__path__, "ckpt.kernel."):
        prefix = module.name.removeprefix("ckpt.kernel.")
        for name, item in vars(importlib.import_module(module.name)).items():
            if isinstance(item, type(ctypes.Structure)) and item.__module__ == module.name:
                found[f"{prefix}.{name}"] = item
    return found


DECLARED = {name: item for name, item in declared_structs().items() if name in C_STRUCTS}


def layout_of(struct):
    members = [field[0] for field in struct._fields_]
    places = {name: getattr(struct, name) for name in members}
    return (
        ctypes.sizeof(struct),
        {name: (place.offset, place.size) for name, place in places.items()},
    )


def test_no_struct_is_declared_that_is_not_compared():
    assert declared_structs().keys() - NOT_OF_THE_KERNEL == C_STRUCTS.keys()


@pytest.mark.parametrize("name", C_STRUCTS)
def test_struct_is_laid_out_as_in_c(name):
    size, members = layout_of(DECLARED[name])
    c_name, header = C_STRUCTS[name]
    of_header = read_layout(header, c_name, list(members))
    if of_header is None:
        assert size == UNKNOWN_TO_OLD_HEADERS[name]
        assert list(members.values()) == [(at, 8) for at in range(0, size, 8)]
    else:
        assert (size, members) == of_header


def test_events_of_a_userfaultfd():
    ours = {
        name: item for name, item in vars(userfaultfd).items() if name.startswith("UFFD_EVENT_")
    }
    assert len(ours) == 5
    assert compare(["linux/userfaultfd.h"], ours, {}) == ours
    assert userfaultfd._MESSAGE.size == read_layout("linux/userfaultfd.h", "struct uffd_msg", [])[0]


def test_scan_arg_ends_with_the_masks_in_the_specified_order():
    names = [field[0] for field in pagemap.pm_scan_arg._fields_]
    assert names[:5] == ["size", "flags", "start", "end", "walk_end"]
    assert names[5:8] == ["vec", "vec_len", "max_pages"]
    assert names[8:] == ["category_inverted", "category_mask", "category_anyof_mask", "return_mask"]


def compare(headers, ours, unknown):
    """Compare numbers with the headers'; what these do not know must be what `unknown` says."""
    known = read_numbers(headers, ours)
    missing = {name: value for name, value in ours.items() if name not in known}
    assert {name: ours[name] for name in known} == known
    assert {name: unknown.get(name) for name in missing} == missing
    assert len(known) + len(missing) == len(ours)
    return known


def test_ioctl_numbers():
    ours = {
        name: getattr(module, name)
        for module in (userfaultfd, pagemap)
        for name in vars(module)
        if name.startswith("UFFDIO_") or name == "PAGEMAP_SCAN"
    }
    assert len(ours) == 16
    unknown = {"PAGEMAP_SCAN": 0xC0606610}
    compare(["linux/userfaultfd.h", "linux/fs.h"], ours, unknown)


@pytest.mark.parametrize(
    ("macro", "number"),
    [
        ("_IO('x', 7)", ioctl.io("x", 7)),
        ("_IOR(0xAA, 255, char[16383])", ioctl.ior(0xAA, 255, 16383)),
        ("_IOW('f', 0, int)", ioctl.iow("f", 0, 4)),
        ("_IOWR(1, 1, long[2])", ioctl.iowr(1, 1, userfaultfd.uffdio_range)),
    ],
)
def test_ioctl_helpers(macro, number):
    assert int(run_c(["linux/ioctl.h"], f'printf("%lu", (unsigned long){macro});')) == number


def test_ioctl_argument_too_big():
    with pytest.raises(ValueError, match="16383"):
        ioctl.iow("f", 0, 16384)


def test_userfaultfd_features():
    ours = {f"UFFD_FEATURE_{bit.name}": bit.value for bit in userfaultfd.UffdFeature}
    unknown = {
        "UFFD_FEATURE_WP_UNPOPULATED": 1 << 13,
        "UFFD_FEATURE_POISON": 1 << 14,
        "UFFD_FEATURE_WP_ASYNC": 1 << 15,
        "UFFD_FEATURE_MOVE": 1 << 16,
    }
    known = compare(["linux/userfaultfd.h"], ours, unknown)
    assert "UFFD_FEATURE_PAGEFAULT_FLAG_WP" in known


def test_userfaultfd_constants():
    names = ("UFFD_API", "UFFD_USER_MODE_ONLY")
    ours = {name: getattr(userfaultfd, name) for name in names}
    compare(["linux/userfaultfd.h"], ours, {})


def test_pagemap_scan_bits():
    ours = {n: v for n, v in vars(pagemap).items() if n.startswith(("PAGE_IS_", "PM_SCAN_"))}
    unknown = {
        "PAGE_IS_WPALLOWED": 1,
        "PAGE_IS_WRITTEN": 2,
        "PAGE_IS_FILE": 4,
        "PAGE_IS_PRESENT": 8,
        "PAGE_IS_SWAPPED": 16,
        "PAGE_IS_PFNZERO": 32,
        "PAGE_IS_HUGE": 64,
        "PAGE_IS_SOFT_DIRTY": 128,
        "PAGE_IS_GUARD": 256,
        "PM_SCAN_WP_MATCHING": 1,
        "PM_SCAN_CHECK_WPASYNC": 2,
    }
    assert ours.keys() == unknown.keys()
    compare(["linux/fs.h"], ours, unknown)


def test_prctl_numbers():
    ours = {f"PR_{option.name}": option.value for option in prctl.Prctl}
    ours |= {f"PR_SET_MM_{field.name}": field.value for field in prctl.MmField}
    ours |= {name: value for name, value in vars(prctl).items() if name.startswith("PR_")}
    unknown = {
        "PR_SET_MDWE": 65,
        "PR_GET_MDWE": 66,
        "PR_SET_MEMORY_MERGE": 67,
        "PR_GET_MEMORY_MERGE": 68,
        "PR_GET_AUXV": 0x41555856,
        "PR_TIMER_CREATE_RESTORE_IDS": 77,
        "PR_TIMER_CREATE_RESTORE_IDS_OFF": 0,
        "PR_TIMER_CREATE_RESTORE_IDS_ON": 1,
        "PR_TIMER_CREATE_RESTORE_IDS_GET": 2,
    }
    compare(["linux/prctl.h"], ours, unknown)


def test_clone_flags():
    ours = {f"CLONE_{flag.name}": flag.value for flag in clone3.CloneFlag}
    ours |= {name: value for name, value in vars(clone3).items() if name.startswith("CLONE_ARGS")}
    known = compare(["linux/sched.h"], ours, {})
    assert len(known) == len(clone3.CloneFlag) + 3


def test_scheduling_numbers():
    ours = {f"SCHED_{policy.name}": policy.value for policy in sched.SchedPolicy}
    del ours["SCHED_OTHER"]  # SCHED_NORMAL in the kernel's header
    ours |= {f"SCHED_FLAG_{flag.name}": flag.value for flag in sched.SchedFlag}
    compare(["linux/sched.h"], ours | {"SCHED_NORMAL": 0}, {"SCHED_EXT": 7})


def test_enumerators_of_kcmp_and_ioprio():
    prints = "".join(f'printf("%d ", KCMP_{kind.name});' for kind in KcmpType)
    prints += 'printf("%d %d", IOPRIO_WHO_PROCESS, IOPRIO_CLASS_SHIFT);'
    numbers = [int(word) for word in run_c(["linux/kcmp.h", "linux/ioprio.h"], prints).split()]
    ours = [*KcmpType, sched.IOPRIO_WHO_PROCESS, sched.IOPRIO_CLASS_SHIFT]
    assert [int(number) for number in ours] == numbers


def test_numbers_of_core_files():
    ours = {
        name: value
        for name, value in vars(elf_core).items()
        if name.startswith(("NT_", "PT_", "PF_", "ET_", "EM_", "PN_"))
    }
    assert compare(["elf.h"], ours, {}).keys() == ours.keys()
    sizes = run_c(
        ["sys/user.h", "sys/procfs.h"],
        'printf("%zu %zu %zu", sizeof(struct user_fpregs_struct), sizeof(elf_gregset_t) / 8,'
        " sizeof(((struct elf_prpsinfo *)0)->pr_psargs));",
    )
    own = [elf_core.FXSAVE_BYTES, elf_core.N_REGISTERS, elf_core.PSARGS_BYTES]
    assert [int(size) for size in sizes.split()] == own


def test_robust_list_head_size():
    text = run_c(["linux/futex.h"], 'printf("%zu", sizeof(struct robust_list_head));')
    assert int(text) == sched.ROBUST_LIST_HEAD_BYTES


def test_capability_numbers():
    ours = {f"CAP_{name.upper()}": number for number, name in enumerate(CAPABILITY_NAMES)}
    ours["CAP_LAST_CAP"] = len(CAPABILITY_NAMES) - 1
    ours["_LINUX_CAPABILITY_VERSION_3"] = LINUX_CAPABILITY_VERSION_3
    known = compare(["linux/capability.h"], ours, {})
    assert len(known) == len(ours)


def test_pidfd_flag():
    assert read_numbers(["fcntl.h"], ["O_NONBLOCK"]) == {"O_NONBLOCK": PIDFD_NONBLOCK}


NEWER_CALLS = {
    "uretprobe": 335,
    "uprobe": 336,
    "cachestat": 451,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "statmount": 457,
    "listmount": 458,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,
    "file_getattr": 468,
    "file_setattr": 469,
}
"""Since 6.1 (arch/x86/entry/syscalls/syscall_64.tbl of 6.18)."""


def test_system_call_numbers():
    defines = read_defines("asm/unistd_64.h")
    of_header = {
        name.removeprefix("__NR_"): int(text)
        for name, text in defines.items()
        if name.startswith("__NR_")
    }
    ours = {call.name: call.value for call in NR}
    assert len(of_header) > 350
    assert {name: ours.get(name) for name in of_header} == of_header
    newer = {name: ours[name] for name in ours.keys() - of_header.keys()}
    assert newer == {name: NEWER_CALLS[name] for name in newer}
