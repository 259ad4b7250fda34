"""`ckpt migrate`: move a running tree to another host."""

import click

from ckpt.cli.channel import TlsFiles, tls_options
from ckpt.cli.output import emit_json, json_option, note, say
from ckpt.migrate.source import MigrateOptions, MigrateResult, migrate
from ckpt.tracker.base import TrackerName
from ckpt.tracker.choose import AUTO

_EXAMPLE = """\b
Example:
  ckpt migrate --pid 4711 --to other:7000 --token-file token    'ckpt receive' printed the token
  ckpt migrate --pid 4711 --to ssh://root@other
"""


@click.command("migrate", epilog=_EXAMPLE)
@click.option(
    "--pid", type=click.IntRange(min=1), required=True, metavar="PID", help="The process to move."
)
@click.option(
    "--to",
    "destination",
    required=True,
    metavar="WHERE",
    help="HOST:PORT, where 'ckpt receive' waits; or ssh://USER@HOST, where it is started.",
)
@click.option("--token-file", metavar="FILE", help="The token of the receiver (mode 0600).")
@tls_options
@click.option(
    "--tcp-close",
    is_flag=True,
    help="Do not move TCP connections: they arrive as if their peers had reset them.",
)
@click.option(
    "--on-departure",
    metavar="COMMAND",
    default="",
    help="Run COMMAND when the tree stands still: to take its address from this host. Its packets"
    " are not held here afterwards.",
)
@click.option(
    "--tracker",
    type=click.Choice([AUTO, *(name.value for name in TrackerName)]),
    default=AUTO,
    show_default=True,
    help="How to learn which pages were written; auto takes the best that this kernel has.",
)
@json_option
def command(
    pid: int,
    destination: str,
    token_file: str | None,
    tls: TlsFiles,
    tcp_close: bool,
    on_departure: str,
    tracker: str,
    as_json: bool,
) -> None:
    """Move a process, with all its descendants, to another host.

    Its memory is sent while it runs; then it stands still for what was written meanwhile, and goes
    on there. Whatever fails before that, it goes on here.
    """
    from ckpt.engine.convergence import Budget
    from ckpt.migrate.destination import parse_destination
    from ckpt.migrate.dial import Dialer
    from ckpt.migrate.pairing import read_token

    trust = read_token(token_file) if token_file else tls.load()
    dialer = Dialer(parse_destination(destination), trust)
    options = MigrateOptions(tcp_close=tcp_close, tracker=tracker, on_departure=on_departure)
    result = migrate(pid, dialer, Budget(10.0), options, note)
    for warning in result.warnings:
        note(warning)
    if as_json:
        emit_json(_as_json(result))
    else:
        say(
            f"process {result.pid} runs at {destination}; it stood still for"
            f" {result.downtime_ms:.1f} ms, {result.sent_bytes / 1e6:.1f} MB were sent in"
            f" {len(result.rounds)} rounds"
        )


def _as_json(result: MigrateResult) -> dict[str, object]:
    return {
        "pid": result.pid,
        "downtime_ms": round(result.downtime_ms, 3),
        "wall_ms": round(result.wall_ms, 3),
        "sent_bytes": result.sent_bytes,
        "rounds": [{"pages": done.n_pages, "ms": round(done.ms, 3)} for done in result.rounds],
        "warnings": list(result.warnings),
    }
