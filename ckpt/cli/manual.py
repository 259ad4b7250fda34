r"""The manual page, made of what the commands say of themselves: `python -m ckpt.cli.manual`.

It is made when it is wanted, so it cannot be out of date. Every command has a section with its
options and examples; what all have in common, and what the exit codes mean, stands once.
The language is that of man(7): a backslash begins an escape, a dot or a quote at the beginning of a
line a request, and \- is the minus that can be copied into a shell.
"""

import sys
from collections.abc import Iterable, Iterator

import click

from ckpt.cli.main import EXIT_BROKEN_PIPE, EXIT_BUG, EXIT_INTERRUPTED, cli
from ckpt.errors import CkptError

_COMMON = frozenset({"--json", "--log-level", "--log-json", "--help"})
"""Options that every command has."""

_SHELL_CODES = {
    EXIT_BUG: "A bug of ckpt, with its traceback.",
    EXIT_INTERRUPTED: "Ended by SIGINT.",
    EXIT_BROKEN_PIPE: "Nobody read standard output any more.",
}


def make_manual(group: click.Group, version: str) -> str:
    """Return the page, in the language of man(7)."""
    return "\n".join([*_iter_lines(group, version), ""])


def _iter_lines(group: click.Group, version: str) -> Iterator[str]:
    commands = {}
    with click.Context(group, info_name="ckpt") as ctx:
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            if command is not None:
                commands[name] = command
        yield f'.TH CKPT 1 "" "ckpt {_text(version)}" "User Commands"'
        yield from (".SH NAME", r"ckpt \- checkpoint and restore running processes, from outside")
        yield from (
            ".SH SYNOPSIS",
            r".B ckpt",
            r"\fICOMMAND\fR [\fIOPTION\fR]... [\fIARGUMENT\fR]...",
        )
        yield ".SH DESCRIPTION"
        yield from _paragraphs(group.help or "")
        yield ".SH COMMANDS"
        for name, command in commands.items():
            yield from _section(command, click.Context(command, info_name=name, parent=ctx))
        yield from (".SH COMMON OPTIONS", "Every command takes these.")
        for command in list(commands.values())[:1]:
            yield from _options(command, click.Context(command, parent=ctx), common=True)
    yield ".SH EXIT STATUS"
    for code, meaning in sorted(_exit_codes().items()):
        yield from (".TP", rf"\fB{code}\fR", *_paragraphs(meaning))
    yield ".SH SEE ALSO"
    yield from (".BR ptrace (2),", ".BR userfaultfd (2),", ".BR proc (5)")


def _section(command: click.Command, ctx: click.Context) -> Iterator[str]:
    pieces = " ".join(command.collect_usage_pieces(ctx))
    yield f'.SS "{_text(ctx.command_path)} {_text(pieces)}"'
    yield from _paragraphs(command.help or "")
    yield from _options(command, ctx, common=False)
    examples = (command.epilog or "").removeprefix("\b\n").splitlines()
    if examples:
        yield from (".PP", _text(examples[0]), ".PP", ".EX")
        yield from map(_text, examples[1:])
        yield ".EE"


def _options(command: click.Command, ctx: click.Context, *, common: bool) -> Iterator[str]:
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None and bool(_COMMON & {*param.opts}) == common:
            spelling, meaning = record
            yield from (".TP", rf"\fB{_text(spelling)}\fR", *_paragraphs(meaning))


def _exit_codes() -> dict[int, str]:
    """Return what each code means, by the first sentences of the errors that have it."""
    told: dict[int, list[str]] = {}
    # The special ones first: where there is one, what it is a kind of need not be told.
    for error in sorted(_descendants(CkptError), key=lambda one: bool(one.__subclasses__())):
        general = bool(error.__subclasses__())
        if "exit_code" in vars(error) and not (general and error.exit_code in told):
            sentence = (error.__doc__ or "").strip().split("\n\n")[0]
            told.setdefault(error.exit_code, []).append(sentence.replace("`", ""))
    codes = {0: "It was done. A restore that waits returns what the process returns."}
    return codes | {code: " ".join(sentences) for code, sentences in told.items()} | _SHELL_CODES


def _descendants(kind: type[CkptError]) -> Iterator[type[CkptError]]:
    for one in kind.__subclasses__():
        yield one
        yield from _descendants(one)


def _paragraphs(text: str) -> Iterable[str]:
    """Return paragraphs as lines, a request between them."""
    lines: list[str] = []
    for paragraph in text.replace("\b", "").strip().split("\n\n"):
        lines += [".PP"] if lines else []
        lines += [_text(line.strip()) for line in paragraph.splitlines()]
    return lines


def _text(line: str) -> str:
    """Return a line that says what it says, whatever it begins with."""
    escaped = line.replace("\\", r"\e").replace("-", r"\-").replace('"', r"\(dq")
    return rf"\&{escaped}" if escaped.startswith((".", "'")) else escaped


def main() -> None:
    """Print the page."""
    from importlib.metadata import version

    sys.stdout.write(make_manual(cli, version("ckpt")))


if __name__ == "__main__":
    main()
