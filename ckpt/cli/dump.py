"""`ckpt dump`: add a checkpoint of a running process to an image directory."""

import functools
import os

import attrs
import click

from ckpt.cli.capturing import ghost_limit_option, pid_option, tracker_option
from ckpt.cli.duration import parse_optional_duration
from ckpt.cli.keys import access_of, encrypt_to_option, identity_option
from ckpt.cli.metrics import Metrics, metrics_option
from ckpt.cli.names import parse_external
from ckpt.cli.output import emit_json, json_option, note, say
from ckpt.engine.convergence import DEFAULT_BUDGET_MS
from ckpt.engine.dump import DumpOptions, DumpResult, dump
from ckpt.errors import DumpTimeout
from ckpt.image.keys import PrivateKey, Recipient

_EXAMPLE = """\b
Example:
  ckpt dump --pid 4711 /var/ckpt/job                  all of its memory
  ckpt dump --pid 4711 --incremental /var/ckpt/job    what was written since
  ckpt dump --pid 4711 --incremental --kill /var/ckpt/job
"""


@click.command("dump", epilog=_EXAMPLE)
@pid_option("The process to checkpoint.")
@click.option(
    "--incremental",
    is_flag=True,
    help="Store only the pages written since the last checkpoint into IMAGE_DIR. Where that would"
    " not be right, store all, and say why.",
)
@click.option(
    "--kill",
    is_flag=True,
    help="End the process when its checkpoint is on disk; until then it stands still.",
)
@click.option(
    "--tcp-close",
    is_flag=True,
    help="Do not keep TCP connections: they come back as if their peers had reset them. (Otherwise"
    " they go on, and with --kill their packets are held until the restore.)",
)
@tracker_option
@click.option(
    "--max-freeze",
    "max_freeze_ms",
    type=click.FloatRange(min=0),
    default=DEFAULT_BUDGET_MS,
    show_default=True,
    metavar="MS",
    help="How long copying may take while the process stands still. Memory is copied while it runs,"
    " again and again, until the rest fits; where it does not shrink, that is said.",
)
@click.option(
    "--timeout",
    "timeout_s",
    callback=parse_optional_duration,
    metavar="TIME",
    help="Give up if the checkpoint is not on disk after TIME (500ms, 30s, 5m): the process goes on"
    " as it was, and the chain is as it was.",
)
@ghost_limit_option
@click.option(
    "--external",
    multiple=True,
    callback=parse_external,
    metavar="KEY",
    help="Accept that KEY leads outside the tree, and will be given to the restore (--inherit); may"
    " be repeated. KEY is what /proc/PID/fd shows (pipe:[4711], socket:[4711], /dev/pts/3), or auto"
    " for all pipes, unix sockets and terminals that lead there.",
)
@click.option(
    "--on-departure",
    metavar="COMMAND",
    default="",
    help="With --kill: run COMMAND when everything is on disk and the process stands still, to take"
    " its address from this host. Its packets are not held here afterwards: it goes elsewhere.",
)
@metrics_option
@encrypt_to_option
@identity_option
@json_option
@click.argument("image_dir")
def command(
    pid: int,
    incremental: bool,
    kill: bool,
    tcp_close: bool,
    tracker: str,
    max_freeze_ms: float,
    timeout_s: float | None,
    ghost_limit_bytes: int,
    external: tuple[str, ...],
    on_departure: str,
    metrics: Metrics,
    encrypt_to: tuple[Recipient, ...],
    private: tuple[PrivateKey, ...],
    as_json: bool,
    image_dir: str,
) -> None:
    """Add a checkpoint of a running process to IMAGE_DIR, which is made if it does not exist.

    Its memory is copied while it runs; then it stands still for what was written meanwhile, and
    goes on, unless --kill is given.
    """
    options = DumpOptions(
        incremental=incremental,
        kill=kill,
        tcp_close=tcp_close,
        tracker=tracker,
        max_freeze_ms=max_freeze_ms,
        timeout_s=timeout_s,
        if_stuck=functools.partial(_end_at_once, as_json=as_json),
        ghost_limit_bytes=ghost_limit_bytes,
        external=external,
        on_departure=on_departure,
        encrypt_to=encrypt_to,
        access=access_of(private),
    )
    with metrics.of(command="dump", image_dir=os.path.abspath(image_dir)) as figures:
        result = dump(pid, image_dir, options)
        figures |= {
            "freeze_seconds": result.freeze_ms / 1000,
            "wall_seconds": result.wall_ms / 1000,
            "bytes": result.stored_bytes,
            "pages": result.pages.data,
            "generation": result.generation,
        }
    if incremental and result.reason:
        note(f"full checkpoint: {result.reason}")
    for warning in result.warnings:
        note(warning)
    if as_json:
        emit_json(_as_json(result))
    else:
        say(_describe(result, image_dir))


def _end_at_once(error: DumpTimeout, *, as_json: bool) -> None:
    """Tell it and end, where the way out leads through a call that does not return."""
    try:
        note(error.message(), "error")
        if as_json:
            emit_json({"error": error.as_plain()})
    finally:
        os._exit(error.exit_code)


def _as_json(result: DumpResult) -> dict[str, object]:
    return {
        "generation": result.generation,
        "kind": str(result.kind),
        "tracker": result.tracker,
        "reason": result.reason,
        "freeze_ms": round(result.freeze_ms, 3),
        "wall_ms": round(result.wall_ms, 3),
        "rounds": [{"pages": done.n_pages, "ms": round(done.ms, 3)} for done in result.rounds],
        "pages": attrs.asdict(result.pages),
        "bytes": result.stored_bytes,
        "warnings": list(result.warnings),
    }


def _describe(result: DumpResult, image_dir: str) -> str:
    pages = result.pages
    return (
        f"generation {result.generation} ({result.kind}) in {image_dir}: {pages.data} pages stored"
        f" in {result.stored_bytes / 1e6:.2f} MB, {pages.parent} unchanged; the process stood still"
        f" for {result.freeze_ms:.1f} ms (tracker {result.tracker})"
    )
