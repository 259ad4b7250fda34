"""/proc/PID/stat: relations, start time and the addresses of the mm in one line.

Source: proc_pid_stat(5), fs/proc/array.c.
"""

import attrs

from ckpt.kernel.procfs.files import read_text
from ckpt.units import Pid, RemoteAddr, Tid


@attrs.frozen(slots=True, repr=False)
class Stat:
    """What /proc/PID/stat tells; see proc_pid_stat(5) for each.

    The addresses, `exit_code` and `wchan` read as 0 without ptrace access.
    """

    pid: Tid
    comm: str
    """The thread's name as the kernel prints it here: raw, or (older kernels) with newlines
    escaped. `Status.name` is exact."""
    state: str
    """One letter: R S D T t Z X I P."""
    ppid: Pid
    pgrp: int
    session: int
    tty_nr: int
    """Device number of the controlling terminal, 0 if none."""
    tpgid: int
    """Foreground group of that terminal, -1 if none."""
    flags: int
    """PF_* of the kernel (include/linux/sched.h): not a stable interface."""
    utime_ticks: int
    """In units of 1 / sysconf(_SC_CLK_TCK) seconds."""
    stime_ticks: int
    priority: int
    nice: int
    num_threads: int
    start_time_ticks: int
    """After boot; with the pid, the identity of a process."""
    vsize_bytes: int
    rss_pages: int
    start_code: RemoteAddr
    end_code: RemoteAddr
    start_stack: RemoteAddr
    exit_signal: int
    """What the parent gets at the end; -1 for a thread that leads no group."""
    processor: int
    rt_priority: int
    policy: int
    start_data: RemoteAddr
    end_data: RemoteAddr
    start_brk: RemoteAddr
    arg_start: RemoteAddr
    arg_end: RemoteAddr
    env_start: RemoteAddr
    env_end: RemoteAddr
    exit_code: int
    """As waitpid gives it; of a zombie, or of a task that was killed and is on its way."""


_FIELDS_MIN = 52


def parse_stat(text: str) -> Stat:
    """Parse /proc/PID/stat. The name may hold spaces, parentheses and newlines.

    Raises:
        ValueError: the line is not of the known form.
    """
    head, _, tail = text.rpartition(") ")
    pid, _, comm = head.partition(" (")
    # So that `at[n]` is field n of proc_pid_stat(5), which counts from 1: pid and comm are gone.
    at = ["", "", "", *tail.split()]
    if not pid.isdigit() or len(at) <= _FIELDS_MIN:
        raise ValueError(f"not a line of /proc/PID/stat: {text!r}")
    return Stat(
        pid=Tid(int(pid)),
        comm=comm,
        state=at[3],
        ppid=Pid(int(at[4])),
        pgrp=int(at[5]),
        session=int(at[6]),
        tty_nr=int(at[7]),
        tpgid=int(at[8]),
        flags=int(at[9]),
        utime_ticks=int(at[14]),
        stime_ticks=int(at[15]),
        priority=int(at[18]),
        nice=int(at[19]),
        num_threads=int(at[20]),
        start_time_ticks=int(at[22]),
        vsize_bytes=int(at[23]),
        rss_pages=int(at[24]),
        start_code=RemoteAddr(int(at[26])),
        end_code=RemoteAddr(int(at[27])),
        start_stack=RemoteAddr(int(at[28])),
        exit_signal=int(at[38]),
        processor=int(at[39]),
        rt_priority=int(at[40]),
        policy=int(at[41]),
        start_data=RemoteAddr(int(at[45])),
        end_data=RemoteAddr(int(at[46])),
        start_brk=RemoteAddr(int(at[47])),
        arg_start=RemoteAddr(int(at[48])),
        arg_end=RemoteAddr(int(at[49])),
        env_start=RemoteAddr(int(at[50])),
        env_end=RemoteAddr(int(at[51])),
        exit_code=int(at[52]),
    )


def read_stat(pid: Pid | Tid) -> Stat:
    """Read /proc/PID/stat: of a process its sums over all threads, by the leader's number.

    Raises:
        TargetGone: the task ended and was waited for.
    """
    return parse_stat(read_text(pid, "stat"))


def read_task_stat(pid: Pid, tid: Tid) -> Stat:
    """Read the stat of one thread of process `pid`: its own times, not the sums.

    Raises:
        TargetGone: `pid` has no such thread (any more).
    """
    return parse_stat(read_text(pid, f"task/{tid}/stat"))
