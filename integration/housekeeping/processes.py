"""Starts `two_threads`, whose memory and threads the tests here know."""

import contextlib
import subprocess
from pathlib import Path

from integration.workloads.build import build_file
from integration.workloads.driver import Dialogue

SOURCE = Path(__file__).with_name("two_threads.c")
PAGE = 4096
FILE_CONTENT = b"".join(letter.encode() * PAGE for letter in "ABCD")


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
