"""`ckpt report`: a chain as a page to look at."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from ckpt.cli.keys import access_of, identity_option
from ckpt.cli.lost import warn_of_loss
from ckpt.cli.output import emit_json, json_option, say
from ckpt.cli.replacing import replace_file, require_place
from ckpt.engine.history import LEVELS, History, Life, Row, read_history
from ckpt.errors import HostFull
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest
from ckpt.image.keys import PrivateKey
from ckpt.image.runs import Fate

MAX_ROWS = 1000
"""Mappings that are told, those of which most was written; a browser draws no more with ease."""

_EXAMPLE = """\b
Example:
  ckpt report /var/ckpt/job -o report.html
  ckpt report --last 50 /var/ckpt/job -o report.html
"""


@click.command("report", epilog=_EXAMPLE)
@click.option(
    "-o", "--output", required=True, metavar="FILE", help="The page to write; it is replaced."
)
@click.option(
    "--last",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    metavar="N",
    help="How many of the newest generations to show.",
)
@identity_option
@json_option
@click.argument("image_dir")
def command(
    output: str, last: int, private: tuple[PrivateKey, ...], as_json: bool, image_dir: str
) -> None:
    """Write a page about the generations of IMAGE_DIR, to be opened in a browser.

    It shows what each checkpoint took in space and time, and which memory was written between
    them. The page is one file and asks no network for anything. It names files, processes and
    addresses, and has no content of memory.
    """
    require_place("--output", output)
    chain = Chain.open(Path(image_dir), access_of(private))
    warn_of_loss(chain)
    numbers = chain.generations()
    history = read_history(chain, numbers[-last:])
    page = make_page(_facts(chain, history, len(numbers) - len(history.manifests)))
    try:
        replace_file(output, page)
    except OSError as error:
        raise HostFull(
            what=f"cannot write {output} ({error.strerror})", remedy="choose another place"
        ) from error
    n_bytes = len(page.encode())
    if as_json:
        emit_json({"output": output, "generations": len(history.manifests), "page_bytes": n_bytes})
    else:
        say(f"{len(history.manifests)} generations are shown in {output} ({n_bytes / 1e3:.0f} kB)")


def make_page(facts: dict[str, object]) -> str:
    """Return the page that shows `facts`; whatever is in them is text, and never markup."""
    from importlib import resources

    template = resources.files("ckpt.cli").joinpath("report.html").read_text("utf-8")
    title = f"ckpt report: {facts['directory']}"
    filled = {
        "policy": _policy(template),
        "title": html.escape(printable(title)),
        "facts": _embed(facts),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], template)


def _policy(template: str) -> str:
    """Return a content security policy that lets nothing run but the template's own script."""
    hashes = {}
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        hashes[tag] = f"{tag}-src 'sha256-{digest}'"
    return f"default-src 'none'; base-uri 'none'; form-action 'none'; {'; '.join(hashes.values())}"


def _embed(facts: dict[str, object]) -> str:
    """Return JSON that can stand inside a script element: nothing in it ends that."""
    text = json.dumps(facts, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def printable(name: str) -> str:
    """Return a name whose bytes may be no UTF-8 as text that is."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _facts(chain: Chain, history: History, n_older: int) -> dict[str, object]:
    rows = _most_written(history.rows)
    host = history.manifests[-1].host if history.manifests else {}
    return {
        "directory": printable(str(chain.path)),
        "chain": chain.chain_id,
        "older": n_older,
        "host": {key: printable(str(host[key])) for key in _HOST_FACTS if key in host},
        "generations": [
            _generation(manifest, totals)
            for manifest, totals in zip(history.manifests, history.totals, strict=True)
        ],
        "processes": [_process(life) for life in history.lives],
        "rows": [_row(row) for row in rows],
        "rows_left_out": len(history.rows) - len(rows),
        "levels": LEVELS,
    }


_HOST_FACTS = ("pid", "hostname", "kernel_release", "machine")


def _most_written(rows: Iterable[Row]) -> list[Row]:
    """Return at most `MAX_ROWS`, in their order."""
    rows = list(rows)
    by_amount = sorted(range(len(rows)), key=lambda index: -rows[index].written_pages)
    return [rows[index] for index in sorted(by_amount[:MAX_ROWS])]


def _generation(manifest: Manifest, totals: Mapping[Fate, int]) -> dict[str, object]:
    return {
        "number": manifest.generation,
        "parent": manifest.parent.generation if manifest.parent else None,
        "kind": str(manifest.kind),
        "created_s": manifest.created_s,
        "freeze_ms": manifest.freeze_ms,
        "wall_ms": manifest.wall_ms,
        "bytes": manifest.stored_bytes,
        "page_bytes": manifest.page_size,
        "stored": totals[Fate.DATA],
        "unchanged": totals[Fate.PARENT],
        "empty": totals[Fate.ZERO] + totals[Fate.FILE],
        "tracker": printable(manifest.tracker),
        "reason": printable(manifest.reason),
    }


def _process(life: Life) -> dict[str, object]:
    return {
        "pid": life.pid,
        "parent": life.parent,
        "name": printable(life.name),
        "exe": printable(life.exe),
        "threads": life.n_threads,
        "fds": life.n_fds,
        "mapped_bytes": life.mapped_bytes,
        "first": life.first,
        "last": life.last,
    }


def _row(row: Row) -> dict[str, object]:
    return {
        "owner": row.owner,
        "name": printable(row.name),
        "protection": row.protection,
        # JSON numbers lose what is above 2 ** 53.
        "start": f"{row.start:x}",
        "end": f"{row.end:x}",
        "sizes": row.sizes,
        "written": {index: (one.n_pages, one.bins) for index, one in row.written.items()},
    }
