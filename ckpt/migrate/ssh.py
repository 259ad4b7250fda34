"""`ssh://user@host`: ckpt over there is started by ssh, and spoken to over its standard streams.

Nothing listens, and ssh has proved who is who. `CKPT_SSH` names another command than `ssh` (with
options, in shell words), as RSYNC_RSH does for rsync. Neighbours: `dial`; `stdio` is the other end.
"""

import contextlib
import os
import shlex
import shutil
import socket
import threading
from typing import TYPE_CHECKING

from ckpt.errors import ConnectFailed
from ckpt.migrate.destination import SshTarget
from ckpt.migrate.transport import FdTransport

if TYPE_CHECKING:
    import subprocess

SSH_VARIABLE = "CKPT_SSH"

_END_S = 2.0
"""How long ssh may take to end when its streams are closed."""

# Ctrl-C goes to the whole terminal; the connection must not go before we have said goodbye.
_UNINTERRUPTED = ("/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh")

_SSH_FAILED = 255
_NOT_FOUND = 127


class SshConnection:
    """One ssh and its transport."""

    def __init__(self, target: SshTarget, remote_ckpt: str) -> None:
        """Start ssh; `remote_ckpt` is the command over there, in words of its shell.

        Raises:
            ConnectFailed: there is no ssh here.
        """
        import subprocess

        command = plan_command(target, remote_ckpt, os.environ.get(SSH_VARIABLE, "ssh"))
        if not shutil.which(command[0]):
            raise ConnectFailed(peer=str(target), reason=f"there is no {command[0]} on this host")
        self._peer = str(target)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*_UNINTERRUPTED, *command], stdin=theirs.fileno(), stdout=theirs.fileno()
            )
        fd = ours.detach()
        self.transport = FdTransport(fd, fd, self._peer, self._begin_end)

    def explain(self, error: ConnectFailed) -> ConnectFailed:
        """Return the reason why nobody answered, by how ssh ended; `error` if that says nothing."""
        code = _wait(self._process, _END_S)
        if code == _SSH_FAILED:
            reason = "ssh could not connect (what it said is above)"
        elif code == _NOT_FOUND:
            reason = "there is no such command over there (--remote-ckpt names it)"
        else:
            return error
        return ConnectFailed(peer=self._peer, reason=reason)

    def _begin_end(self) -> None:
        """See to it that ssh ends, now that its streams are closed, and let nobody wait for it.

        It carries over what it has read, and goes when the command over there does, which may be a
        session that goes on without us. No daemon: ours may end no earlier.
        """
        threading.Thread(target=self._end, name="ckpt-ssh").start()

    def _end(self) -> None:
        if _wait(self._process, _END_S) is None:
            self._process.terminate()
        if _wait(self._process, _END_S) is None:
            self._process.kill()
            self._process.wait()


def _wait(process: "subprocess.Popen[bytes]", timeout_s: float) -> int | None:
    import subprocess

    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout_s)
    return None


def plan_command(target: SshTarget, remote_ckpt: str, ssh: str) -> list[str]:
    """Return the command line: no terminal over there, and no name that could be an option."""
    port = ["-p", str(target.port)] if target.port else []
    user = ["-l", target.user] if target.user else []
    return [
        *shlex.split(ssh),
        "-T",
        *port,
        *user,
        "--",
        target.host,
        f"{remote_ckpt} receive --stdio",
    ]
