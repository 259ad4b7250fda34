"""`ckpt show`: the generations of an image directory."""

import datetime
from pathlib import Path

import attrs
import click

from ckpt.cli.output import emit_json, json_option, say
from ckpt.engine.dump import count_pages
from ckpt.engine.records import decode_tree
from ckpt.errors import ImageCorrupt
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest
from ckpt.resources.registry import external_keys

_EXAMPLE = """\b
Example:
  ckpt show /var/ckpt/job           a table
  ckpt show --json /var/ckpt/job    all that is known of each generation
"""


@click.command("show", epilog=_EXAMPLE)
@json_option
@click.argument("image_dir")
def command(as_json: bool, image_dir: str) -> None:
    """List the generations of IMAGE_DIR, and the process that they are of."""
    chain = Chain.open(Path(image_dir))
    manifests = [chain.manifest(number) for number in chain.generations()]
    if as_json:
        rows = [
            _as_json(manifest) | {"external": _external_keys(chain, manifest)}
            for manifest in manifests
        ]
        emit_json({"chain": chain.chain_id, "generations": rows})
        return
    say(f"chain {chain.chain_id}")
    if not manifests:
        say("no generation yet")
        return
    newest = manifests[-1]
    say(
        f"process {newest.host.get('pid')} on {newest.host.get('hostname')}, Linux"
        f" {newest.host.get('kernel_release')}"
    )
    say(
        _ROW.format(
            "gen",
            "parent",
            "kind",
            "created",
            "data",
            "unchanged",
            "zero",
            "MB",
            "freeze ms",
            "tracker",
        )
    )
    for manifest in manifests:
        say(_describe(manifest))
    for key in _external_keys(chain, newest):
        say(f"led outside the tree: a restore needs --inherit '{key}=FD'")
    for manifest in manifests:
        if manifest.reason:
            say(f"generation {manifest.generation} is full: {manifest.reason}")


def _external_keys(chain: Chain, manifest: Manifest) -> list[str]:
    try:
        tree = decode_tree(manifest, str(chain.manifest_path(manifest.generation)))
    except ImageCorrupt:
        return []  # A restore says why; the table is right without.
    return external_keys(process.resources for process in tree.processes)


_ROW = "{:>4} {:>6} {:5} {:19} {:>9} {:>9} {:>9} {:>9} {:>9}  {}"


def _describe(manifest: Manifest) -> str:
    pages = count_pages(manifest)
    created = datetime.datetime.fromtimestamp(manifest.created_s).strftime("%Y-%m-%d %H:%M:%S")
    return _ROW.format(
        manifest.generation,
        manifest.parent.generation if manifest.parent else "-",
        manifest.kind,
        created,
        pages.data,
        pages.parent,
        pages.zero,
        f"{manifest.stored_bytes / 1e6:.2f}",
        f"{manifest.freeze_ms:.1f}",
        manifest.tracker,
    )


def _as_json(manifest: Manifest) -> dict[str, object]:
    return {
        "generation": manifest.generation,
        "parent": manifest.parent.generation if manifest.parent else None,
        "kind": str(manifest.kind),
        "tracker": manifest.tracker,
        "reason": manifest.reason,
        "created": manifest.created_s,
        "freeze_ms": round(manifest.freeze_ms, 3),
        "wall_ms": round(manifest.wall_ms, 3),
        "pages": attrs.asdict(count_pages(manifest)),
        "bytes": manifest.stored_bytes,
        "host": dict(manifest.host),
    }
