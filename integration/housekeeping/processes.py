"""Starts `two_threads`, whose memory and threads the tests here know."""

import contextlib
import io
import subprocess
from pathlib import Path

from ckpt.cli.main import cli, run
from integration.workloads.build import build_file
from integration.workloads.driver import Dialogue

SOURCE = Path(__file__).with_name("two_threads.c")
PAGE = 4096
FILE_CONTENT = b"".join(letter.encode() * PAGE for letter in "ABCD")


def told(*args):
    """Run a command that starts nothing in this process; return its exit code and its words."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(cli, [str(arg) for arg in args])
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def two_threads(mapped):
    """Lend the pid and the dialogue of a process that maps the file; it is killed at the end."""
    mapped.write_bytes(FILE_CONTENT)
    program = subprocess.Popen(
        [build_file(SOURCE), mapped],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with program:
        dialogue = Dialogue(program.stdin.fileno(), program.stdout.fileno())
        assert dialogue.line() == "ready"
        yield program.pid, dialogue
        program.kill()
