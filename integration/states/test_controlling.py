"""A process that leads the session of a terminal from outside, restored in another terminal."""

import contextlib
import os
import pty
import signal
import subprocess
import termios

from ckpt.kernel import tty
from ckpt.kernel.procfs.stat import read_stat
from integration.harness import CKPT, become_subreaper, dump
from integration.workloads.build import build
from integration.workloads.driver import ANSWER_S, Dialogue

become_subreaper()

TAKE_TERMINAL = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
RUN = f"{TAKE_TERMINAL} os.execv(sys.argv[1], sys.argv[1:])"


@contextlib.contextmanager
def in_a_terminal(*command, size, cwd=None, quiet=False):
    """Run a command as the leader of the session of a new terminal; yield it and a dialogue."""
    ours, theirs = pty.openpty()
    tty.set_size(ours, size)
    if quiet:
        settings = termios.tcgetattr(theirs)
        settings[1] &= ~termios.OPOST
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, settings)
    process = subprocess.Popen(
        [CKPT[0], "-c", RUN, *map(str, command)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
    )
    os.close(theirs)
    try:
        yield process, Dialogue(ours, ours)
    finally:
        process.kill()
        process.wait(ANSWER_S)
        os.close(ours)


def read_past(said, note):
    """Read what `ckpt` says of a process that runs by then, up to a certain note."""
    while note not in said.line():
        pass


def write_image(image, tmp_path, size):
    """Dump a quiet program in a terminal of that size; return its pid and the settings."""
    command = [build("tracker_cases"), "t_write"]
    with in_a_terminal(*command, size=size, cwd=tmp_path, quiet=True) as (work, said):
        assert said.line() == "ready"
        settings = tty.get_settings(said._commands_fd)
        dump(work.pid, image, "--kill")
    return work.pid, settings


def test_it_gets_the_terminal_of_a_command_that_leads_its_session(tmp_path):
    image = tmp_path / "image"
    pid, settings = write_image(image, tmp_path, (30, 100, 0, 0))
    with in_a_terminal(*CKPT, "restore", image, size=(24, 80, 0, 0)) as (command, said):
        read_past(said, "is standard error of this command now")
        assert said.ask("check") == "ok"
        stat = read_stat(pid)
        assert (stat.session, stat.pgrp, stat.tpgid) == (pid, pid, pid)
        assert os.minor(stat.tty_nr) == tty.get_number(said._commands_fd)
        assert tty.get_settings(said._commands_fd) == settings
        assert tty.get_size(said._commands_fd) == (24, 80, 0, 0)
        os.write(said._commands_fd, b"\x03")
        assert command.wait(ANSWER_S) == 128 + signal.SIGINT


def test_it_has_none_where_the_command_does_not_lead(tmp_path):
    image = tmp_path / "image"
    pid, _ = write_image(image, tmp_path, (24, 80, 0, 0))
    calling = f"import subprocess; subprocess.call({[*CKPT, 'restore', str(image)]!r})"
    with in_a_terminal(CKPT[0], "-c", calling, size=(24, 80, 0, 0)) as (command, said):
        read_past(said, "had a terminal outside the tree, and has none now")
        assert said.ask("check") == "ok"
        assert read_stat(pid).tty_nr == 0
        said.tell("quit")
        assert command.wait(ANSWER_S) == 0
