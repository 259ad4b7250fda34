"""Who has a number that a restore wants: words for `PidTaken`.

A number is taken as long as anything is called by it: a process, a thread, a zombie, and also a
process group or a session whose leader has long ended.
"""

import os
import re

from ckpt.errors import NotPermitted, PidTaken, TargetGone
from ckpt.kernel.procfs import files, stat, status
from ckpt.process import keeper
from ckpt.units import Pid, Tid


def taken(number: Pid | Tid) -> PidTaken:
    """Return the error that says who has `number`, and what to do."""
    try:
        return PidTaken(number, *_describe_task(number))
    except (TargetGone, NotPermitted):
        return PidTaken(number, *_describe_members(number))


def _describe_task(number: Pid | Tid) -> tuple[str, str]:
    """Return who that process or thread is, and the remedy."""
    found = status.read_status(Pid(number))
    if found.tgid == os.getpid():
        return "this ckpt itself", "run it again, and it gets another number"
    if found.name == keeper.NAME:
        return _describe_keeper(found.tgid)
    if found.tgid != number:
        return f"{found.name}, a thread of process {found.tgid}", "end that process"
    if found.state in "XZ":
        remedy = f"wait until its parent, process {found.ppid}, reaps it, or end that one"
        return f"{found.name}, which has ended", remedy
    return found.name, "end it, or wait until it is reaped"


def _describe_keeper(pid: Pid) -> tuple[str, str]:
    """Say of whom it is the keeper: the kernel shows the process behind a pidfd (pidfd_open(2))."""
    info = files.read_text(pid, f"fdinfo/{keeper.PIDFD}")
    target = re.search(r"^Pid:\t(\d+)$", info, re.MULTILINE)
    whose = f"process {target[1]}" if target else "a process"
    remedy = f"end it, and the next incremental dump of {whose} is full"
    return f"the {keeper.NAME} of {whose}", remedy


def _describe_members(number: Pid | Tid) -> tuple[str, str]:
    """Return which process group or session has a number that no task has."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            found = stat.read_stat(Pid(int(name)))
        except (TargetGone, NotPermitted):
            continue
        if number in (found.pgrp, found.session):
            what = "process group" if found.pgrp == number else "session"
            return f"the {what} of {found.comm} ({found.pid})", "end all processes in it"
    return "something that has just ended", "try again"
