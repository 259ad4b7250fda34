"""The promise: what changes between the look and the freeze is in the image as it is then.

Each change is made by the process itself after it was looked at. What is then captured must be what
a capture that knows of no look finds.
"""

import contextlib
import subprocess
import sys
from contextlib import contextmanager

import pytest

from ckpt.engine.capture import Capturing, Looked, examine, finish_all, retarget, settle
from ckpt.engine.records import TreeImage
from ckpt.errors import UnsupportedState
from ckpt.kernel import ptrace
from ckpt.kernel.features import probe_features
from ckpt.process.arena import arena
from ckpt.process.freezer import freeze_tree
from ckpt.resources.base import CaptureOptions, Target, Tree
from ckpt.units import Pid

PROGRAM = """
import ctypes, fcntl, mmap, os, signal, sys, threading
libc = ctypes.CDLL(None)
memory = mmap.mmap(-1, 16 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = b"x" * len(memory)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
file = open(sys.argv[1], "r+b", buffering=0)
same = [open(sys.argv[1], "rb") for _ in range(5)]
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""

CHANGES = {
    "nothing": "pass",
    "a page locked": "libc.mlock(ctypes.c_void_p(address), 4096)",
    "half of a mapping protected": "libc.mprotect(ctypes.c_void_p(address), 8 << 12, 1)",
    "a mapping more": "more = mmap.mmap(-1, 64 << 12)[:0] or mmap.mmap(-1, 3 << 12, flags=0x22)",
    "a mapping less": "libc.munmap(ctypes.c_void_p(address + (8 << 12)), 8 << 12)",
    "a mapped file": "m = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)",
    "the break moved": "libc.sbrk(1 << 20)",
    "an offset": "file.seek(3)",
    "a file written": "file.write(b'longer than it was before')",
    "a lock": "fcntl.flock(file, fcntl.LOCK_EX)",
    "status flags": "fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)",
    "close on exec": "os.set_inheritable(file.fileno(), True)",
    "another file by the same number": "os.dup2(os.open('/etc/passwd', 0), file.fileno())",
    "closed": "same.pop()",
    "opened": "same.append(open('/etc/passwd'))",
    "shared": "os.dup2(same[0].fileno(), same[3].fileno())",
    "opened anew": "os.dup2(os.open(sys.argv[1], os.O_RDONLY), same[2].fileno())",
    "renamed": "os.rename(sys.argv[1], sys.argv[1] + '2')",
    "a pipe": "same.extend(os.pipe())",
    "a signal action": "signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
    "a signal pending": "signal.pthread_sigmask(0, {10}); os.kill(os.getpid(), 10)",
    "another directory": "os.chdir('/tmp')",
    "a file mode mask": "os.umask(0o27)",
    "nice": "os.nice(3)",
    "a processor": "os.sched_setaffinity(0, {0})",
    "a name": "libc.prctl(15, b'another', 0, 0, 0)",
    "a limit": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "not dumpable": "libc.prctl(4, 0, 0, 0, 0)",
    "shared memory": "m = mmap.mmap(-1, 4096)",
    "a memfd": "kept = os.memfd_create('x')",
    "deleted": "os.unlink(sys.argv[1])",
    "its directory deleted": "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')",
    "a thread": "threading.Thread(target=signal.pause, daemon=True).start()",
}

FEATURES = probe_features()


@contextmanager
def running(path):
    path.write_bytes(b"content")
    command = [sys.executable, "-c", PROGRAM, str(path)]
    child = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3, cwd=path.parent, text=True)
    try:
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def do(child, what):
    child.stdin.write(what + "\n")
    child.stdin.flush()
    assert child.stdout.readline() == "done\n"


def capture_twice(child, looked):
    """Return the image by the look, and one without, of the same stop."""
    pid = Pid(child.pid)
    unseen = Looked(Tree((pid,)), {pid: Target(pid, FEATURES)})
    with freeze_tree(pid, ptrace.Option.NONE) as tree, contextlib.ExitStack() as stack:
        stack.callback(looked.tree.forget)
        stack.callback(unseen.tree.forget)
        frozen = tree.processes[pid]
        capturing = [
            Capturing(frozen, retarget(tree, before, FEATURES)[pid]) for before in (looked, unseen)
        ]
        images = []
        for one in capturing:
            with arena(pid, frozen.tgid, frozen.leader) as lent:
                images += finish_all({pid: one}, [lent])
    return [settle(TreeImage((image,))).root for image in images]


def comparable(image):
    """Return the records as one map, without those that are of a moment."""
    process = {k: v for k, v in image.resources.items() if k not in ("clocks", "timers")}
    return process | {f"thread {i}": thread for i, thread in enumerate(image.threads)}


@pytest.mark.parametrize("change", CHANGES)
def test_the_image_is_of_the_frozen_process(change, tmp_path):
    with running(tmp_path / "file") as child:
        looked = examine(Pid(child.pid), FEATURES, CaptureOptions())
        do(child, CHANGES[change])
        by_look, without = map(comparable, capture_twice(child, looked))
        for name, record in without.items():
            assert by_look[name] == record, name


@pytest.mark.parametrize(
    "change",
    [
        "os.truncate(sys.argv[1], 0); os.posix_fallocate(file.fileno(), 0, 2 << 20);"
        " os.unlink(sys.argv[1])",
        "os.mkdir('d'); os.link(sys.argv[1], 'd/another'); os.unlink(sys.argv[1])",
    ],
)
def test_what_cannot_be_captured_is_refused_even_then(change, tmp_path):
    with running(tmp_path / "file") as child:
        looked = examine(Pid(child.pid), FEATURES, CaptureOptions())
        do(child, change)
        with pytest.raises(UnsupportedState):
            capture_twice(child, looked)
