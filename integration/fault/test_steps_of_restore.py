"""The promise: whichever step of a restore is the last one, a whole tree is left, or nothing.

At each point of a restore that `fault` names, ckpt is killed, or the step fails as where the kernel
refuses it. Afterwards there must be no process, mount, file or descriptor that was not there
before, and a restore must work; where the tree was let go, it is whole.
"""

import itertools
import os
import signal
from pathlib import Path

import pytest

from ckpt import fault
from ckpt.engine.restore import restore
from ckpt.errors import NotPermitted
from ckpt.resources.base import RestoreOptions
from integration.errors.refusals import children
from integration.fault.test_failing_restore import outside, reap
from integration.harness import Restored, become_subreaper, dump
from integration.process.test_killed_restore import end_all, name_of, restorer
from integration.workloads.driver import Program, descendants, end_orphans

become_subreaper()

EVERY = bool(os.environ.get("CKPT_KILLS"))
RUNS = ["restore-released", "restore-let-go"]
"""From here on our end lets the tree run."""
HERE, NEW_PIDS = RestoreOptions(), RestoreOptions(new_pids=True)
CASES = [("s_threads", HERE)]
if EVERY:
    CASES += [(name, HERE) for name in ("s_files", "s_memory", "s_sysv", "s_shared_tree")]
    CASES += [("s_registers", NEW_PIDS)]


REFUSED = 77
"""Exit code of a restore that failed as planned."""


def host(folder, pid):
    """Return what a restore could leave behind, but for processes."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    # Whoever else works here mounts elsewhere.
    ours = [line for line in mounts if str(folder.parent) in line or "ckpt" in line]
    return outside(folder, pid), ours


def end_at(one, point, action):
    """Look at what a restore has left that ended there; end that."""
    what = f"{point}={action}"
    stay = one.left()
    # Else it ended before that step, of something that one before it had left behind.
    assert one.exit_code == (-signal.SIGKILL if action == "kill" else REFUSED), what
    if action == "kill" and point in RUNS:
        assert one.dialogue.line() == "ok", what
    else:
        assert [name_of(pid) for pid in stay] == [], what
    others = {pid for one_of_us in stay for pid in descendants(one_of_us)}
    # The first of a pid namespace last.
    end_all(reversed(stay))
    end_orphans(others)
    assert children(os.getpid()) <= one.others, what


def restore_until(image, options, planned):
    fault.plan(planned)
    try:
        restore(image, None, options)
    except NotPermitted:
        os._exit(REFUSED)
    os._exit(0)


@pytest.mark.parametrize(("program", "options"), CASES)
def test_a_restore_ends_behind_any_step(program, options, tmp_path, promise):
    kept = promise("a restore that ends behind a step leaves nothing")
    image, work = tmp_path / "image", tmp_path / "work"
    work.mkdir()
    with Program(program, cwd=work) as target:
        dump(target.pid, image, "--kill")
    reap()
    before = host(work, target.pid)
    # That an epoch cannot be written is no reason not to let it go.
    steps = [("epoch-noted", "kill"), *itertools.product(fault.RESTORE, ("fail", "kill"))]
    for point, action in steps:
        planned = f"{point}={action}"
        kept.try_once()
        with restorer(lambda: restore_until(image, options, planned)) as one:  # noqa: B023
            end_at(one, point, action)
        assert host(work, target.pid) == before, planned
    with Restored(image) as back:
        assert back.ask("check") == "ok"
