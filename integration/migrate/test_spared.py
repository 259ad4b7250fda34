"""A tree that was doomed goes on after all, with all that was readied for its end taken back."""

import os
import signal
import subprocess
import sys

from ckpt.engine.records import TreeImage
from ckpt.engine.taken import Taken
from ckpt.kernel import ptrace
from ckpt.process.freezer import freeze_tree
from ckpt.resources.base import Tree
from ckpt.units import Pid
from integration.freezer.targets import await_state

PARENT = """
import os
child = os.fork()
if child == 0:
    while True:
        os.read(0, 1)
print(child, flush=True)
for _ in iter(lambda: os.read(0, 1), b""):
    print("goes on", flush=True)
"""


def test_one_that_is_killed_meanwhile_does_not_keep_the_others_from_it():
    work = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with work:
        child = int(work.stdout.readline())
        root = Pid(work.pid)
        with freeze_tree(root, ptrace.Option.NONE) as frozen:
            taken = Taken(frozen, Tree(tuple(frozen.processes)), TreeImage((), ()), {}, dict)
            taken.tree.at_kill.append(lambda: os.kill(child, signal.SIGKILL))
            taken.doom()
            await_state(child, "Z")
            spared = []
            taken.tree.at_spared.append(lambda: spared.append(True))
            taken.spare()
            assert spared
        # Nobody reads but the one that is left.
        work.stdin.write(b"x")
        work.stdin.flush()
        assert work.stdout.readline() == b"goes on\n"
        work.kill()
