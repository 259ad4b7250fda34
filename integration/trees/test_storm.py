"""The promise: a tree in which processes are made and end all the time can be dumped, unharmed."""

import os
import signal
import subprocess

from integration.harness import become_subreaper, dump
from integration.workloads.driver import descendants, end_orphans

N_DUMPS = 8
# Two shells that fork without end; the third counts what it has made, for us to see it go on.
PROGRAM = """
storm() { while :; do (exit 1); /bin/true; done; }
storm & storm &
while read -r _; do (exit 3); echo $?; done
"""


def test_a_storm_of_forks(tmp_path):
    become_subreaper()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(["bash", "-c", PROGRAM], **pipes) as shell:
        try:
            for _ in range(N_DUMPS):
                dump(shell.pid, tmp_path / "image")
                shell.stdin.write("go\n")
                shell.stdin.flush()
                assert shell.stdout.readline() == "3\n"
        finally:
            family = descendants(shell.pid)
            os.kill(shell.pid, signal.SIGKILL)
            end_orphans(family)
