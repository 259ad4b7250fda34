"""`ckpt squash`: merge the checkpoints before one into it."""

from pathlib import Path

import attrs
import click

from ckpt.cli.keys import access_of, identity_option
from ckpt.cli.output import emit_json, json_option, list_numbers, say
from ckpt.image.chain import Chain
from ckpt.image.keys import PrivateKey
from ckpt.image.squash import SquashResult, squash
from ckpt.units import GenerationNo

_EXAMPLE = """\b
Example:
  ckpt squash /var/ckpt/job           only the newest is left, and it is full
  ckpt squash --to 7 /var/ckpt/job    7 becomes full; those after it stay as they are
"""


@click.command("squash", epilog=_EXAMPLE)
@click.option(
    "--to",
    type=click.IntRange(min=0),
    metavar="N",
    help="Merge into this checkpoint; the newest if not given.",
)
@identity_option
@json_option
@click.argument("image_dir")
def command(to: int | None, private: tuple[PrivateKey, ...], as_json: bool, image_dir: str) -> None:
    """Merge a checkpoint of IMAGE_DIR and all that it is based on into one full checkpoint.

    It keeps its number, and is restored as before. Checkpoints that were merged are removed, but
    those that others are based on. Deltas on it stay, and so does what the next incremental dump
    goes by. The process is not needed, and not touched.
    """
    result = squash(
        Chain.open(Path(image_dir), access_of(private)), None if to is None else GenerationNo(to)
    )
    if as_json:
        emit_json(attrs.asdict(result))
    else:
        say(_describe(result, image_dir))


def _describe(result: SquashResult, image_dir: str) -> str:
    if not result.merged:
        return f"generation {result.generation} in {image_dir} is full already"
    removed = f"; removed {list_numbers(result.removed)}" if result.removed else ""
    kept = f"; others need {list_numbers(result.kept)}" if result.kept else ""
    return (
        f"generation {result.generation} in {image_dir} is full now"
        f" ({result.stored_bytes / 1e6:.2f} MB){removed}{kept}"
    )
