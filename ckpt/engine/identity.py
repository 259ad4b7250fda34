"""Which program a process runs: pids and start times survive an exec, this does not."""

from ckpt.kernel.procfs import files, task
from ckpt.process import memory
from ckpt.units import Pid, RemoteAddr

_AT_RANDOM = 25
_N_RANDOM_BYTES = 16


def read_exec_id(pid: Pid) -> str:
    """Return what distinguishes one exec of a process from the next, as hexadecimal text.

    The 16 random bytes that the kernel gives each program (AT_RANDOM, getauxval(3)), and where.
    """
    at_random = dict(task.parse_auxv(files.read_bytes(pid, "auxv"))).get(_AT_RANDOM, 0)
    if not at_random:
        return ""
    return f"{at_random:x}-" + memory.read(pid, RemoteAddr(at_random), _N_RANDOM_BYTES).hex()
