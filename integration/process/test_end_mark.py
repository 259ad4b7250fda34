"""The promise: the signal that ends a batch of ours is not seen by a target that waits for it."""

import os
import signal
import subprocess
import sys

from integration.harness import dump

HARMLESS = "signal.SIGWINCH, signal.SIGURG, signal.SIGCHLD"

WAITS = f"""
import signal, sys
mine = {{{HARMLESS}}}
signal.pthread_sigmask(signal.SIG_BLOCK, mine)
print("ready", flush=True)
while True:
    print(signal.Signals(signal.sigwait(mine)).name, flush=True)
"""

LOOKS = f"""
import signal, sys
mine = {{{HARMLESS}}}
signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
print("ready", flush=True)
for line in sys.stdin:
    print(signal.sigpending(), signal.sigtimedwait(mine, 0), flush=True)
"""


def start(program):
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end(process):
    process.kill()
    process.communicate()


def test_a_thread_in_sigwait_goes_on_waiting(tmp_path):
    process = start(WAITS)
    try:
        for _ in range(5):
            dump(process.pid, tmp_path / "image")
        for sig in (signal.SIGURG, signal.SIGWINCH, signal.SIGCHLD):
            os.kill(process.pid, sig)
            # The first that it hears of.
            assert process.stdout.readline() == f"{sig.name}\n"
    finally:
        end(process)


def test_nothing_is_left_in_the_queue_of_a_thread_that_blocks_everything(tmp_path):
    process = start(LOOKS)
    try:
        for _ in range(5):
            dump(process.pid, tmp_path / "image")
            process.stdin.write("look\n")
            process.stdin.flush()
            assert process.stdout.readline() == "set() None\n"
    finally:
        end(process)
