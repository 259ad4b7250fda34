"""Commands of the user that are run at one moment of a move: most often, to move an address.

    --on-departure    the tree stands still, its network is held: it is about to leave this host
    --on-arrival      its network is held here, none of its sockets is there yet
    --on-return       it goes on where it was: what one of the two has begun on this host is undone

A command that fails ends what we are at: nobody has been killed, nobody has been made. Only that of
`--on-return` comes too late for that, which is said.
"""

import os
from collections.abc import Callable, Mapping

from ckpt.errors import HookFailed

_SHELL = "/bin/sh"
_TO_STDERR = 2
"""What it says is not a result of ours."""


class Hook:
    """A command of the user under way; it must be waited for."""

    def __init__(
        self, option: str, command: str, outcome: str, variables: Mapping[str, object]
    ) -> None:
        """See `run_hook`."""
        import subprocess  # 15 ms, for those who have a hook

        self._option = option
        self._outcome = outcome
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        try:
            self._process = subprocess.Popen(
                [_SHELL, "-c", command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=_TO_STDERR,
            )
        except OSError as error:
            raise HookFailed(option, error.strerror or str(error), outcome) from error

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            HookFailed: it did not end with 0.
        """
        status = self._process.wait()
        if status > 0:
            raise HookFailed(self._option, f"it ended with exit status {status}", self._outcome)
        if status < 0:
            raise HookFailed(self._option, f"signal {-status} ended it", self._outcome)


def start_hook(option: str, command: str, outcome: str, **variables: object) -> Hook | None:
    """Start a command of the user by the shell; an empty one is none.

    Raises:
        HookFailed: it could not be started.
    """
    return Hook(option, command, outcome, variables) if command else None


def run_hook(option: str, command: str, outcome: str, **variables: object) -> None:
    """Run a command of the user by the shell, to its end; an empty one is none.

    Args:
        option: by which it was given.
        command: for `sh -c`.
        outcome: what has become of the tree if it fails, for the user.
        variables: of its environment, besides ours.

    Raises:
        HookFailed: it could not be started, or did not end with 0.
    """
    hook = start_hook(option, command, outcome, **variables)
    if hook is not None:
        hook.wait()


def run_return(command: str, tell: Callable[[str], None], pid: int) -> None:
    """Run the command of `--on-return`, and say so if it fails.

    Args:
        command: an empty one is none.
        tell: is given a sentence then.
        pid: of the root of the tree.
    """
    try:
        run_hook("--on-return", command, "see to the addresses of the tree", CKPT_PID=pid)
    except HookFailed as error:
        tell(error.message())
