"""`ckpt prune`: keep some checkpoints of an image directory, by rules, and remove the others."""

from pathlib import Path

import click

from ckpt.cli.duration import parse_optional_duration
from ckpt.cli.keys import access_of, identity_option
from ckpt.cli.output import emit_json, json_option, list_numbers, say
from ckpt.image.chain import Chain
from ckpt.image.keys import PrivateKey
from ckpt.image.prune import PruneResult, Retention, prune

_EXAMPLE = """\b
Example:
  ckpt prune --keep-last 10 /var/ckpt/job
  ckpt prune --keep-last 10 --keep-every 1h --dry-run /var/ckpt/job
"""


@click.command("prune", epilog=_EXAMPLE)
@click.option(
    "--keep-last",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the N newest checkpoints.",
)
@click.option(
    "--keep-every",
    "keep_every_s",
    callback=parse_optional_duration,
    metavar="DURATION",
    help="Keep the newest checkpoint of each period of this length (90s, 15m, 1h, 7d), counted from"
    " 1970 in UTC.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@identity_option
@json_option
@click.argument("image_dir")
def command(
    keep_last: int | None,
    keep_every_s: float | None,
    dry_run: bool,
    private: tuple[PrivateKey, ...],
    as_json: bool,
    image_dir: str,
) -> None:
    """Remove the checkpoints of IMAGE_DIR that no rule keeps; the newest is always kept.

    What a kept one needs of one that goes is merged into it, so it is restored as before, and the
    next incremental dump is a delta as it would have been.
    """
    retention = Retention(keep_last, keep_every_s)
    result = prune(Chain.open(Path(image_dir), access_of(private)), retention, dry_run=dry_run)
    if as_json:
        emit_json(_as_json(result) | {"dry_run": dry_run})
        return
    for line in _describe(result, dry_run=dry_run):
        say(line)


def _as_json(result: PruneResult) -> dict[str, object]:
    plan = result.plan
    return {
        "kept": list(plan.kept),
        "removed": sorted(plan.removed),
        "merged": [{"generation": number, "parent": base} for number, base in plan.folds],
        "bytes_before": result.stored_before_bytes,
        "bytes_after": result.stored_after_bytes,
    }


def _describe(result: PruneResult, *, dry_run: bool) -> list[str]:
    plan = result.plan
    if not plan.removed:
        return [f"kept {list_numbers(plan.kept) or 'none'}; there is nothing to remove"]
    would = "would be " if dry_run else ""
    lines = [
        f"{would}kept {list_numbers(plan.kept)}",
        f"{would}removed {list_numbers(plan.removed)}",
    ]
    for number, base in plan.folds:
        now = "full" if base is None else f"a delta on {base}"
        lines.append(f"generation {number} {'would be' if dry_run else 'is now'} {now}")
    if result.stored_after_bytes is not None:
        before, after = result.stored_before_bytes, result.stored_after_bytes
        lines.append(f"pages took {before / 1e6:.2f} MB, now {after / 1e6:.2f} MB")
    return lines
