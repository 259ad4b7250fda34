"""Programs of a terminal, driven through tmux as a user would type, brought back in another window.

The terminal is from outside: its master belongs to tmux. What is dumped is what runs in one window,
a tree below the leader of its session. What brings it back is the command of a new window, and
leads the session of that; the tree takes the terminal over from it.
"""

import contextlib
import os
import shlex
import subprocess
import time

import pytest

from ckpt.kernel.procfs.stat import read_stat
from ckpt.process.tree import list_tree
from integration.harness import CKPT, become_subreaper, ckpt, dump
from integration.workloads.driver import ANSWER_S

SIZE = ("-x", "90", "-y", "20")
PROMPT = "ready> "
BASH = ("env", f"PS1={PROMPT}", "HISTFILE=", "bash", "--norc", "--noprofile", "-i")
become_subreaper()


class Tmux:
    """A tmux server of our own, with one window at a time."""

    def __init__(self, cwd):
        self._socket = str(cwd / "tmux")
        self._cwd = cwd

    def run(self, *words):
        command = ["tmux", "-S", self._socket, "-f", "/dev/null", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def open(self, *command):
        """Open a window in which the command leads the session."""
        text = f"exec {shlex.join(map(str, command))}"
        self.run("new-session", "-d", *SIZE, "-c", self._cwd, text)
        self.run("set-option", "-g", "remain-on-exit", "on")

    @property
    def pid(self):
        return int(self.run("display-message", "-p", "#{pane_pid}"))

    def keys(self, *keys):
        self.run("send-keys", *keys)

    def enter(self, text):
        self.run("send-keys", "-l", text)
        self.keys("Enter")

    def screen(self):
        return self.run("capture-pane", "-p")

    def wait_for(self, *texts):
        """Return the screen once it shows all of these; a look takes a process, thus time."""
        give_up_s = time.monotonic() + ANSWER_S
        while not all(text in (screen := self.screen()) for text in texts):
            assert time.monotonic() < give_up_s, f"never shown: {texts}\n{screen}"
        return screen

    def wait_for_end(self):
        """Wait until nothing has the window's terminal open any more."""
        give_up_s = time.monotonic() + ANSWER_S
        while self.run("display-message", "-p", "#{pane_dead}").strip() != "1":
            assert time.monotonic() < give_up_s, self.screen()

    def end(self):
        """End the server, a child of ours since it went into the background."""
        server = int(self.run("display-message", "-p", "#{pid}"))
        self.run("kill-server")
        os.waitpid(server, 0)


@pytest.fixture
def tmux(tmp_path):
    """A tmux server in the test's own directory."""
    server = Tmux(tmp_path)
    yield server
    with contextlib.suppress(AssertionError):
        server.end()


def bring_back(tmux, image):
    """Kill what is in the window, by its dump, and restore it in a new window."""
    pid = tmux.pid
    pids = list_tree(pid)
    dump(pid, image, "--kill")
    tmux.end()
    # tmux overlooks children that end while it notes the end of a window (it ignores SIGCHLD for
    # a moment); it has ended itself now, and left them to us, as the shell has left its own.
    for one in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(one, 0)
    tmux.open(*CKPT, "restore", image)
    return pid


def wait_for_job(tmux, shell):
    """Wait until a job of the shell is in the foreground, and is a program of its own by then.

    Until it has called exec it may ignore the signals of the terminal, as the shell does.
    """
    give_up_s = time.monotonic() + ANSWER_S
    while read_stat(read_stat(shell).tpgid).comm == read_stat(shell).comm:
        assert time.monotonic() < give_up_s, tmux.screen()


def wait_for_shell(tmux, shell):
    """Wait until the shell itself is in the foreground."""
    give_up_s = time.monotonic() + ANSWER_S
    while read_stat(shell).tpgid != shell:
        assert time.monotonic() < give_up_s, tmux.screen()


def test_an_interactive_shell(tmux, tmp_path):
    image = tmp_path / "image"
    tmux.open(*BASH)
    tmux.wait_for(PROMPT.strip())
    tmux.enter("secret=forty-two; cd /usr")
    tmux.enter("echo before $secret")
    tmux.wait_for("\nbefore forty-two")
    tmux.run("send-keys", "-l", "echo half a li")
    tmux.wait_for("> echo half a li")
    dump(tmux.pid, image, "--incremental")
    tmux.run("send-keys", "-l", "ne $secret")
    tmux.keys("Enter")
    tmux.wait_for("\nhalf a line forty-two")
    tmux.run("send-keys", "-l", "echo again $sec")
    tmux.wait_for("> echo again $sec")
    pid = bring_back(tmux, image)
    tmux.wait_for("is standard error of this command now")
    tmux.run("send-keys", "-l", "ret in $PWD")
    tmux.keys("Enter")
    tmux.wait_for("\nagain forty-two in /usr")
    assert read_stat(pid).tpgid == pid
    # Job control: a child is a group of its own, in the foreground, stopped, continued, ended.
    tmux.enter("sleep 1000")
    wait_for_job(tmux, pid)
    tmux.keys("C-z")
    tmux.wait_for("Stopped")
    tmux.enter("fg")
    wait_for_job(tmux, pid)
    tmux.keys("C-c")
    tmux.enter("echo status $?")
    tmux.wait_for("\nstatus 130")
    tmux.enter("exit")
    tmux.wait_for_end()


def test_vim_alone_in_a_window_of_the_same_size(tmux, tmp_path):
    image, text = tmp_path / "image", tmp_path / "text"
    tmux.open("vim", "-Nnu", "NONE", text)
    tmux.wait_for("[New")
    tmux.keys("i")
    tmux.wait_for("-- INSERT --")
    tmux.enter("written before the dump")
    tmux.run("send-keys", "-l", "and half of a li")
    tmux.wait_for("and half of a li")
    dump(tmux.pid, image, "--incremental")
    tmux.run("send-keys", "-l", "ne")
    tmux.wait_for("and half of a line")
    bring_back(tmux, image)
    tmux.wait_for("is standard error of this command now")
    tmux.run("send-keys", "-l", ", the rest")
    tmux.keys("Escape", "C-l")
    tmux.wait_for("written before the dump", "and half of a line, the rest")
    tmux.enter(":wq")
    tmux.wait_for_end()
    assert text.read_text() == "written before the dump\nand half of a line, the rest\n"


def test_a_shell_with_vim_in_the_foreground_and_a_stopped_job(tmux, tmp_path):
    image, text = tmp_path / "image", tmp_path / "text"
    tmux.open(*BASH)
    tmux.wait_for(PROMPT.strip())
    tmux.enter("secret=forty-two; sleep 1000")
    wait_for_job(tmux, tmux.pid)
    tmux.keys("C-z")
    tmux.wait_for("Stopped")
    tmux.enter(f"vim -Nnu NONE {text}")
    tmux.wait_for("[New")
    tmux.keys("i")
    tmux.wait_for("-- INSERT --")
    tmux.run("send-keys", "-l", "half of a li")
    tmux.wait_for("half of a li")
    dump(tmux.pid, image, "--incremental")
    tmux.run("send-keys", "-l", "ne")
    tmux.wait_for("half of a line")
    job = read_stat(tmux.pid).tpgid
    pid = bring_back(tmux, image)
    tmux.wait_for("is standard error of this command now")
    assert read_stat(pid).tpgid == job
    assert read_stat(job).tty_nr == read_stat(pid).tty_nr != 0
    tmux.run("send-keys", "-l", ", the rest")
    tmux.keys("Escape", "C-l")
    tmux.wait_for("half of a line, the rest")
    tmux.keys("C-z")
    tmux.wait_for("Stopped", PROMPT.strip())
    tmux.enter("echo $secret; jobs")
    tmux.wait_for("\nforty-two", "sleep 1000", "vim")
    tmux.enter("fg")
    tmux.wait_for("half of a line, the rest\n~")
    tmux.enter(":wq")
    wait_for_shell(tmux, pid)
    tmux.enter("fg")
    wait_for_job(tmux, pid)
    tmux.keys("C-c")
    wait_for_shell(tmux, pid)
    tmux.enter("exit")
    tmux.wait_for_end()
    assert text.read_text() == "half of a line, the rest\n"


def test_tmux_itself_with_the_terminals_that_it_has(tmux, tmp_path):
    image, text = tmp_path / "image", tmp_path / "text"
    tmux.open(*BASH)
    tmux.wait_for(PROMPT.strip())
    tmux.enter(f"vim -Nnu NONE {text}")
    tmux.wait_for("[New")
    tmux.keys("i")
    tmux.wait_for("-- INSERT --")
    tmux.run("send-keys", "-l", "half of a li")
    tmux.wait_for("half of a li")
    server = int(tmux.run("display-message", "-p", "#{pid}"))
    dump(server, image, "--incremental")
    tmux.run("send-keys", "-l", "ne")
    shown = tmux.wait_for("half of a line")
    shell, terminal = tmux.pid, tmux.run("display-message", "-p", "#{pane_tty}")
    pids = list_tree(server)
    dump(server, image, "--kill")
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    done = ckpt("restore", "--detach", image)
    assert done.returncode == 0, done.stderr
    assert tmux.screen() == shown
    assert (tmux.pid, tmux.run("display-message", "-p", "#{pane_tty}")) == (shell, terminal)
    tmux.run("send-keys", "-l", ", the rest")
    tmux.wait_for("half of a line, the rest")
    tmux.keys("Escape")
    tmux.enter(":wq")
    wait_for_shell(tmux, shell)
    assert text.read_text() == "half of a line, the rest\n"
    tmux.enter("tty; sleep 1000")
    tmux.wait_for(f"\n{terminal}")
    wait_for_job(tmux, shell)
    tmux.run("resize-window", *("-x", "70", "-y", "15"))
    tmux.keys("C-c")
    wait_for_shell(tmux, shell)
    tmux.enter("stty size")
    tmux.wait_for("\n15 70")
    tmux.run("split-window", "exec cat")
    assert len(set(tmux.run("list-panes", "-F", "#{pane_tty}").split())) == 2
