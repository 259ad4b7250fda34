"""Capabilities: their names, and the three sets of a thread.

Source: capget(2), capabilities(7), include/uapi/linux/capability.h.
"""

import ctypes
from typing import Final

import attrs

from ckpt.kernel.arch import NR
from ckpt.kernel.failures import failures_of
from ckpt.kernel.libc import syscall
from ckpt.units import Pid, Tid

CAPABILITY_NAMES: Final = (
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
)
"""The position is the number: CAP_CHOWN is 0."""

LINUX_CAPABILITY_VERSION_3: Final = 0x20080522


class user_cap_header(ctypes.Structure):  # noqa: N801
    """`struct __user_cap_header_struct`."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class user_cap_data(ctypes.Structure):  # noqa: N801
    """`struct __user_cap_data_struct`: 32 capabilities; version 3 has two of them."""

    effective: int
    permitted: int
    inheritable: int
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@attrs.frozen(repr=False)
class CapSets:
    """The three sets that capget tells; bit n is capability n."""

    effective: int
    permitted: int
    inheritable: int


def capget(tid: Tid | Pid) -> CapSets:
    """Return the sets of a thread; 0 is the calling one.

    Raises:
        TargetGone: there is no such thread.
    """
    header = user_cap_header(version=LINUX_CAPABILITY_VERSION_3, pid=tid)
    data = (user_cap_data * 2)()
    with failures_of(tid, "read the capabilities"):
        syscall(NR.capget, ctypes.addressof(header), ctypes.addressof(data))
    low, high = data
    return CapSets(
        effective=low.effective | high.effective << 32,
        permitted=low.permitted | high.permitted << 32,
        inheritable=low.inheritable | high.inheritable << 32,
    )


def capability_names(mask: int) -> frozenset[str]:
    """Return the names (lower case, without `cap_`) in a set; unknown ones as `cap_<number>`."""
    return frozenset(
        CAPABILITY_NAMES[bit] if bit < len(CAPABILITY_NAMES) else f"cap_{bit}"
        for bit in range(mask.bit_length())
        if mask >> bit & 1
    )
