"""A program that keeps a little of one kind for each line on its standard input.

python leaking.py nothing|descriptor|mapping|thread|zombie|memory
"""

import mmap
import os
import subprocess
import sys
import threading

KEPT = []
MEMORY_BYTES = 80_000
_NEVER = threading.Event()


def _thread():
    thread = threading.Thread(target=_NEVER.wait, daemon=True)
    thread.start()
    return thread


LEAKS = {
    "nothing": lambda: None,
    "descriptor": lambda: os.open("/dev/null", os.O_RDONLY),
    # With a hole between: neighbours would become one.
    "mapping": lambda: (mmap.mmap(-1, 4096, prot=mmap.PROT_READ), mmap.mmap(-1, 4096)),
    "thread": _thread,
    "zombie": lambda: subprocess.Popen(["true"]),
    "memory": lambda: os.urandom(MEMORY_BYTES),
}


def main():
    leak = LEAKS[sys.argv[1]]
    for line in sys.stdin:
        KEPT.append(leak())
        print(line, end="", flush=True)


if __name__ == "__main__":
    main()
