"""A stand-in for ssh, which runs the command here: `stand_in_ssh.py HOW OPTION... -- HOST COMMAND`.

With `over:HOST:PORT`, a process of there (`serve:PORT`) runs it, as sshd would.

With `pipes`, the command gets two of them, and what comes and goes is carried over; with `socket`,
it gets the streams themselves. It goes on when this process is ended, as it would over there.
"""

import os
import signal
import socket
import subprocess
import sys
import threading


def carry(from_fd, to_fd, connection=None):
    try:
        while data := os.read(from_fd, 1 << 16):
            while data:
                data = data[os.write(to_fd, data) :]
    except OSError:
        pass
    if connection is not None:
        connection.shutdown(socket.SHUT_WR)
    os.close(to_fd)


def serve(port):
    server = socket.create_server(("", port))
    print("serves", flush=True)
    # Nobody waits for what it runs.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = server.accept()
        with connection, connection.makefile("rb", buffering=0) as words:
            command = words.readline().decode()
            subprocess.Popen(["sh", "-c", command], stdin=connection, stdout=connection)


def ask(where, command):
    host, _, port = where.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{command}\n".encode())
        fd = connection.fileno()
        threading.Thread(target=carry, args=(0, os.dup(fd), connection), daemon=True).start()
        carry(fd, 1)
    return 0


def main():
    how, command = sys.argv[1], sys.argv[-1]
    if how.startswith("serve:"):
        return serve(int(how.removeprefix("serve:")))
    assert "--" in sys.argv
    if how.startswith("over:"):
        return ask(how.removeprefix("over:"), command)
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
