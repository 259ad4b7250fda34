"""Control groups: gone back to where they are, named where they are not."""

import contextlib
import os
import threading
from pathlib import Path

import pytest

from ckpt.kernel.procfs.cgroups import Membership, directory_of, parse_hierarchies
from ckpt.resources.cgroups import CGROUPS, GroupRecord
from integration.apps.app import App, reap_killed
from integration.errors.refusals import refused
from integration.freezer.targets import child
from integration.harness import Restored, become_subreaper, dump
from integration.resources.embryos import look
from integration.workloads.driver import Program, descendants

become_subreaper()
_HIERARCHIES = parse_hierarchies(Path("/proc/self/mountinfo").read_text(encoding="ascii"))


@contextlib.contextmanager
def groups(name):
    """Make a group in the unified hierarchy and, where there is one, in one of version 1."""
    made = []
    for hierarchy in ("", "pids"):
        top = directory_of(Membership(hierarchy, "/", deleted=False), _HIERARCHIES)
        if top is not None:
            made.append(Path(top) / f"{name}-{os.getpid()}")
            made[-1].mkdir()
    assert made, "no hierarchy is mounted"
    try:
        yield made
    finally:
        for directory in made:
            with contextlib.suppress(FileNotFoundError):
                directory.rmdir()


def join(pid, made):
    for directory in made:
        (directory / "cgroup.procs").write_text(str(pid), encoding="ascii")


def groups_of(pid):
    return Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii")


def test_it_goes_back_into_its_groups(tmp_path):
    image = tmp_path / "image"
    with groups("ckpt-back") as made:
        with Program("s_threads", cwd=tmp_path) as work:
            join(work.pid, made)
            dump(work.pid, image)
            before = groups_of(work.pid)
            assert before != groups_of("self")
            assert dump(work.pid, image)["kind"] == "delta"
        with Restored(image) as work:
            assert groups_of(work.pid) == before
            for task in Path(f"/proc/{work.pid}/task").iterdir():
                assert (task / "cgroup").read_text(encoding="ascii") == before
            assert work.ask("check") == "ok"


@contextlib.contextmanager
def in_a_namespace(made, below, cwd):
    """Lend a shell in a namespace whose tops are `made`, itself in the groups `below`."""
    enter = "; ".join(f"echo $$ >{group}/cgroup.procs" for group in made)
    inner = "; ".join([":"] + [f"echo $$ >{group}/cgroup.procs" for group in below])
    last = "while read -r group; do last=$group; done </proc/self/cgroup"
    told = f"while read -r line; do {last}; echo $last; done"
    child = f"{inner}; echo ready; ({told}); exit"
    with App(["bash", "-c", f"{enter}; exec unshare --cgroup bash -c '{child}'"], cwd) as shell:
        assert shell.line() == "ready"
        yield shell


def test_a_namespace_of_its_own_is_made_anew(tmp_path):
    image = tmp_path / "image"
    with groups("ckpt-space") as made:
        below = [directory / "below" for directory in made]
        for directory in below:
            directory.mkdir()
        try:
            with in_a_namespace(made, below, tmp_path) as work:
                before = groups_of(work.pid)
                seen = work.ask("told")
                family = descendants(work.pid)
                dump(work.pid, image)
                assert dump(work.pid, image, "--kill")["kind"] == "delta"
                work.process.wait()
                reap_killed(family)
            with Restored(image) as work:
                assert [groups_of(pid) for pid in (work.pid, *family)] == [before] * 2
                spaces = {os.readlink(f"/proc/{pid}/ns/cgroup") for pid in (work.pid, *family)}
                assert len(spaces) == 1
                assert os.readlink("/proc/self/ns/cgroup") not in spaces
                assert work.ask("told") == seen
                assert "below" in seen
                assert "ckpt-space" not in seen
        finally:
            for directory in below:
                directory.rmdir()


def test_a_process_out_of_its_namespace_is_named(tmp_path):
    with groups("ckpt-space") as made, in_a_namespace(made, [], tmp_path) as work:
        join(work.pid, [directory.parent for directory in made])
        message = refused(21, "dump", "--pid", work.pid, tmp_path / "image")
    assert "which its own namespace does not show" in message


def test_a_group_that_is_gone_is_named(tmp_path):
    image = tmp_path / "image"
    with groups("ckpt-gone") as made:
        with Program("heartbeat", "--mib", "1", cwd=tmp_path) as work:
            join(work.pid, made)
            dump(work.pid, image)
        for directory in made:
            directory.rmdir()
        message = refused(42, "restore", image)
        assert message.count("is not there") == len(made)
        assert "--no-cgroups" in message
        with Restored(image, "--no-cgroups") as work:
            assert work.ask("check") == "ok"
            assert groups_of(work.pid) == groups_of("self")


def test_a_frozen_group_is_named(tmp_path):
    image = tmp_path / "image"
    with groups("ckpt-frozen") as made:
        with Program("heartbeat", "--mib", "1", cwd=tmp_path) as work:
            join(work.pid, made)
            dump(work.pid, image)
        (made[0] / "cgroup.freeze").write_text("1", encoding="ascii")
        assert "is frozen" in refused(42, "restore", image)


def test_a_thread_in_another_group_is_named():
    with groups("ckpt-thread") as made:
        if len(made) < 2:
            pytest.skip("no hierarchy of version 1")
        in_group = made[1] / "tasks"

        def move_a_thread():
            moved = threading.Event()

            def live_elsewhere():
                in_group.write_text(str(threading.get_native_id()), encoding="ascii")
                moved.set()
                threading.Event().wait()

            threading.Thread(target=live_elsewhere, daemon=True).start()
            moved.wait()

        with child(move_a_thread) as pid:
            (finding,) = look(CGROUPS, pid)
        assert "another control group" in finding


@pytest.mark.parametrize("path", ["a", "/../a", "/a/../b", "/a\0"])
def test_a_path_that_leads_elsewhere(path):
    with pytest.raises(ValueError, match="no path of a control group"):
        GroupRecord("", path)
