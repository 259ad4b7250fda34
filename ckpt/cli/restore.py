"""`ckpt restore`: bring the process of an image directory back."""

import click

from ckpt.cli.output import emit_json, json_option, note, say
from ckpt.engine.restore import restore, wait_for_end
from ckpt.resources.base import RestoreOptions

_EXAMPLE = """\b
Example:
  ckpt restore /var/ckpt/job                 the newest checkpoint; ends as the process ends
  ckpt restore --at 3 --detach /var/ckpt/job
"""


def _parse_inherit(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> dict[int, str]:
    inherit: dict[int, str] = {}
    for value in values:
        number, equals, path = value.partition("=")
        if not equals or not number.isdecimal() or not path:
            raise click.BadParameter(f"{value!r} is not of the form FD=PATH")
        inherit[int(number)] = path
    return inherit


@click.command("restore", epilog=_EXAMPLE)
@click.option(
    "--at", type=click.IntRange(min=0), metavar="N", help="Generation N instead of the newest."
)
@click.option("--detach", is_flag=True, help="Print the pid and return; do not wait for the end.")
@click.option(
    "--inherit",
    multiple=True,
    callback=_parse_inherit,
    metavar="FD=PATH",
    help="Open PATH as descriptor FD, instead of what the process had there.",
)
@click.option(
    "--allow-changed",
    multiple=True,
    metavar="PATH",
    help="Accept that the file PATH is not what it was.",
)
@json_option
@click.argument("image_dir")
def command(
    at: int | None,
    detach: bool,
    inherit: dict[int, str],
    allow_changed: tuple[str, ...],
    as_json: bool,
    image_dir: str,
) -> int:
    """Bring the process of IMAGE_DIR back, with its pid, and wait until it ends.

    The exit status is that of the process (128 and the signal's number if a signal ended it).
    """
    options = RestoreOptions(allow_changed=frozenset(allow_changed), inherit=inherit)
    result = restore(image_dir, at, options)
    for warning in result.warnings:
        note(warning)
    if as_json:
        emit_json(
            {
                "pid": result.pid,
                "generation": result.generation,
                "restore_ms": round(result.restore_ms, 3),
                "warnings": list(result.warnings),
            }
        )
    elif detach:
        say(str(result.pid))
    return 0 if detach else wait_for_end(result.pid)
