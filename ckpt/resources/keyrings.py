"""Keyrings: what the kernel keeps for a thread, a process, a session; refused where it matters.

Keys cannot be read back in general (a payload may be for the kernel alone) and their serial numbers
cannot be chosen. So a restored process has the keyrings of the restorer, and what would be lost is
named when the target is frozen, since only it can ask:

- a keyring of a thread or of a process;
- a session keyring, other than ours and the user's default one, with keys in it. Keyrings that are
  linked to it (a user's own) are the host's, and so is the `invocation_id` that systemd leaves to
  each service.

Kernel: keyctl(2) KEYCTL_GET_KEYRING_ID, KEYCTL_READ, KEYCTL_DESCRIBE; keyrings(7). Asking for its
session keyring gives a process the default one if it had none, as any use of keys does
(security/keys/process_keys.c).
"""

import struct
from collections.abc import Iterator, Sequence

import attrs

from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel.arch import NR
from ckpt.kernel.libc import syscall
from ckpt.kernel.procfs.files import decode
from ckpt.process.remote import Out, Reply, call
from ckpt.resources.base import Capture, Rebuilt, Resource, Restore, Stage, Stopped
from ckpt.units import Tid

_GET_KEYRING_ID, _DESCRIBE, _READ = 0, 6, 11
_THREAD, _PROCESS, _SESSION, _USER_SESSION = -1, -2, -3, -5
_UNSIGNED = 0xFFFF_FFFF
_MAX_KEYS = 64
_DESCRIPTION_BYTES = 512
_HARMLESS = "invocation_id"


@attrs.frozen(slots=True, repr=False)
class KeyringsRecord:
    """Nothing: what cannot be brought back is refused."""


def _keyring(which: int) -> list[int]:
    return [_GET_KEYRING_ID, which & _UNSIGNED, 0]


_ASK_OWN = [call(NR.keyctl, *_keyring(which)) for which in (_THREAD, _PROCESS)]
_ASK_SESSION = [call(NR.keyctl, *_keyring(which)) for which in (_SESSION, _USER_SESSION)]


def capture(stopped: Stopped) -> Capture[KeyringsRecord]:
    """Ask the thread, and of the session only the first one.

    Raises:
        UnsupportedState: it has keys that would be lost.
    """
    is_first = stopped.tid == Tid(stopped.pid)
    replies = yield [*_ASK_OWN, *(_ASK_SESSION if is_first else [])]
    findings = list(_iter_own_findings(stopped, replies))
    if is_first and _has_session(replies[2:]):
        serial = replies[2].value
        listing, *_ = yield [call(NR.keyctl, _READ, serial, Out(4 * _MAX_KEYS), 4 * _MAX_KEYS)]
        keys = _keys_of(listing)
        described = yield [
            call(NR.keyctl, _DESCRIBE, key, Out(_DESCRIPTION_BYTES), _DESCRIPTION_BYTES)
            for key in keys
        ]
        findings += _iter_session_findings(stopped, described if keys else ())
    if findings:
        raise UnsupportedState(stopped.pid, tuple(findings))
    return KeyringsRecord()


def _iter_own_findings(stopped: Stopped, replies: Sequence[Reply]) -> Iterator[Finding]:
    for reply, whose in zip(replies[:2], ("thread", "process"), strict=True):
        if reply.ok:
            number = stopped.tid if whose == "thread" else stopped.pid
            yield Finding(f"{whose} {number}", "has a keyring of its own, which is not supported")


def _has_session(replies: Sequence[Reply]) -> bool:
    """Tell whether there is a session keyring that a restored process would not have anyway."""
    session, default = replies
    return session.ok and session.value not in (default.value, _read_our_session())


def _read_our_session() -> int:
    try:
        return syscall(NR.keyctl, *_keyring(_SESSION))
    except OSError:
        return 0


def _keys_of(listing: Reply) -> list[int]:
    if not listing.ok:
        return []
    n_keys = min(listing.value // 4, _MAX_KEYS)
    return list(struct.unpack(f"<{n_keys}i", listing.outs[0][: 4 * n_keys]))


def _iter_session_findings(stopped: Stopped, described: Sequence[Reply]) -> Iterator[Finding]:
    for reply in described:
        # type;uid;gid;permissions;description
        words = decode(reply.outs[0].partition(b"\0")[0]).split(";", 4) if reply.ok else [""]
        if words[0] != "keyring" and words[-1] != _HARMLESS:
            yield Finding(
                f"process {stopped.pid}",
                f"has a session keyring with keys ({words[-1] or 'unreadable'}), which is not"
                " supported",
                "run ckpt in the same session, to keep the keyring",
            )


def restore(_record: KeyringsRecord, _rebuilt: Rebuilt) -> Restore:
    """Do nothing: the keyrings are those of the restorer."""
    yield []


KEYRINGS = Resource("keyrings", KeyringsRecord, Stage.THREAD, capture=capture, restore=restore)
