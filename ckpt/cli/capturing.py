"""The options by which a tree is captured, for the commands that take one from where it runs."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ckpt.resources.base import CaptureOptions
from ckpt.tracker.base import TrackerName
from ckpt.tracker.choose import AUTO

F = TypeVar("F", bound=Callable[..., Any])


def pid_option(help_text: str) -> Callable[[F], F]:
    """Return the `--pid` of a command that cannot do without; arrives as `pid`."""
    return click.option(
        "--pid", type=click.IntRange(min=1), required=True, metavar="PID", help=help_text
    )


tracker_option = click.option(
    "--tracker",
    type=click.Choice([AUTO, *(name.value for name in TrackerName)]),
    default=AUTO,
    show_default=True,
    help="How to learn which pages were written; auto takes the best that this kernel has.",
)
"""Arrives as `tracker`."""

ghost_limit_option = click.option(
    "--ghost-limit",
    "ghost_limit_bytes",
    type=click.IntRange(min=0),
    default=CaptureOptions().ghost_limit_bytes,
    show_default=True,
    metavar="BYTES",
    help="How much of a deleted file that is still open or mapped may travel along; holes do not"
    " count. More is refused.",
)
"""Arrives as `ghost_limit_bytes`."""
