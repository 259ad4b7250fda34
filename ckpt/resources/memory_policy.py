"""From which memory nodes pages come: the policy of each thread, and of mappings with their own.

Kernel: get_mempolicy(2), set_mempolicy(2), mbind(2), /proc/PID/numa_maps (numa(7)).

Which mappings have a policy is read while the target runs, and asked of it again when it is frozen.
What that misses is an mbind in between, and a policy that is the same as that of the first thread.
A home node (set_mempolicy_home_node) is not seen. A kernel without NUMA has neither call: there is
nothing to capture then; an image with a policy is refused on a host without its nodes.
"""

import contextlib
import errno
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from ckpt.errors import Finding
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.procfs.files import decode, read_bytes
from ckpt.process.clones import Common
from ckpt.process.remote import Call, In, Out, Reply, call
from ckpt.resources.base import (
    Capture,
    Later,
    Rebuilt,
    Resource,
    Restore,
    Stage,
    Stopped,
    Target,
    expect,
)

_MODE = struct.Struct("<i")
_MASK_BYTES = 128
_MAX_NODES = 8 * _MASK_BYTES
_F_ADDR = 2
_DEFAULT = 0
_ONLINE = Path("/sys/devices/system/node/possible")


@attrs.frozen(slots=True, repr=False)
class Policy:
    """One policy."""

    mode: int
    """MPOL_* with its flags; 0 is the default."""
    nodes: bytes
    """A bit for each node, the lowest first, without zeros at the end."""

    def __attrs_post_init__(self) -> None:
        """Refuse a mask that is longer than any kernel's."""
        if len(self.nodes) > _MASK_BYTES:
            raise ValueError("a mask of nodes is too long")


@attrs.frozen(slots=True, repr=False)
class ThreadPolicyRecord:
    """What a thread's pages come from, unless their mapping says otherwise."""

    policy: Policy


@attrs.frozen(slots=True, repr=False)
class MappingPolicy:
    """A mapping with a policy of its own."""

    start: int
    end: int
    policy: Policy


@attrs.frozen(slots=True, repr=False)
class MappingPoliciesRecord:
    """Those of a process, ascending."""

    mappings: tuple[MappingPolicy, ...]


_NAME = "mapping policies"


def look(target: Target) -> Iterator[Finding]:
    """Note which mappings may have a policy of their own; walks the page tables, as smaps does."""
    starts = []
    # A kernel without NUMA has no such file.
    with contextlib.suppress(OSError):
        text = decode(_read_numa_maps(target))
        lines = (line.split(" ", 2) for line in text.split("\n") if line)
        starts = [int(fields[0], 16) for fields in lines if fields[1] != "default"]
    target.notes[_NAME] = starts
    yield from ()


def _read_numa_maps(target: Target) -> bytes:
    if not Path("/proc/self/numa_maps").exists():
        return b""
    return read_bytes(target.pid, "numa_maps")


def capture_mappings(stopped: Stopped) -> Capture[MappingPoliciesRecord]:
    """Ask for the policies of the mappings that were noted, and are still there."""
    ends = {}
    noted = set(stopped.notes.get(_NAME, ()))
    for line in stopped.task.maps_lines if noted else ():
        start, _, end = line.partition(" ")[0].partition("-")
        if int(start, 16) in noted:
            ends[int(start, 16)] = int(end, 16)
    if not ends:
        yield []
        return MappingPoliciesRecord(())
    replies = yield [_ASK_OWN, *(_ask(start, _F_ADDR) for start in ends)]
    return Later(lambda: _record_of(ends, replies))


def _record_of(ends: Mapping[int, int], replies: Sequence[Reply]) -> MappingPoliciesRecord:
    own = _policy_of(replies[0])
    policies = map(_policy_of, replies[1:])
    return MappingPoliciesRecord(
        tuple(
            MappingPolicy(start, end, policy)
            for (start, end), policy in zip(ends.items(), policies, strict=True)
            if policy not in (own, _NONE)
        )
    )


_NONE = Policy(_DEFAULT, b"")


def _ask(address: int, flags: int) -> Call:
    return call(NR.get_mempolicy, Out(_MODE.size), Out(_MASK_BYTES), _MAX_NODES, address, flags)


_ASK_OWN = _ask(0, 0)


def _policy_of(reply: Reply) -> Policy:
    if reply.error in (errno.ENOSYS, errno.EFAULT):
        return _NONE
    expect("asking for the memory policy", [reply])
    (mode,) = _MODE.unpack(reply.outs[0])
    return Policy(mode, bytes(reply.outs[1]).rstrip(b"\0"))


def capture_thread(_stopped: Stopped) -> Capture[ThreadPolicyRecord]:
    """Ask the thread."""
    replies = yield [_ASK_OWN]
    return Later(lambda: ThreadPolicyRecord(_policy_of(replies[0])))


def check_thread(record: ThreadPolicyRecord, _features: Features) -> Iterator[Finding]:
    """Name nodes that this host does not have."""
    return _iter_missing([record.policy])


def check_mappings(record: MappingPoliciesRecord, _features: Features) -> Iterator[Finding]:
    """Name nodes that this host does not have."""
    return _iter_missing([one.policy for one in record.mappings])


def _iter_missing(policies: list[Policy]) -> Iterator[Finding]:
    wanted = max((int.from_bytes(one.nodes, "little") for one in policies), default=0).bit_length()
    if not wanted and all(one.mode == _DEFAULT for one in policies):
        return
    try:
        highest = int(_ONLINE.read_text(encoding="ascii").strip().rpartition("-")[2].split(",")[-1])
    except (OSError, ValueError):
        yield Finding("memory policy", "this kernel has no memory nodes")
        return
    if wanted > highest + 1:
        yield Finding("memory policy", f"this host has no memory node {wanted - 1}")


def restore_thread(record: ThreadPolicyRecord, _rebuilt: Rebuilt) -> Restore:
    """Set the thread's policy."""
    if record.policy != _NONE:
        mode, nodes = record.policy.mode, _mask(record.policy)
        expect("setting the memory policy", (yield [call(NR.set_mempolicy, mode, *nodes)]))


def restore_mappings(record: MappingPoliciesRecord, _rebuilt: Rebuilt) -> Restore:
    """Set the policies of mappings; pages that are there stay where they are."""
    calls = [
        call(NR.mbind, one.start, one.end - one.start, one.policy.mode, *_mask(one.policy), 0)
        for one in record.mappings
    ]
    expect("setting memory policies", (yield calls))


def _mask(policy: Policy) -> tuple[In | int, int]:
    """Return the mask and its bits, of which the kernel reads one less."""
    if not policy.nodes:
        return 0, 0
    return In(policy.nodes.ljust(_MASK_BYTES, b"\0")), _MAX_NODES


MAPPING_POLICIES = Resource(
    "mapping_policies",
    MappingPoliciesRecord,
    Stage.PROCESS,
    capture=capture_mappings,
    restore=restore_mappings,
    common=Common.MEMORY,
    look=look,
    check_host=check_mappings,
)
THREAD_POLICY = Resource(
    "memory_policy",
    ThreadPolicyRecord,
    Stage.THREAD,
    capture=capture_thread,
    restore=restore_thread,
    check_host=check_thread,
)
