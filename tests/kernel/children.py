"""Python programs that run beside a test, each step of theirs asked for and answered."""

import contextlib
import os
import subprocess
import sys
import textwrap

PRELUDE = """
import ctypes, mmap, os, sys, threading

PAGE = mmap.PAGESIZE

def private_memory(n_pages):
    memory = mmap.mmap(-1, n_pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Larger than any page size in use: a huge page must not populate the neighbours.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory

def address_of(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))

def say(*words):
    print(*words, flush=True)

def wait():
    return sys.stdin.readline().strip()
"""


class Child:
    """A running program; `say` and `wait` there meet `heard` and `tell` here."""

    def __init__(self, process):
        self.process = process
        self.pid = process.pid

    def heard(self):
        """Wait for the next line and return its words; numbers as such."""
        line = self.process.stdout.readline()
        assert line, "the program ended early"
        return [int(word) if word.lstrip("-").isdigit() else word for word in line.split()]

    def tell(self, text="go"):
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def kill(self):
        """End it and wait until it is gone."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(code, **popen):
    """Run `code` (after PRELUDE) until the end of the `with`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **popen,
    )
    with process:
        try:
            yield Child(process)
        finally:
            process.kill()


@contextlib.contextmanager
def ended():
    """Lend the pid of a zombie: it has ended, and stays until the end of the `with`."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    with process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        yield process.pid
