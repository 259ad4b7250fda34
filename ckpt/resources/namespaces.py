"""The namespaces of a tree: names of the host (uts), IPC, network.

    the root is where ckpt is       the tree is restored where the restorer is
    the root has one of its own     it is made anew, with what belongs into it

All processes and threads of a tree must be where its root is. The restorer enters the new
namespaces itself, before it opens or starts anything, and leaves them when all is built: see
`entered`. So sockets, queues and processes begin their life there, and nothing is moved.

Kernel: namespaces(7), uts_namespaces(7), network_namespaces(7); /proc/PID/ns, setns(2), unshare(2);
uname(2) as a remote call.

    uts     host name and domain name
    net     loopback, up or down, with its usual addresses. Refused: other interfaces, other
            addresses, routes, iptables. Settings below /proc/sys/net are the kernel's own again
    ipc     `sysv.py` has what is in it
    mnt     `mounts.py` enters and makes it
    pid     one level below ckpt's: the image has the tree's own numbers, and it comes back in a new
            one, with the root as its first process if it was that, else with an init of ours. The
            tree is all that comes back of it

Others (user, control group) are judged by `identity.py`.
"""

import contextlib
import os
import re
from _socket import if_nameindex, sethostname  # `socket` takes 20 ms to load
from collections.abc import Iterator
from pathlib import Path

import attrs

from ckpt.errors import Finding, NotPermitted, RestoreFailed, TargetGone
from ckpt.kernel import namespaces
from ckpt.kernel.arch import NR
from ckpt.kernel.features import Features
from ckpt.kernel.procfs import files as procfs_files
from ckpt.kernel.procfs import status as procfs_status
from ckpt.process.remote import Out, Reply, call
from ckpt.resources import mounts
from ckpt.resources.base import Capture, Rebuilt, Resource, Restore, Stage, Stopped, Target
from ckpt.resources.mounts import NOTHING as NO_MOUNTS
from ckpt.resources.mounts import MountsRecord
from ckpt.units import Pid, Tid

_SPOKEN = {"uts": "host name", "ipc": "IPC", "net": "network"}
_UTS_FIELD_BYTES = 65
_UTSNAME_BYTES = 6 * _UTS_FIELD_BYTES
_NODENAME_AT, _DOMAINNAME_AT = 1 * _UTS_FIELD_BYTES, 5 * _UTS_FIELD_BYTES
_MAX_NAME = _UTS_FIELD_BYTES - 1
_LOCAL = re.compile(r"\|-- (\S+)\n\s+/32 host LOCAL")
_REMEDY = "run ckpt inside that namespace"


@attrs.frozen(slots=True, repr=False)
class NamespacesRecord:
    """What the root of a tree has for itself; empty for all others, and if it has nothing."""

    own: tuple[str, ...]
    """Of `uts`, `ipc`, `net`."""
    hostname: bytes
    """Empty unless it has its own."""
    domainname: bytes
    loopback_up: bool
    mounts: MountsRecord = NO_MOUNTS
    """What it has mounted for itself."""
    pids: bool = False
    """The tree is in a pid namespace below that of ckpt; all its numbers are of that."""

    def __attrs_post_init__(self) -> None:
        """Refuse what cannot be made."""
        if not set(self.own) <= namespaces.BY_NAME.keys():
            raise ValueError(f"namespaces that are not known: {self.own}")
        if len(self.hostname) > _MAX_NAME or len(self.domainname) > _MAX_NAME:
            raise ValueError("a host name or domain name is too long")


def look(target: Target) -> Iterator[Finding]:
    """Name who is not where the root is, and what the root's own namespaces have that is lost."""
    pid, root = target.pid, target.tree.pids[0]
    of_root = {name: _read(root, name) for name in _SPOKEN}
    for tid in procfs_files.list_tids(pid):
        subject = f"process {pid}" if tid == Tid(pid) else f"thread {tid}"
        for name, spoken in _SPOKEN.items():
            theirs = _read(tid, name)
            if theirs and theirs != of_root[name]:
                yield Finding(
                    subject,
                    f"is in another {spoken} namespace than the root of its tree, which is not"
                    " supported",
                )
        yield from _iter_pid_findings(tid, subject, root)
    if pid == root:
        yield from _iter_own_findings(target)
        yield from mounts.look(target)
        yield from _iter_depth_findings(target)


def _iter_pid_findings(tid: Tid, subject: str, root: Pid) -> Iterator[Finding]:
    theirs, of_root = _read(tid, "pid"), _read(root, "pid")
    if theirs and of_root and theirs != of_root:
        yield Finding(
            subject,
            "is in another pid namespace than the root of its tree, which is not supported",
            "dump a process that was made in that namespace",
        )
    for_children = _read(tid, "pid_for_children")
    if theirs and for_children and for_children != theirs:
        yield Finding(
            subject,
            "makes its children in another pid namespace than its own, which is not supported",
            "dump a process that was made in that namespace",
        )


def _iter_depth_findings(target: Target) -> Iterator[Finding]:
    depth = len(procfs_status.read_status(target.pid).ns_pid) - 1
    if depth > 1:
        yield Finding(
            f"process {target.pid}",
            f"is in a pid namespace {depth} levels below that of ckpt; one is supported",
            _REMEDY,
        )
    elif depth and "sys_admin" not in target.features.capabilities:
        yield Finding(
            f"process {target.pid}",
            "is in another pid namespace than ckpt, which lacks cap_sys_admin",
            _REMEDY,
        )


def _read(pid: Pid | Tid, name: str) -> str:
    """Return the name of a namespace; empty if there is none of that kind, or the task ended."""
    try:
        return namespaces.read_namespace(pid, name)
    except OSError:
        return ""


def _read_own(pid: Pid) -> tuple[str, ...]:
    """Return in which namespaces a process is and we are not."""
    us = Pid(os.getpid())
    return tuple(name for name in _SPOKEN if _read(pid, name) != _read(us, name))


def _iter_own_findings(target: Target) -> Iterator[Finding]:
    own = _read_own(target.pid)
    if own and "sys_admin" not in target.features.capabilities:
        names = ", ".join(_SPOKEN[name] for name in own)
        yield Finding(
            f"process {target.pid}",
            f"is in another namespace ({names}) than ckpt, which lacks cap_sys_admin",
            _REMEDY,
        )
    elif "net" in own:
        for problem in _iter_network_problems(target.pid):
            yield Finding(
                f"process {target.pid}",
                f"has a network namespace of its own with {problem}, which is not supported",
                _REMEDY,
            )


def _iter_network_problems(pid: Pid) -> Iterator[str]:
    """Name what a new network namespace would not have."""
    try:
        with namespaces.inside(pid, "net"):
            others = sorted(name for _, name in if_nameindex() if name not in _EVERYWHERE)
    except FileNotFoundError:
        raise TargetGone(pid) from None
    if others:
        yield f"other interfaces than loopback ({', '.join(others)})"
    local = _LOCAL.findall(_read_net(pid, "fib_trie"))
    extra = set(local) - {"127.0.0.1"}
    extra |= {line.split()[0] for line in _read_net(pid, "if_inet6").splitlines()} - {_LOCALHOST_6}
    if extra and not others:
        yield f"other addresses than loopback's own ({', '.join(sorted(extra))})"
    if len(_read_net(pid, "route").splitlines()) > 1 and not others:
        yield "routes"
    tables = _read_net(pid, "ip_tables_names") + _read_net(pid, "ip6_tables_names")
    if tables:
        yield f"iptables ({', '.join(sorted(set(tables.split())))})"


_LOCALHOST_6 = "0" * 31 + "1"
_EVERYWHERE = frozenset({"lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "sit0"}) | {
    *("ip6tnl0", "ip6_vti0", "ip6gre0")
}
"""Interfaces that the kernel makes in each network namespace, if their modules are loaded."""


def _read_net(pid: Pid, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/net/{name}").read_text(encoding="ascii")
    except OSError:
        # A kernel without it, or a process that ended: then there is nothing.
        return ""


def capture(stopped: Stopped) -> Capture[NamespacesRecord]:
    """Ask the root for what is its own."""
    is_root = stopped.pid == stopped.tree.pids[0]
    own = _read_own(stopped.pid) if is_root else ()
    loopback_up = False
    mounted = mounts.read_record(stopped)
    if "net" in own:
        with namespaces.inside(stopped.pid, "net"):
            loopback_up = namespaces.is_loopback_up()
    pids = is_root and len(stopped.read_status().ns_pid) > 1
    replies = yield [_ASK_NAMES] if "uts" in own else []
    hostname, domainname = _names_of(replies[0]) if "uts" in own else (b"", b"")
    return NamespacesRecord(own, hostname, domainname, loopback_up, mounted, pids)


_ASK_NAMES = call(NR.uname, Out(_UTSNAME_BYTES))


def _names_of(reply: Reply) -> tuple[bytes, bytes]:
    raw = reply.outs[0]
    fields = [raw[at : at + _UTS_FIELD_BYTES] for at in (_NODENAME_AT, _DOMAINNAME_AT)]
    hostname, domainname = (field.partition(b"\0")[0] for field in fields)
    return hostname, domainname


def check_host(record: NamespacesRecord, features: Features) -> Iterator[Finding]:
    """Name namespaces that we may not make."""
    wanted = [*(_SPOKEN[name] for name in record.own), *(["pid"] if record.pids else [])]
    if wanted and "sys_admin" not in features.capabilities:
        names = ", ".join(wanted)
        yield Finding("namespaces", f"ckpt may make none of its own ({names})", "run it as root")


@contextlib.contextmanager
def entered(record: NamespacesRecord) -> Iterator[None]:
    """Have this thread, and all that it starts, in namespaces as those of the record.

    Raises:
        NotPermitted: we may not make them.
        RestoreFailed: the kernel refused something else.
    """
    mounts.refuse_elsewhere(record.mounts)
    with contextlib.ExitStack() as stack:
        if record.own:
            try:
                stack.enter_context(namespaces.made_anew(record.own))
                _furnish(record)
            except PermissionError as error:
                raise NotPermitted("make namespaces", "run ckpt as root") from error
            except OSError as error:
                raise RestoreFailed("making namespaces", error.strerror or str(error)) from error
        yield


def _furnish(record: NamespacesRecord) -> None:
    if "uts" in record.own:
        sethostname(record.hostname)  # type: ignore[arg-type]
        namespaces.set_domainname(record.domainname)
    if "net" in record.own and record.loopback_up:
        namespaces.set_loopback_up()


def restore(record: NamespacesRecord, rebuilt: Rebuilt) -> Restore:
    """Look whether the process was started where it belongs: `entered` was called before."""
    if "uts" not in record.own:
        return
    (reply,) = yield [_ASK_NAMES]
    if _names_of(reply) != (record.hostname, record.domainname):
        raise RestoreFailed("entering namespaces", f"process {rebuilt.pid} is not in its own")


NAMESPACES = Resource(
    "namespaces",
    NamespacesRecord,
    Stage.PROCESS,
    capture=capture,
    restore=restore,
    look=look,
    check_host=check_host,
)
