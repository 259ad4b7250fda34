"""A stand-in for ssh, which runs the command here: `stand_in_ssh.py HOW OPTION... -- HOST COMMAND`.

With `pipes`, the command gets two of them, and what comes and goes is carried over; with `socket`,
it gets the streams themselves. It goes on when this process is ended, as it would over there.
"""

import os
import subprocess
import sys
import threading


def carry(from_fd, to_fd):
    try:
        while data := os.read(from_fd, 1 << 16):
            while data:
                data = data[os.write(to_fd, data) :]
    except OSError:
        pass
    os.close(to_fd)


def main():
    how, command = sys.argv[1], sys.argv[-1]
    assert "--" in sys.argv
    if how == "socket":
        process = subprocess.Popen(["sh", "-c", command])
        os.close(0)
        os.close(1)
        return process.wait()
    process = subprocess.Popen(
        ["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    to_fd = os.dup(process.stdin.fileno())
    process.stdin.close()
    threading.Thread(target=carry, args=(0, to_fd), daemon=True).start()
    carry(process.stdout.fileno(), 1)
    return process.wait()


if __name__ == "__main__":
    os._exit(main())
