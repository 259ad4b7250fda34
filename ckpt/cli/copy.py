"""`ckpt copy`: a chain into object storage, out of it, or into another directory."""

import click

from ckpt.cli.output import emit_json, json_option, list_numbers, progress, say
from ckpt.cli.stores import copy
from ckpt.image.copying import CopyResult
from ckpt.units import GenerationNo

_EXAMPLE = """\b
Example:
  ckpt copy /var/ckpt/job s3://backups/job           again and again: only what is new is sent
  ckpt copy s3://backups/job /var/ckpt/job-again     all of it
  ckpt copy --at 7 s3://backups/job /tmp/seventh     7 and what it is based on
"""


@click.command("copy", epilog=_EXAMPLE)
@click.option(
    "--at",
    type=click.IntRange(min=0),
    metavar="N",
    help="Only generation N and what it is based on; all if not given.",
)
@json_option
@click.argument("source", metavar="DIR|URL")
@click.argument("target", metavar="URL|DIR")
def command(at: int | None, as_json: bool, source: str, target: str) -> None:
    """Copy checkpoints of the first place to the second, where only what is missing is written.

    A URL is s3://BUCKET/NAME or gs://BUCKET/NAME, and takes the package of that store: pip install
    'ckpt[s3]' or 'ckpt[gs]'. Keys are found where the tools of the store have them. What was
    interrupted goes on with the same command.

    All is compared when it has arrived: what is sent is read back, and what is fetched is checked
    as 'ckpt verify' does, before it counts. Nothing is removed in either place. Encrypted
    checkpoints are copied as they are, without a key. What is fetched belongs to you then, and
    'ckpt restore' takes it for yours: fetch only what you trust.
    """
    with progress() as report:
        result = copy(source, target, None if at is None else GenerationNo(at), report)
    if as_json:
        emit_json(
            {
                "chain": result.chain_id,
                "copied": list(result.copied),
                "replaced": list(result.replaced),
                "present": list(result.present),
                "bytes_copied": result.copied_bytes,
                "bytes_kept": result.kept_bytes,
            }
        )
    else:
        say(_describe(result, target))


def _describe(result: CopyResult, target: str) -> str:
    if not result.copied and not result.replaced:
        there = list_numbers(result.present)
        return f"nothing is new: {target} has {there or 'no generation, and neither has the first'}"
    replaced = list_numbers(result.replaced)
    kept = f", and {result.kept_bytes / 1e6:.2f} MB were there" if result.kept_bytes else ""
    parts = [
        f"copied generation {list_numbers(result.copied)}" if result.copied else "",
        f"replaced {replaced}, merged since" if replaced else "",
    ]
    what = "; ".join(part for part in parts if part)
    return f"{what}: {target} ({result.copied_bytes / 1e6:.2f} MB{kept})"
