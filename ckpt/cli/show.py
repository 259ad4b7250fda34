"""`ckpt show`: the generations of an image directory, and what is in one of them."""

import datetime

import attrs
import click

from ckpt.cli.keys import access_of, identity_option
from ckpt.cli.lost import warn_of_loss
from ckpt.cli.output import emit_json, json_option, say
from ckpt.cli.stores import open_image
from ckpt.engine.dump import count_pages
from ckpt.engine.records import decode_tree
from ckpt.errors import ImageCorrupt
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest
from ckpt.image.keys import PrivateKey
from ckpt.resources.registry import external_keys

_EXAMPLE = """\b
Example:
  ckpt show /var/ckpt/job                 a table of its checkpoints
  ckpt show --at 3 /var/ckpt/job          the processes of one, as ps shows them
  ckpt show --maps --files /var/ckpt/job  of the newest, also as pmap and lsof do
  ckpt show --json /var/ckpt/job          all that is known of each checkpoint
"""


@click.command("show", epilog=_EXAMPLE)
@click.option(
    "--at",
    type=click.IntRange(min=0),
    metavar="N",
    help="Show the processes of generation N: their places, threads, sizes, commands.",
)
@click.option("--maps", is_flag=True, help="Also their mappings, with what of each is stored.")
@click.option("--files", is_flag=True, help="Also their open files.")
@click.option(
    "--pid", type=click.IntRange(min=1), metavar="PID", help="Only this process of the tree."
)
@identity_option
@json_option
@click.argument("image_dir")
def command(
    at: int | None,
    maps: bool,
    files: bool,
    pid: int | None,
    private: tuple[PrivateKey, ...],
    as_json: bool,
    image_dir: str,
) -> None:
    """List the checkpoints of IMAGE_DIR, or what is in one of them. Nothing is started.

    With any of the options but --json: one generation, the newest if --at is not given.
    """
    chain = open_image(image_dir, access_of(private))
    if at is None:
        warn_of_loss(chain)
    if at is not None or pid is not None or maps or files:
        _show_one(chain, at, pid, _Wanted(maps=maps, files=files, as_json=as_json))
    else:
        _show_all(chain, as_json=as_json)


@attrs.frozen
class _Wanted:
    maps: bool
    files: bool
    as_json: bool


def _show_one(chain: Chain, at: int | None, pid: int | None, wanted: _Wanted) -> None:
    # Loaded for one generation only: the table needs none of it.
    from ckpt.cli import processes as shown
    from ckpt.engine.examining import examine
    from ckpt.engine.portrait import portray_all

    examined = examine(chain, at)
    manifest = examined.reader.manifest
    processes = portray_all(examined, pid)
    zombies = examined.tree.zombies if pid is None else ()
    if wanted.as_json:
        emit_json(
            {
                "chain": chain.chain_id,
                "page_size": manifest.page_size,
                "generation": _as_json(manifest)
                | {"external": external_keys(one.resources for one in examined.tree.processes)},
                "processes": list(shown.processes_as_json(processes)),
                "zombies": [attrs.asdict(zombie) for zombie in zombies],
            }
        )
        return
    say(_HEADINGS)
    say(_describe(manifest))
    say()
    shown.say_processes(processes, zombies, manifest.page_size)
    for process in processes:
        if wanted.maps:
            say()
            shown.say_mappings(process, manifest.page_size)
        if wanted.files:
            say()
            shown.say_files(process)


def _show_all(chain: Chain, *, as_json: bool) -> None:
    manifests = [chain.manifest(number) for number in chain.generations()]
    if as_json:
        rows = [
            _as_json(manifest) | {"external": _external_keys(chain, manifest)}
            for manifest in manifests
        ]
        recipients = [str(recipient) for recipient in chain.recipients]
        emit_json({"chain": chain.chain_id, "encrypted_to": recipients, "generations": rows})
        return
    say(f"chain {chain.chain_id}")
    for recipient in chain.recipients:
        say(f"encrypted to {recipient}")
    if not manifests:
        say("no generation yet")
        return
    newest = manifests[-1]
    if newest.is_locked:
        say("whose process it is takes --identity to know")
    else:
        say(
            f"process {newest.host.get('pid')} on {newest.host.get('hostname')}, Linux"
            f" {newest.host.get('kernel_release')}"
        )
    say(_HEADINGS)
    for manifest in manifests:
        say(_describe(manifest))
    for key in _external_keys(chain, newest):
        say(f"led outside the tree: a restore needs --inherit '{key}=FD'")
    for manifest in manifests:
        if manifest.reason:
            say(f"generation {manifest.generation} is full: {manifest.reason}")


def _external_keys(chain: Chain, manifest: Manifest) -> list[str]:
    if manifest.is_locked:
        return []
    try:
        tree = decode_tree(manifest, str(chain.manifest_path(manifest.generation)))
    except ImageCorrupt:
        return []  # A restore says why; the table is right without.
    return external_keys(process.resources for process in tree.processes)


_ROW = "{:>4} {:>6} {:5} {:19} {:>9} {:>9} {:>9} {:>9} {:>9}  {}"
_HEADINGS = _ROW.format(
    *("gen", "parent", "kind", "created", "data", "unchanged", "zero", "MB", "freeze ms"), "tracker"
)


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
        "host": None if manifest.is_locked else dict(manifest.host),
    }
