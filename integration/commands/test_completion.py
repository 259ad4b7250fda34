"""The promise: TAB completes commands, options, processes and directories, in three shells."""

import os
import pty
import select
import shlex
import subprocess
import time

import pytest

from ckpt.cli.main import COMMANDS
from integration.harness import CKPT

BASH = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
compopt() {{ echo "compopt $2"; }}
_ckpt_completion ckpt
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
WAIT_S = 60


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Return a function that runs a shell in which `ckpt` is a command."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "bin"
    folder.mkdir()
    command = folder / "ckpt"
    command.write_text(f'#!/bin/sh\nexec {shlex.join(CKPT)} "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(home),
        "TERM": "dumb",
    }

    def run(*words):
        done = subprocess.run(
            words,
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout

    run.environment, run.scripts = environment, {}
    return run


def script_of(shell, name, folder):
    path = folder / f"completion.{name}"
    if name not in shell.scripts:
        shell.scripts[name] = shell("ckpt", "completion", name)
    path.write_text(shell.scripts[name])
    return path


def bash(shell, folder, words):
    script = script_of(shell, "bash", folder)
    return shell("bash", "--norc", "-c", BASH.format(script=script, words=words)).splitlines()


def fish(shell, folder, words):
    script = script_of(shell, "fish", folder)
    line = shlex.quote(f"ckpt {words}")
    said = shell("fish", "--no-config", "-c", f"source {script}; complete -C {line}")
    return [line.split("\t")[0] for line in said.splitlines()]


@pytest.mark.parametrize("complete", [bash, fish])
def test_commands_options_choices_and_processes(shell, complete, tmp_path):
    words = "" if complete is fish else "ckpt "
    assert set(complete(shell, tmp_path, f"{words}re")) == {
        name for name in COMMANDS if name.startswith("re")
    }
    assert complete(shell, tmp_path, f"{words}dump --trac") == ["--tracker"]
    assert complete(shell, tmp_path, f"{words}dump --tracker com") == ["compare"]
    assert str(os.getpid()) in complete(shell, tmp_path, f"{words}dump --pid {os.getpid()}")


def test_bash_is_told_to_complete_directories(shell, tmp_path):
    assert bash(shell, tmp_path, "ckpt show /t")[0] == "compopt dirnames"
    assert bash(shell, tmp_path, "ckpt report -o /t")[0] == "compopt default"


def test_fish_completes_directories_and_explains_commands(shell, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "imagination").write_text("")
    assert fish(shell, tmp_path, f"show {tmp_path}/imag") == [f"{tmp_path}/images/"]
    script = script_of(shell, "fish", tmp_path)
    said = shell("fish", "--no-config", "-c", f"source {script}; complete -C 'ckpt du'")
    assert said == f"dump\t{COMMANDS['dump']}\n"


def test_zsh_completes_a_line_that_is_typed(shell, tmp_path):
    """Only its line editor completes; so it gets a terminal, and says what became of the line."""
    script = script_of(shell, "zsh", tmp_path)
    commands = [
        "PS1=; unsetopt zle_bracketed_paste prompt_sp; autoload -U compinit; compinit -u",
        f"source {script}; echo rea''dy",
    ]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], shell.environment)
    try:
        os.write(terminal, "".join(f"{line}\n" for line in commands).encode())
        read_until(terminal, b"ready")
        os.write(terminal, b"\x15ckpt du\t--tracker com\t\x01echo line: \n")
        read_until(terminal, b"line: ckpt dump --tracker compare")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def read_until(terminal, phrase):
    held = b""
    ends_s = time.monotonic() + WAIT_S
    while phrase not in held.replace(b"\r", b""):
        left_s = ends_s - time.monotonic()
        assert select.select([terminal], [], [], max(0, left_s))[0], held
        held += os.read(terminal, 4096)
