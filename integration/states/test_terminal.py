"""A process that leads its process group, restored from an interactive shell's terminal."""

import os
import pty
import subprocess

from integration.harness import CKPT, become_subreaper, dump
from integration.workloads.build import build
from integration.workloads.driver import Dialogue

become_subreaper()

TAKE_TERMINAL = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"


def answer_to(terminal: Dialogue, command: str, answers: set[str]) -> str:
    """Return the answer to a command, past its echo and what was said before."""
    terminal.tell(command)
    while (line := terminal.line().strip()) not in answers:
        assert "refused" not in line
        assert "Error" not in line
    return line


def test_it_reads_the_terminal_as_its_foreground(tmp_path):
    image = tmp_path / "image"
    work = subprocess.Popen(
        [build("tracker_cases"), "t_write"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
        cwd=tmp_path,
    )
    with work:
        assert work.stdout is not None
        assert work.stdout.readline() == b"ready\n"
        dump(work.pid, image, "--kill")
    ours, theirs = pty.openpty()
    command = f"{TAKE_TERMINAL} os.execv(sys.argv[1], sys.argv[1:])"
    shell = subprocess.Popen(
        [CKPT[0], "-c", command, *CKPT, "restore", str(image)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    terminal = Dialogue(ours, ours)
    assert answer_to(terminal, "check", {"ok"}) == "ok"
    assert answer_to(terminal, "step one", {"stepped"}) == "stepped"
    terminal.tell("quit")
    assert shell.wait(60) == 0
    os.close(ours)
