"""How a command line names what leads outside the tree: `--external KEY`, `--inherit KEY=FD`.

    pipe:[4711]  socket:[4711]  /dev/pts/3      as /proc/PID/fd shows it
    unix:[4711]                                 as lists of unix sockets show it
    auto                                        to dump only: whatever leads there

The part of `resources.files.outside` and `instead` that is text.
"""

import os
import re
from typing import NamedTuple

import click

_NAME = re.compile(r"/.+|[a-z]+:\[\d+\]")
_AUTO = "auto"


class Inherit(NamedTuple):
    """What the user puts in the place of something: by its number, by its name."""

    by_number: dict[int, int | str]
    by_name: dict[str, tuple[int | str, ...]]


def parse_external(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the names; see `click.Option.callback`."""
    for value in values:
        if value != _AUTO and not _NAME.fullmatch(value):
            raise click.BadParameter(
                f"{value!r} is not of the form pipe:[4711], /dev/pts/3 or auto"
            )
    return values


def parse_inherit(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> Inherit:
    """Return what stands for what; see `click.Option.callback`."""
    inherit = Inherit({}, {})
    for value in values:
        number, _, path = value.partition("=")
        name, _, instead = value.rpartition("=")
        if number.isdecimal() and path:
            inherit.by_number[int(number)] = _parse_instead(path)
        elif _NAME.fullmatch(name) and instead:
            inherit.by_name[name] = (*inherit.by_name.get(name, ()), _parse_instead(instead))
        else:
            raise click.BadParameter(f"{value!r} is not of the form FD=PATH or KEY=FD")
    return inherit


def _parse_instead(text: str) -> int | str:
    """Return a descriptor that we were started with, or a path."""
    if not text.isdecimal():
        return text
    try:
        # One of our own is closed on exec.
        if os.get_inheritable(int(text)):
            return int(text)
    except OSError:
        pass
    raise click.BadParameter(
        f"descriptor {text} of this command is not open (a file of that name: ./{text})"
    )
