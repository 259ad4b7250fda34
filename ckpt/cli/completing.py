"""What a shell is told when its user presses TAB; nothing here is loaded otherwise.

click asks each parameter's type what a word could become. The commands need no such types for
themselves (whether a directory is an image is not for a command line to say), so they are given
them here, by the names that their help uses.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, shell_complete

VARIABLE = "_CKPT_COMPLETE"
"""Set by the scripts of `ckpt completion` when they ask; its value is click's affair."""

_LIVE = frozenset({"check", "dump", "migrate"})
"""Commands whose PID is one of this host, now."""


if TYPE_CHECKING:
    _AnyType = click.ParamType[Any]
else:
    _AnyType = click.ParamType  # takes no arguments before click 8.4


class _Pid(_AnyType):
    """A process that runs here; the shell shows its name beside the number."""

    name = "pid"

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> "list[CompletionItem[Any]]":
        """List those whose number begins so; threads of the kernel are none."""
        items = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal() or not folder.name.startswith(incomplete):
                continue
            try:
                command = folder.joinpath("cmdline").read_bytes()
            except OSError:
                continue
            if command:
                items.append(CompletionItem(folder.name, help=_readable(command)))
        return sorted(items, key=lambda item: int(item.value))


def _readable(command: bytes) -> str:
    words = command.replace(b"\0", b" ").decode(errors="replace").strip()[:60]
    # One line a candidate, whatever a process calls itself.
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def teach(command: click.Command) -> None:
    """Give the parameters of a command types that know what words could become."""
    for param in command.params:
        kind = param.name if isinstance(param, click.Argument) else getattr(param, "metavar", None)
        if kind == "PID" and command.name in _LIVE:
            param.type = _Pid()
        elif kind in {"image_dir", "source", "target", "DIR"}:
            param.type = click.Path(file_okay=False)
        elif kind in {"F", "FILE", "PATH"}:
            param.type = click.Path()


def answer(group: click.Group, instruction: str) -> int:
    """Do what a shell asks for by `VARIABLE`; return the exit code."""
    return shell_complete(group, {}, "ckpt", VARIABLE, instruction)
