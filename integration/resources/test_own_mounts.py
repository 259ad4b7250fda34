"""A tree in a mount namespace of its own: dumped from inside it, brought back into one like it."""

import os
import signal

import pytest

from ckpt.kernel import mounts as kernel
from ckpt.kernel.mounts import MountFlag
from ckpt.kernel.procfs.mountinfo import parse_mountinfo, read_mountinfo
from ckpt.resources.mount_plan import plan_mounts
from ckpt.resources.mounts import MountsRecord, mounted
from integration.apps.app import App
from integration.errors.refusals import refused, untouched
from integration.harness import Restored, become_subreaper, ckpt, dump
from integration.workloads.driver import ANSWER_S

SCRIPT = """
set -e
mkdir private shared empty over
echo mine >private/data
echo hidden >over/data
{mounts}
cd shared
exec 7>>log
echo ready
while read -r line; do
    echo "$line" >&7
    echo "$(<data) $(<"$OLDPWD/shared/data") $(stat -f -c %T ../empty)"
done
"""
"""The log is private/log to all others."""
BIND = "mount --bind private shared"
TMPFS = "mount -t tmpfs -o size=1m,mode=700,noexec none empty"
become_subreaper()


def started(folder, *mounts):
    script = SCRIPT.format(mounts="\n".join(mounts))
    return App(["unshare", "--mount", "bash", "-c", script], folder)


def mounts_of(pid):
    """Return what is mounted where, but for numbers of devices that are given anew."""
    with open(f"/proc/{pid}/mountinfo") as file:
        return sorted(
            (one.path, one.root, one.fs_type, one.options) for one in parse_mountinfo(file.read())
        )


@pytest.mark.parametrize("place", ["beside", "hidden"])
def test_it_comes_back_with_its_mounts(place, tmp_path):
    # A mount of the tree may hide the image from it.
    image = tmp_path / "image" if place == "beside" else tmp_path / "over" / "image"
    before = mounts_of("self")
    mounts = (BIND, TMPFS, "mount -t proc proc /proc", "mount --bind private over")
    with started(tmp_path, *mounts, "mount -o remount,bind,ro over") as shell:
        assert shell.line() == "ready"
        assert shell.ask("one") == "mine mine tmpfs"
        theirs = mounts_of(shell.pid)
        assert theirs != before
        assert ckpt("check", "--pid", shell.pid).returncode == 0
        assert dump(shell.pid, image)["kind"] == "full"
        assert shell.ask("two") == "mine mine tmpfs"
        assert dump(shell.pid, image, "--kill")["kind"] == "delta"
        shell.process.wait(ANSWER_S)
    for generation, word in ((0, "three"), (1, "four")):
        with Restored(image, "--at", str(generation)) as back:
            assert back.ask(word) == "mine mine tmpfs"
            assert mounts_of(back.pid) == theirs
            assert os.readlink(f"/proc/{back.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
            assert dump(back.pid, image)["kind"] == "delta"
    assert (tmp_path / "private" / "log").read_text() == "one\ntwo\nthree\nfour\n"
    assert list((tmp_path / "shared").iterdir()) == []
    assert mounts_of("self") == before


def test_it_comes_back_lazily_and_what_the_user_names_is_of_the_host(tmp_path):
    image, target = tmp_path / "over" / "image", tmp_path / "over" / "out"
    with started(tmp_path, BIND, "mount --bind private over") as shell:
        assert shell.line() == "ready"
        dump(shell.pid, image, "--kill")
        shell.process.wait(ANSWER_S)
    target.write_text("so far ")
    with Restored(image, "--lazy", "--inherit", f"7={target}") as back:
        assert back.ask("word").startswith("mine mine ")
    assert target.read_text() == "so far word\n"


def test_what_is_missing_in_it_is_taken_away(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    before = mounts_of("self")
    with kernel.copied(follows=False):
        kernel.mount("none", str(folder), "tmpfs", MountFlag.NOEXEC)
        (folder / "sub").mkdir()
        kernel.mount("none", str(folder / "sub"), "tmpfs", MountFlag.NONE)
        ours = read_mountinfo(os.getpid())
        kept = [one for one in ours if not one.path.startswith(str(folder))]
        plan = plan_mounts(ours, kept)
        assert [step.kind for step in plan.steps] == ["absent", "absent"]
        with mounted(MountsRecord(True, False, plan.steps)):
            assert mounts_of("self") == before
        assert os.path.ismount(folder)
    assert mounts_of("self") == before


def test_what_is_to_be_bound_and_missing_is_named(tmp_path):
    image = tmp_path / "image"
    with started(tmp_path, BIND) as shell:
        assert shell.line() == "ready"
        dump(shell.pid, image, "--kill")
        shell.process.wait(ANSWER_S)
    (tmp_path / "private").rename(tmp_path / "moved")
    message = refused(43, "restore", image)
    assert f"mount {tmp_path}/shared: showed {tmp_path}/private, which is not there" in message


@pytest.mark.parametrize(
    ("mounts", "subject", "problem"),
    [
        (("mount -t tmpfs none empty", "touch empty/file"), "empty", "a tmpfs with 1 files in it"),
        (("mount -t ramfs none empty",), "empty", "is a mount (ramfs, /) that is nowhere where"),
        (("mkdir /run/ckpt -p", "mount -t tmpfs none /run"), "/run", "/run/ckpt is below it"),
        (("mount -t tmpfs none empty", "mount --bind empty over"), "over", "(tmpfs, /)"),
    ],
    ids=["files", "kind", "state", "twice"],
)
def test_other_mounts_are_named(mounts, subject, problem, tmp_path):
    with started(tmp_path, BIND, *mounts) as shell:
        assert shell.line() == "ready"
        with untouched(shell.pid):
            message = refused(21, "dump", "--pid", shell.pid, tmp_path / "image")
    assert f"mount {tmp_path / subject}: " in message
    assert problem in message


def test_a_tree_with_another_root_is_refused(tmp_path):
    pid = os.fork()
    if pid == 0:
        os.execvp("unshare", ["unshare", "-m", "bash", "-c", _ANOTHER_ROOT.format(tmp_path)])
    try:
        assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
        message = refused(21, "dump", "--pid", pid, tmp_path / "image")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert "is in another mount namespace than ckpt" in message


_ANOTHER_ROOT = """
set -e
cd {0}
mkdir new
mount -t tmpfs none new
mkdir new/proc new/usr new/old
mount --bind /usr new/usr
mount --rbind /proc new/proc
cd new
pivot_root . old
kill -STOP $$
"""
