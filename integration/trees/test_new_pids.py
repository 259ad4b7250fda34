"""Restores into a pid namespace of their own: numbers that are taken, copies side by side."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

import pytest

from ckpt.kernel.procfs.status import read_status
from ckpt.units import Pid
from integration.errors.refusals import refused, untouched
from integration.harness import Restored, become_subreaper, ckpt, dump
from integration.trees.new_pids import PROGRAM
from integration.trees.test_trees import Tree, python
from integration.workloads.driver import Program

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


def test_a_tree_in_a_namespace_of_its_own_is_dumped_again(tmp_path):
    image = tmp_path / "image"
    with Tree(python(PROGRAM), start_new_session=True) as work:
        dump(work.pid, image)
        with Restored(image, "--new-pids") as first:
            assert first.ask("check()") == "ok"
            kinds = [dump(first.pid, image)["kind"] for _ in range(2)]
            assert kinds == ["delta", "delta"]
            assert first.ask("check()") == "ok", "the dumps have changed the living"
            alive = members(namespace_of(first.pid))
        assert_all_end(alive)
        # The numbers are taken here, and it is an image of a namespace: no option is needed.
        with Restored(image) as second:
            assert namespace_of(second.pid) != namespace_of("self")
            assert second.ask("check()") == "ok"
            assert dump(second.pid, image)["kind"] == "delta"
            alive = members(namespace_of(second.pid))
        assert_all_end(alive)
        assert work.ask("check()") == "ok"
    reap_orphans()
    with Restored(image, "--at", "0") as last:
        assert last.pid == work.pid
        assert last.ask("check()") == "ok"


def reap_orphans():
    """Free the numbers of those that the original has left to us."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def only_child(pid):
    (child,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return child


def test_who_was_the_first_of_a_namespace_is_that_again(tmp_path):
    image = tmp_path / "image"
    command = ["unshare", "--pid", "--fork", "--kill-child", *python(PROGRAM)]
    with Tree(command, start_new_session=True) as work:
        pid = only_child(work.pid)
        assert work.ask("me, check()") == "(1, 'ok')"
        kinds = [dump(pid, image)["kind"] for _ in range(2)]
        assert kinds == ["full", "delta"]
        assert work.ask("check()") == "ok"
        with Restored(image) as one, Restored(image) as other:
            for copy in (one, other):
                # That 1 made the pair of sockets cannot be said: nobody was there when it was made.
                assert copy.ask("os.getpid(), check('peer')") == "(1, 'ok')"
                assert dump(copy.pid, tmp_path / f"image-{copy.pid}")["kind"] == "full"
                assert dump(copy.pid, tmp_path / f"image-{copy.pid}")["kind"] == "delta"
            spaces = {namespace_of(copy.pid) for copy in (one, other)}
            assert len(spaces) == 2
            alive = set().union(*map(members, spaces))
        assert_all_end(alive)


def test_who_makes_children_elsewhere_is_refused(tmp_path):
    command = ["unshare", "--pid", "--fork", "--kill-child", *python("")]
    with Tree(command, start_new_session=True) as work:
        said = refused(21, "dump", "--pid", str(work.pid), tmp_path / "image")
        assert "makes its children in another pid namespace than its own" in said
        assert "is in another pid namespace than the root of its tree" in said
        assert work.ask("1 + 1") == "2"


def test_a_proc_of_its_own_is_refused(tmp_path):
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *python("")]
    with Tree(command, start_new_session=True) as work:
        pid = only_child(work.pid)
        with untouched(pid):
            said = refused(21, "dump", "--pid", str(pid), tmp_path / "image")
        assert "is in another mount namespace than ckpt" in said
        assert work.ask("1 + 1") == "2"


def test_a_namespace_below_another_one_is_refused(tmp_path):
    below = ["unshare", "--pid", "--fork", "--kill-child"]
    with Tree([*below, *below, *python("")], start_new_session=True) as work:
        pid = only_child(only_child(work.pid))
        with untouched(pid):
            said = refused(21, "dump", "--pid", str(pid), tmp_path / "image")
        assert "is in a pid namespace 2 levels below that of ckpt" in said
        assert work.ask("1 + 1") == "2"


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


# Those that look at their own numbers in /proc are left out: it shows those of the host.
STATES = ["s_signals", "s_clones", "s_unix_tree", "s_locks"]


@pytest.mark.parametrize("name", STATES)
def test_states_come_back_twice(name, tmp_path):
    image = tmp_path / "image"
    with Program(name, cwd=tmp_path) as work:
        dump(work.pid, image, "--kill")
    with Restored(image, "--new-pids") as first:
        assert first.ask("check") == "ok"
        assert dump(first.pid, image)["kind"] == "delta"
        alive = members(namespace_of(first.pid))
    assert_all_end(alive)
    with Restored(image) as second:
        assert second.ask("check") == "ok"
