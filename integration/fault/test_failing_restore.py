"""The promise: a restore that fails leaves nothing, at whatever step it fails.

The steps are the batches of remote calls, those that run on many at once, and the opening of each
resource's files. One after the other is made to fail, until none is left.
"""

import contextlib
import os
import signal

import pytest

from ckpt.engine import preparing, rebuilding
from ckpt.engine.restore import restore
from ckpt.errors import RestoreFailed
from ckpt.process.arena import Arena
from ckpt.resources.base import Resource, RestoreOptions
from integration.harness import become_subreaper, dump
from integration.workloads.driver import Program, descendants

become_subreaper()


class Faults:
    """Lets the nth step fail; 0: none."""

    def __init__(self, monkeypatch):
        self.n_steps = 0
        self.fail_at = 0
        self._wrap(monkeypatch, Arena, "run")
        self._wrap(monkeypatch, rebuilding, "run_on_all")
        monkeypatch.setattr(preparing, "PROCESS", tuple(map(self._with_faults, preparing.PROCESS)))

    def _step(self):
        self.n_steps += 1
        if self.n_steps == self.fail_at:
            raise RestoreFailed("a step", f"fault {self.fail_at}")

    def _wrap(self, monkeypatch, owner, name):
        inner = getattr(owner, name)

        def outer(*args, **more):
            self._step()
            return inner(*args, **more)

        monkeypatch.setattr(owner, name, outer)

    def _with_faults(self, resource):
        def prepare(*args):
            self._step()
            return resource.prepare(*args)

        fields = {name: getattr(resource, name) for name in Resource.__slots__ if name[0] != "_"}
        return Resource(**fields | {"prepare": prepare})


def reap():
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def outside(folder, pid):
    """Return what a restore of a process could leave behind, but for processes."""
    return (
        sorted(path.name for path in folder.iterdir()),
        sorted(name for name in os.listdir("/dev/shm") if f"-{pid}-" in name),
        len(os.listdir("/proc/self/fd")),
    )


COMMANDS = [
    *["s_unix_tree", "s_unix_named", "s_shared_tree", "s_files"],
    *["s_clones sibling files all", "s_leader", "s_leader kid"],
]
NAMES = ["left by the killed tree", "removed"]
HERE, NEW_PIDS = RestoreOptions(), RestoreOptions(new_pids=True)
CASES = [(command, names, HERE) for names in NAMES for command in COMMANDS]
# An init that is left would be our child, and be waited for in vain.
CASES += [(command, "left", NEW_PIDS) for command in ("s_unix_tree", "s_leader kid")]


@pytest.mark.parametrize(("command", "names", "options"), CASES)
def test_nothing_is_left_behind(command, names, options, tmp_path, monkeypatch, promise):
    kept = promise("a restore of which a step fails leaves nothing")
    image = tmp_path / "image"
    work = tmp_path / "work"
    work.mkdir()
    with Program(*command.split(), cwd=work) as program:
        family = {program.pid, *descendants(program.pid)}
        dump(program.pid, image, "--kill")
    reap()
    if names == "removed":
        for path in list(work.iterdir()):
            if path.is_socket():
                path.unlink()
    faults = Faults(monkeypatch)
    before = outside(work, program.pid)
    n_faults = 0
    while True:
        faults.fail_at, faults.n_steps = faults.fail_at + 1 + n_faults // 8, 0
        back = None
        with contextlib.suppress(RestoreFailed):
            back = restore(image, None, options)
        if back is not None:
            break
        n_faults += 1
        kept.try_once()
        reap()
        assert not [pid for pid in family if os.path.exists(f"/proc/{pid}")], faults.fail_at
        assert outside(work, program.pid) == before, faults.fail_at
    assert n_faults > 15
    for pid in (back.pid, *descendants(back.pid)):
        # Its commands have ended: it quits by itself, and waits for its children.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    reap()
