"""The promise: progress is for a person at a terminal, and costs nobody else anything."""

import json
import os
import pty
import subprocess
import sys

import pytest

from ckpt.cli.output import emit_json, progress

PROGRAM = """
import sys
from ckpt.cli.output import emit_json, progress
with progress(after_s=float(sys.argv[1])) as report:
    report("Saving memory", 3 << 20, 4 << 20)
    print("inside", flush=True)
emit_json({"rich": any(name.startswith("rich") for name in sys.modules)})
"""


def read_until_closed(fd):
    """Read a terminal's output; EIO is how Linux says that its last writer is gone."""
    chunks = []
    while True:
        try:
            chunk = os.read(fd, 65536)
        except OSError:
            break
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode()


def run_at_a_terminal(after_s):
    terminal_fd, stderr_fd = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(after_s)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=stderr_fd,
    )
    os.close(stderr_fd)
    try:
        drawn = read_until_closed(terminal_fd)
        out, _ = process.communicate()
    finally:
        os.close(terminal_fd)
        process.kill()
        process.wait()
    assert process.returncode == 0
    inside, result = out.decode().splitlines()
    assert inside == "inside"
    return drawn, json.loads(result)


def test_a_terminal_sees_progress_and_stdout_stays_clean():
    drawn, result = run_at_a_terminal(after_s=0)
    assert "Saving memory" in drawn
    assert "3.0/4.0 MiB" in drawn
    assert result == {"rich": True}


def test_short_work_does_not_pay_for_it():
    drawn, result = run_at_a_terminal(after_s=3600)
    assert drawn == ""
    assert result == {"rich": False}


def test_without_a_terminal_nothing_is_drawn(capfd):
    with progress(after_s=0) as report:
        report("Saving memory", 1, 2)
    assert capfd.readouterr() == ("", "")


def test_what_json_cannot_say_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        emit_json({"freeze_ms": float("nan")})
