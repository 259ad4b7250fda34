"""What every refusal has in common, whatever was wrong.

with unchanged(image), untouched(work.pid):
    assert refused(20, "dump", "--pid", 7, image) == "process 7 does not exist (...)"
"""

import contextlib
import json
import os
import stat
from pathlib import Path

from integration.harness import ckpt
from integration.procview import lasting_differences, view


def refused(code, *args, **more):
    """Run a command that must fail with `code`, and return its message.

    Whoever reads stderr finds one sentence (and below it indented lines, where several things are
    listed); whoever reads `--json` finds the same in one object on stdout.
    """
    done = ckpt(*args, "--json", **more)
    assert done.returncode == code, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
    sentence, *lines = done.stderr.splitlines()
    assert sentence.startswith("ckpt: ")
    assert all(line.startswith("  ") for line in lines), done.stderr
    assert done.stdout.count("\n") == 1
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == code
    assert f"ckpt: {error['message']}\n" == done.stderr
    return error["message"]


def content(path):
    """Return everything below a path: names, kinds, modes, bytes."""
    return {str(entry): _describe(entry) for entry in (path, *sorted(path.rglob("*")))}


def _describe(entry):
    status = entry.lstat()
    if stat.S_ISLNK(status.st_mode):
        return status.st_mode, os.readlink(entry)
    return status.st_mode, entry.read_bytes() if stat.S_ISREG(status.st_mode) else None


@contextlib.contextmanager
def unchanged(*paths):
    """Hold that the block changes nothing at or below these paths, be it a file or a directory."""
    before = [content(path) if path.exists() else None for path in paths]
    yield
    assert [content(path) if path.exists() else None for path in paths] == before


@contextlib.contextmanager
def untouched(pid):
    """Hold that a process is the same after the block: memory map, descriptors, masks, threads."""
    before = view(pid)
    yield
    assert lasting_differences(before, pid) == []
    assert f"TracerPid:\t{0}\n" in Path(f"/proc/{pid}/status").read_text()


def children(pid):
    """Return the pids of a process's children."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread of ours may end meanwhile: its children are another one's then.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found |= {int(child) for child in (task / "children").read_text().split()}
    return found


@contextlib.contextmanager
def nobody_left(*pids):
    """Hold that after the block there is no process with one of these numbers, and none of ours.

    What a restore leaves behind is a child of its own: orphaned, it would be ours, since the tests
    adopt orphans.
    """
    before = children(os.getpid())
    yield
    assert children(os.getpid()) <= before
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
