"""The `ckpt` command: finds the command asked for, and turns every ending into an exit code.

Each command is a module beside this one, loaded only when it is the one asked for, so that
`ckpt --help` costs nothing and a command pays only for what it uses. Nowhere else are errors
printed or exit codes chosen.
"""

import gc
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.logs import log_options, stop_listening
from ckpt.cli.output import discard_stdout, emit_json, note, stdout_reader_is_gone
from ckpt.errors import CkptError, HostFull, UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS = {
    "check": "Say what this kernel offers; with --pid, what would be refused and why.",
    "run": "Run a command with regular checkpoints; the same line brings it back.",
    "dump": "Add a checkpoint of a running process to an image directory.",
    "restore": "Bring the process of an image directory back.",
    "migrate": "Move a running process to another host.",
    "receive": "Take processes that 'ckpt migrate' sends from another host.",
    "show": "List the checkpoints of an image directory, or what is in one of them.",
    "verify": "Check that all of an image directory is what was written.",
    "squash": "Merge checkpoints of an image directory into a full one.",
    "prune": "Keep some checkpoints of an image directory, by rules, and remove the others.",
    "copy": "Copy checkpoints into object storage, or back; only what is missing goes over.",
    "diff": "Say what changed between two checkpoints.",
    "export": "Write a process of a checkpoint into a core file, for a debugger.",
    "report": "Write a page about an image directory, to be opened in a browser.",
    "completion": "Print what makes bash, zsh or fish complete the words of a command line.",
    "keygen": "Make a private key for encrypted images.",
}
"""Each command's module in this package, and its line in `ckpt --help`."""

EXIT_BUG = 70
"""EX_SOFTWARE of sysexits.h: the trouble is ours."""

EXIT_INTERRUPTED = 130
"""What a shell reports of a command that ended by SIGINT."""

EXIT_BROKEN_PIPE = 141
"""What a shell reports of a command that ended by SIGPIPE."""


class LazyGroup(click.Group):
    """A group whose commands are modules: `NAME` is the object `command` in `PACKAGE.NAME`.

    The help of the group is made from `summaries` alone and imports no command.
    """

    def __init__(self, *, package: str, summaries: Mapping[str, str], name: str, help: str) -> None:  # noqa: A002
        """Make the group; `help` is click's own name for the text."""
        super().__init__(name=name, help=help, no_args_is_help=False)
        self._package = package
        self._summaries = summaries

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names in the order in which they are told."""
        return list(self._summaries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of `cmd_name`; None if there is no such command."""
        if cmd_name not in self._summaries:
            return None
        module = _import_to_stay(f"{self._package}.{cmd_name}")
        command = module.command
        if not isinstance(command, click.Command):
            raise TypeError(f"{module.__name__}.command is no click command")
        if not any(param.name == "log_level" for param in command.params):
            command.params.extend(log_options())
        if ctx.resilient_parsing:  # a shell asks what words could become
            from ckpt.cli.completing import teach

            teach(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem[Any]]":
        """Return what `incomplete` could become, without importing a command."""
        from click.shell_completion import CompletionItem

        names = [
            CompletionItem(name, help=summary)
            for name, summary in self._summaries.items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the table of commands without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self._summaries.items()))


def _import_to_stay(name: str) -> ModuleType:
    """Import a module whose objects live as long as we do: no garbage is looked for among them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    # Costs more than click itself, and only this option needs it.
    from importlib.metadata import version

    click.echo(f"ckpt {version('ckpt')}")
    ctx.exit()


cli = LazyGroup(
    name="ckpt",
    package="ckpt.cli",
    summaries=COMMANDS,
    help="Checkpoint a running process from outside, again and again, each time with only the"
    " memory pages written since the last time; bring it back from any of these checkpoints.",
)
cli.epilog = "Run 'ckpt COMMAND --help' for the options of a command, and an example."
cli.params.append(
    click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_print_version,
        help="Print the version.",
    )
)


def main() -> int:
    """Run the command line of this process (the entry point of the package)."""
    if (instruction := os.environ.get("_CKPT_COMPLETE")) is not None:
        from ckpt.cli.completing import answer

        return answer(cli, instruction)
    return run(cli, sys.argv[1:])


def run(group: click.Group, args: Sequence[str]) -> int:
    """Run the command in `args` and return the exit code; the one place where errors are told.

    A command returns its exit code, or None for 0. A user's trouble (`CkptError`, or a command
    line that makes no sense) is one sentence on stderr and, where `--json` was given, an object
    `{"error": {"code", "message", "exit_code"}}` on stdout. Anything else that is raised is a bug
    of ours and shows its traceback.
    """
    try:
        try:
            return _invoke(group, args)
        except CkptError as error:
            return _tell(error.code, error.message(), error.exit_code, args)
        except click.ClickException as error:
            return _tell(UsageError.code, _usage_sentence(error), UsageError.exit_code, args)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and stdout_reader_is_gone():
                discard_stdout()
                return EXIT_BROKEN_PIPE
            import traceback

            traceback.print_exc()
            sentence = f"{type(error).__name__}: {error} (this is a bug in ckpt, please report it)"
            return _tell("internal", sentence, EXIT_BUG, args)
    except KeyboardInterrupt:
        note("interrupted")
        return EXIT_INTERRUPTED
    finally:
        stop_listening()


def _invoke(group: click.Group, args: Sequence[str]) -> int:
    """Run one command the way `click.Group.main` does, but let every exception through."""
    if not args:
        with group.make_context("ckpt", ["--help"], resilient_parsing=True) as ctx:
            click.echo(group.get_help(ctx), err=True)
        return UsageError.exit_code
    try:
        with group.make_context("ckpt", list(args)) as ctx:
            code = group.invoke(ctx)
    except click.exceptions.Exit as end:
        code = end.exit_code
    return 0 if code is None else int(code)


def _usage_sentence(error: click.ClickException) -> str:
    sentence = error.format_message().removesuffix(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{sentence} (see {context.command_path if context else 'ckpt'} --help)"


def _tell(code: str, sentence: str, exit_code: int, args: Sequence[str]) -> int:
    note(sentence, "error")
    # Not from the parsed options: they are unknown if the command line is what is wrong.
    if "--json" in takewhile(lambda arg: arg != "--", args):
        # If stdout is what is wrong, the sentence on stderr has to do.
        with suppress(HostFull, BrokenPipeError):
            emit_json({"error": {"code": code, "message": sentence, "exit_code": exit_code}})
    return exit_code
