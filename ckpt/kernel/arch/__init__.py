"""What depends on the processor: `NR`, the system call numbers of the running machine.

Registers and the layout of XSTATE are in the module of each processor (`x86_64`). On a machine
that has no table here nothing of `ckpt.kernel` can work, and the import says so; the image
layer does not import this package and runs there all the same.
"""

import os

_machine = os.uname().machine

if _machine == "x86_64":
    from ckpt.kernel.arch.x86_64_syscalls import NR
else:
    raise ImportError(f"ckpt has no system call table for {_machine!r}; it runs on x86_64")

__all__ = ["NR"]
