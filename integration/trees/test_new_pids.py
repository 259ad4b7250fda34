"""Restores into a pid namespace of their own: numbers that are taken, copies side by side."""

import contextlib
import os
import select
import signal
import time

from ckpt.kernel.procfs.status import read_status
from ckpt.units import Pid
from integration.harness import Restored, become_subreaper, ckpt, dump
from integration.trees.new_pids import PROGRAM
from integration.trees.test_trees import Tree, python

become_subreaper()


def namespace_of(pid):
    return os.readlink(f"/proc/{pid}/ns/pid")


def members(namespace):
    """Return who lives in a pid namespace, by our numbers."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if namespace_of(name) == namespace:
                found.add(int(name))
    return found


def assert_all_end(pids):
    """Wait for the end of processes; those that are given to us are reaped."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            fd = os.pidfd_open(pid)
            try:
                assert select.select([fd], [], [], 30)[0], f"{pid} does not end"
            finally:
                os.close(fd)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def test_copies_of_a_tree_run_beside_it(tmp_path):
    image = tmp_path / "image"
    with Tree(python(PROGRAM), start_new_session=True) as work, contextlib.ExitStack() as stack:
        assert work.ask("check()") == "ok"
        dump(work.pid, image)
        restored = [stack.enter_context(Restored(image, "--new-pids")) for _ in range(3)]
        assert [one.ask("check()") for one in restored] == ["ok"] * 3
        assert work.ask("check()") == "ok"
        spaces = {namespace_of(one.pid) for one in restored}
        assert len(spaces | {namespace_of("self")}) == 4
        alive = set().union(*map(members, spaces))
        # The root, its child, the one that has ended, and an init of ours; each three times.
        assert len(alive) == 12
        for one in restored:
            one.tell("os._exit(5)")
            assert one.process.wait(60) == 5
        assert_all_end(alive)
        assert not set().union(*map(members, spaces))
        assert work.ask("check()") == "ok"


def wait_for_handler(pid, number):
    """Wait until a command has come to where it passes signals on."""
    give_up_s = time.monotonic() + 30
    while not read_status(Pid(pid)).caught >> (number - 1) & 1:
        assert time.monotonic() < give_up_s
        os.sched_yield()


def test_a_signal_to_the_command_ends_all(tmp_path):
    image = tmp_path / "image"
    with Tree(python(PROGRAM), start_new_session=True) as work:
        dump(work.pid, image)
        with Restored(image, "--new-pids") as copy:
            alive = members(namespace_of(copy.pid))
            wait_for_handler(copy.process.pid, signal.SIGTERM)
            copy.process.send_signal(signal.SIGTERM)
            assert copy.process.wait(60) == 128 + signal.SIGTERM
            assert_all_end(alive)


def test_without_it_the_taken_number_is_named_with_the_way_out(tmp_path):
    image = tmp_path / "image"
    with Tree(python(""), start_new_session=True) as work:
        dump(work.pid, image)
        done = ckpt("restore", image)
        assert done.returncode == 41
        assert "--new-pids" in done.stderr
