"""Who a thread is to the kernel: ids, groups, capabilities, securebits, no_new_privs.

Each thread has its own, and is given its own, by raw system calls (the C library would change all
threads). They are the last but registers: everything before needs the restorer's privileges.

Kernel: /proc/PID/status, capget(2), setresuid(2), setfsuid(2), setgroups(2), prctl(2)
PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS; capabilities(7),
security/commoncap.c for what each step does to the sets.

The order, so that no step takes away what a later one needs:

    securebits for the time     ids can change and capabilities stay, ambient ones can be raised
    groups, gids, uids
    inheritable set             while the bounding set still allows it
    ambient set                 needs permitted and inheritable, and securebits that allow it
    bounding set                dropping needs CAP_SETPCAP
    securebits                  the image's own (keepcaps is one of them)
    permitted, effective        now nothing more is needed
    no_new_privs

What is already as it should be is not touched. A capability that the restorer lacks cannot be
given: refused before anything starts; one that is missing only from the bounding set is told to the
user. no_new_privs of the restorer cannot be taken off again; the user is told. Labels of security
modules and keyrings have files of their own.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache

import attrs

from ckpt.errors import Finding, RestoreFailed
from ckpt.kernel.arch import NR
from ckpt.kernel.capabilities import LINUX_CAPABILITY_VERSION_3, capability_names
from ckpt.kernel.features import Features
from ckpt.kernel.prctl import (
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAP_AMBIENT_RAISE,
    Prctl,
)
from ckpt.kernel.procfs import status as procfs_status
from ckpt.kernel.procfs.files import decode
from ckpt.process.remote import Call, In, call
from ckpt.resources.base import Capture, Later, Rebuilt, Resource, Restore, Stage, Stopped, expect
from ckpt.units import Pid, Tid

_NO_SETUID_FIXUP = 1 << 2
_NO_CAP_AMBIENT_RAISE = 1 << 6
_HEADER = struct.Struct("<Ii")
_SETS = struct.Struct("<6I")
_WORD = 0xFFFF_FFFF

_Ids = tuple[int, int, int, int]
"""(real, effective, saved, file system)."""


@attrs.frozen(slots=True, repr=False)
class CredentialsRecord:
    """The credentials of one thread; in the sets, bit n is capability n."""

    uids: tuple[int, int, int, int]
    """Real, effective, saved, file system."""
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    securebits: int
    """With SECBIT_KEEP_CAPS, the flag of PR_SET_KEEPCAPS."""
    no_new_privs: bool


def capture(stopped: Stopped) -> Capture[CredentialsRecord]:
    """Read /proc; only the securebits have to be asked for."""
    text = stopped.status_text
    replies = yield _ASK_SECUREBITS
    return Later(
        lambda: _record_of(procfs_status.parse_status(decode(text)), max(replies[0].value, 0))
    )


_ASK_SECUREBITS = [call(NR.prctl, Prctl.GET_SECUREBITS)]


def _record_of(status: procfs_status.Status, securebits: int) -> CredentialsRecord:
    return CredentialsRecord(
        uids=status.uids,
        gids=status.gids,
        groups=status.groups,
        inheritable=status.cap_inheritable,
        permitted=status.cap_permitted,
        effective=status.cap_effective,
        bounding=status.cap_bounding,
        ambient=status.cap_ambient,
        securebits=securebits,
        no_new_privs=status.no_new_privs,
    )


def check_host(record: CredentialsRecord, _features: Features) -> Iterator[Finding]:
    """Name the capabilities that we cannot give because we do not have them."""
    needed = record.permitted | record.effective | record.inheritable | record.ambient
    missing = needed & ~_our_capabilities()
    if missing:
        names = ", ".join(f"cap_{name}" for name in sorted(capability_names(missing)))
        yield Finding(
            "credentials", f"ckpt does not have {names}, which the process had", "run it with them"
        )


@lru_cache(maxsize=1)
def _our_capabilities() -> int:
    """Return those that we can give; they are asked for once, for all threads of an image."""
    ours = procfs_status.read_status(Pid(os.getpid()))
    return ours.cap_permitted | ours.cap_inheritable


def restore(record: CredentialsRecord, rebuilt: Rebuilt) -> Restore:
    """Set what differs, in the order of the module's text, and look whether it is so."""
    (reply,) = yield _ASK_SECUREBITS
    now = _record_of(_read_status(rebuilt), max(reply.value, 0))
    if now == record:
        return
    expect("setting credentials", (yield list(_iter_changes(record, now))))
    (reply,) = yield _ASK_SECUREBITS
    now = _record_of(_read_status(rebuilt), max(reply.value, 0))
    _judge(record, now, rebuilt)


def _read_status(rebuilt: Rebuilt) -> procfs_status.Status:
    return procfs_status.read_task_status(rebuilt.pid, rebuilt.task.tid)


def _judge(record: CredentialsRecord, now: CredentialsRecord, rebuilt: Rebuilt) -> None:
    """Tell of what may differ, fail at what may not."""
    tolerated = attrs.evolve(now, bounding=record.bounding, no_new_privs=record.no_new_privs)
    if tolerated != record:
        different = [
            field.name
            for field in attrs.fields(CredentialsRecord)
            if getattr(tolerated, field.name) != getattr(record, field.name)
        ]
        reason = f"the kernel did not take the {', '.join(different)} of thread {rebuilt.task.tid}"
        raise RestoreFailed("setting credentials", reason)
    if rebuilt.task.tid != Tid(rebuilt.pid):
        return  # one warning is enough
    if now.bounding != record.bounding:
        names = sorted(capability_names(record.bounding & ~now.bounding))
        rebuilt.warn(f"missing from the bounding set of capabilities: {', '.join(names)}")
    if now.no_new_privs and not record.no_new_privs:
        rebuilt.warn("no_new_privs is set, as it is for ckpt; it was not")


def _iter_changes(record: CredentialsRecord, now: CredentialsRecord) -> Iterator[Call]:
    """Yield the calls that lead from `now` to `record`."""
    meanwhile = _securebits_meanwhile(record, now)
    if meanwhile != now.securebits:
        yield call(NR.prctl, Prctl.SET_SECUREBITS, meanwhile)
    yield from _iter_id_changes(record, now)
    if record.inheritable != now.inheritable:
        yield _capset(attrs.evolve(now, inheritable=record.inheritable))
    if record.ambient != now.ambient:
        yield call(NR.prctl, Prctl.CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        for number in _bits(record.ambient):
            yield call(NR.prctl, Prctl.CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0)
    for number in _bits(now.bounding & ~record.bounding):
        yield call(NR.prctl, Prctl.CAPBSET_DROP, number)
    if record.securebits != meanwhile:
        yield call(NR.prctl, Prctl.SET_SECUREBITS, record.securebits)
    if (record.permitted, record.effective) != (now.permitted, now.effective):
        yield _capset(record)
    if record.no_new_privs and not now.no_new_privs:
        yield call(NR.prctl, Prctl.SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _securebits_meanwhile(record: CredentialsRecord, now: CredentialsRecord) -> int:
    """Return securebits under which the steps do what they should and nothing else."""
    bits = now.securebits
    if record.uids != now.uids:
        bits |= _NO_SETUID_FIXUP
    if record.ambient and record.ambient != now.ambient:
        bits &= ~_NO_CAP_AMBIENT_RAISE
    return bits


def _iter_id_changes(record: CredentialsRecord, now: CredentialsRecord) -> Iterator[Call]:
    if record.groups != now.groups:
        raw = struct.pack(f"<{len(record.groups)}I", *record.groups)
        yield call(NR.setgroups, len(record.groups), In(raw) if raw else 0)
    yield from _iter_set_ids(NR.setresgid, NR.setfsgid, record.gids, now.gids)
    yield from _iter_set_ids(NR.setresuid, NR.setfsuid, record.uids, now.uids)


def _iter_set_ids(setres: NR, setfs: NR, wanted: _Ids, now: _Ids) -> Iterator[Call]:
    if wanted != now:
        yield call(setres, *wanted[:3])
        # setres* has set it to the effective one.
        if wanted[3] != wanted[1]:
            yield call(setfs, wanted[3])


def _capset(sets: CredentialsRecord) -> Call:
    words = [
        half
        for shift in (0, 32)
        for half in (
            sets.effective >> shift & _WORD,
            sets.permitted >> shift & _WORD,
            sets.inheritable >> shift & _WORD,
        )
    ]
    header = _HEADER.pack(LINUX_CAPABILITY_VERSION_3, 0)
    return call(NR.capset, In(header), In(_SETS.pack(*words)))


def _bits(mask: int) -> Iterable[int]:
    return (number for number in range(mask.bit_length()) if mask >> number & 1)


CREDENTIALS = Resource(
    "credentials",
    CredentialsRecord,
    Stage.CREDENTIALS,
    capture=capture,
    restore=restore,
    check_host=check_host,
)
