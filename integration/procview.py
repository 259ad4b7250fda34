"""What /proc says of a process, in a form that a restore must bring back unchanged.

Left out is what cannot be equal or is no state: times and counters, addresses of kernel objects,
the inode numbers of pipes, sockets and files without a name (named by order of appearance instead),
what ckpt's own tracker adds to a mapping (`uw`).
"""

import os
import re
import select
from pathlib import Path
from typing import Any

from ckpt.kernel.pidfd import pidfd_open
from ckpt.units import Pid

_STATUS_FIELDS = (
    *("Name", "Umask", "Tgid", "Uid", "Gid", "Groups", "Threads"),
    *("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"),
    *("Cpus_allowed_list", "THP_enabled"),
)
_LOOKS, _LOOK_EVERY_S = 100, 0.05
_VOLATILE_FLAGS = frozenset({"sd", "uw", "um", "ac", "??"})
# Of a timerfd, what is left and what has expired: `s_timerfd` compares it with the clock.
_VOLATILE_LINES = "mnt_id|ino|eventfd-id|it_value|ticks"
# oom_score follows memory use; ptrace changes it for a moment.
_FILES = (
    "limits",
    "timers",
    "oom_score_adj",
    "personality",
    "coredump_filter",
    "cmdline",
    "environ",
)


def view(pid: int) -> dict[str, Any]:
    """Return everything comparable; two views of the same state are equal."""
    root = Path("/proc", str(pid))
    tids = sorted(int(path.name) for path in (root / "task").iterdir())
    return {
        "maps": _maps(root),
        "fds": _fds(root),
        "cwd": str((root / "cwd").readlink()),
        "root": str((root / "root").readlink()),
        "exe": str((root / "exe").readlink()),
        "files": {name: (root / name).read_bytes() for name in _FILES},
        "auxv": (root / "auxv").read_bytes(),
        "threads": {tid: _status(root / "task" / str(tid)) for tid in tids},
    }


def view_at_rest(pid: int) -> dict[str, Any]:
    """Return the view of a process whose threads have come to where they wait.

    It may say that it is ready while one of them is on its way into ppoll, with another mask. A
    process that never rests is waited for in vain, for some seconds.
    """
    pidfd = pidfd_open(Pid(pid))
    try:
        for _ in range(_LOOKS):
            if is_at_rest(pid) or select.select([pidfd], [], [], _LOOK_EVERY_S)[0]:
                break
    finally:
        os.close(pidfd)
    return view(pid)


def is_at_rest(pid: int) -> bool:
    """Tell whether each thread waits in a system call, or has ended."""
    tasks = Path("/proc", str(pid), "task").iterdir()
    # Else it says that it is running, or -1.
    return all((task / "syscall").read_text()[0].isdigit() for task in tasks)


def _status(task: Path) -> dict[str, str]:
    lines = (task / "status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    view = {name: fields[name].strip() for name in _STATUS_FIELDS if name in fields}
    for name in ("SigPnd", "ShdPnd"):
        # One that is not blocked is on its way into the program: there for a moment, then gone.
        view[name] = hex(int(view[name], 16) & int(view["SigBlk"], 16))
    if fields["State"].split()[0] == "Z":
        # What a thread that has ended would block matters to nobody.
        del view["SigBlk"]
    return view


def _maps(root: Path) -> list[tuple[int, int, str, str]]:
    """Return (start, end, what) with neighbours that differ in nothing joined, as a kernel may."""
    joined: list[tuple[int, int, str, str]] = []
    nameless: dict[str, str] = {}
    start = end = offset = 0
    head = ""
    for line in (root / "smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+) *(.*)", line)
        if found:
            start, end, offset = (int(found[i], 16) for i in (1, 2, 4))
            inode = found[6]
            if _comes_back_anew(found[7]):
                inode = nameless.setdefault(inode, f"number {len(nameless)}")
            head = f"{found[3]} {found[5]} {inode} {found[7]}"
            if found[6] != "0":
                head += f" at {offset - start:x}"
        elif line.startswith("VmFlags:") and "[vsyscall]" not in head:
            flags = " ".join(sorted(set(line.split()[1:]) - _VOLATILE_FLAGS))
            if joined and joined[-1][1:] == (start, head, flags):
                joined[-1] = (joined[-1][0], end, head, flags)
            else:
                joined.append((start, end, head, flags))
    return joined


def _comes_back_anew(path: str) -> bool:
    """Tell whether a restore makes the file, so that its inode is another one."""
    return path.endswith(" (deleted)") or path.startswith(("/dev/shm/", "[anon_shmem:"))


def _fds(root: Path) -> dict[int, tuple[str, str]]:
    names: dict[str, str] = {}
    fds: dict[int, tuple[str, str]] = {}
    for name in sorted(os.listdir(root / "fd"), key=int):
        link = str((root / "fd" / name).readlink())
        if re.match(r"(pipe|socket):", link):
            link = names.setdefault(link, f"{link.split(':')[0]} number {len(names)}")
        info = (root / "fdinfo" / name).read_text()
        # What was made by O_TMPFILE is shown by its inode, and comes back without that flag.
        link, is_unnamed = re.subn(r"/#\d+ \(deleted\)$", "/# (deleted)", link)
        if is_unnamed:
            info = re.sub(r"(?<=^flags:\t)0\d+", _without_tmpfile, info, flags=re.MULTILINE)
        # A name that somebody else has meanwhile.
        link = re.sub(r"/\.([^/]+)\.[0-9a-f]{16} \(deleted\)$", r"/\1 (deleted)", link)
        info = re.sub(rf"^({_VOLATILE_LINES}):.*\n", "", info, flags=re.MULTILINE)
        info = re.sub(r" pos:\S+ ino:\S+ sdev:\S+", "", info)
        # An epoll lists its targets in the order of kernel addresses.
        fds[int(name)] = (link, "".join(sorted(info.splitlines(keepends=True))))
    return fds


def _without_tmpfile(octal: re.Match[str]) -> str:
    return f"0{int(octal[0], 8) & ~os.O_TMPFILE:o}"


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line for each thing that differs."""
    found: list[str] = []
    for key in before:
        if isinstance(before[key], dict):
            for name in before[key].keys() | after[key].keys():
                left, right = before[key].get(name), after[key].get(name)
                if left != right:
                    found.append(f"{key} {name}: {left!r} -> {right!r}")
        elif isinstance(before[key], list):
            found += [f"{key}: lost {one}" for one in before[key] if one not in after[key]]
            found += [f"{key}: new {one}" for one in after[key] if one not in before[key]]
        elif before[key] != after[key]:
            found.append(f"{key}: {before[key]!r} -> {after[key]!r}")
    return found


def lasting_differences(before: dict[str, Any], pid: int) -> list[str]:
    """Return the differences of the living process that stay.

    A thread that was stopped in ppoll or sigsuspend has that call's mask only once it has run again
    and is back in there, and nobody says when. Its pidfd paces the looks, and tells its end.
    """
    pidfd = pidfd_open(Pid(pid))
    try:
        for _ in range(_LOOKS):
            found = differences(before, view(pid))
            if not found or select.select([pidfd], [], [], _LOOK_EVERY_S)[0]:
                return found
    finally:
        os.close(pidfd)
    return found
