"""`ckpt migrate`: move a running tree to another host."""

import sys

import click

from ckpt.cli.capturing import ghost_limit_option, pid_option, tracker_option
from ckpt.cli.metrics import Metrics, metrics_option
from ckpt.cli.output import emit_json, json_option, note, say
from ckpt.cli.peers import dial_options, make_dialer, read_certificates
from ckpt.errors import UsageError
from ckpt.image.pipeline import PRESSED_LEVEL, Compression
from ckpt.migrate.policy import DEFAULT_MAX_DOWNTIME_MS, DEFAULT_MAX_ROUNDS, Decision, Goal
from ckpt.migrate.source import MigrateOptions, MigrateResult, migrate

_LOWEST_LEVEL, _HIGHEST_LEVEL = -7, 19
_EXAMPLE = """\b
Example:
  ckpt migrate --pid 4711 --to other:7000 --token-file token    'ckpt receive' printed the token
  ckpt migrate --pid 4711 --to ssh://root@other
"""


def _parse_compress(_ctx: click.Context, _param: click.Parameter, value: str) -> Compression:
    if value == "auto":
        return Compression(pressed_level=PRESSED_LEVEL)
    if value == "off":
        return Compression(level=None)
    if not value.lstrip("-").isdecimal() or not _LOWEST_LEVEL <= int(value) <= _HIGHEST_LEVEL:
        raise click.BadParameter(
            f"{value!r} is neither auto, off, nor a level of zstd"
            f" ({_LOWEST_LEVEL} to {_HIGHEST_LEVEL})"
        )
    return Compression(level=int(value))


@click.command("migrate", epilog=_EXAMPLE)
@pid_option("The process to move.")
@dial_options
@click.option(
    "--tcp-close",
    is_flag=True,
    help="Do not move TCP connections: they arrive as if their peers had reset them.",
)
@click.option(
    "--with-file",
    "with_files",
    multiple=True,
    metavar="PATH",
    help="Send the file PATH along, which the tree needs and the destination lacks. Another file"
    " that is there is not overwritten. May be given several times.",
)
@click.option(
    "--on-departure",
    metavar="COMMAND",
    default="",
    help="Run COMMAND when the tree stands still: to take its address from this host. Its packets"
    " are not held here afterwards.",
)
@click.option(
    "--on-return",
    metavar="COMMAND",
    default="",
    help="Run COMMAND when --on-departure has begun and the tree goes on here after all: to undo"
    " it.",
)
@click.option(
    "--max-downtime",
    "max_downtime_ms",
    type=click.FloatRange(min=1),
    default=DEFAULT_MAX_DOWNTIME_MS,
    show_default=True,
    metavar="MS",
    help="For how long the tree may stand still. While more is expected, rounds go on; if they do"
    " not help, nothing is moved, and it is said what would help.",
)
@click.option(
    "--max-rounds",
    type=click.IntRange(min=1),
    default=DEFAULT_MAX_ROUNDS,
    show_default=True,
    metavar="N",
    help="How often memory may be sent.",
)
@click.option(
    "--throttle",
    is_flag=True,
    help="Slow the tree by short stops if it writes faster than it can be sent.",
)
@click.option(
    "--lazy",
    is_flag=True,
    help="Let the tree run there at once; its memory is fetched when it is touched, the rest in the"
    " background. It stands still for the same time whatever it has of that, but is lost if either"
    " host is before all has come. Without rounds.",
)
@click.option(
    "--compress",
    default="auto",
    show_default=True,
    metavar="LEVEL",
    callback=_parse_compress,
    help="Compress memory: auto (as much as the link leaves time for), off, or a level of zstd.",
)
@tracker_option
@ghost_limit_option
@metrics_option
@json_option
def command(
    pid: int,
    to: str,
    token_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    tls_ca: str | None,
    bandwidth: str | None,
    remote_ckpt: str,
    tcp_close: bool,
    with_files: tuple[str, ...],
    on_departure: str,
    on_return: str,
    max_downtime_ms: float,
    max_rounds: int,
    throttle: bool,
    lazy: bool,
    compress: Compression,
    tracker: str,
    ghost_limit_bytes: int,
    metrics: Metrics,
    as_json: bool,
) -> None:
    """Move a process, with all its descendants, to another host.

    Its memory is sent while it runs; then it stands still for what was written meanwhile, and goes
    on there. Whatever fails before that, it goes on here. If the destination falls silent when it
    was told to let it go, the tree stands still until it is known where it runs; Ctrl-C ends that,
    and it goes on here.
    """
    if lazy and throttle:
        raise UsageError("--throttle is of use in rounds only, and with --lazy there are none")
    certificates = read_certificates(tls_cert, tls_key, tls_ca)
    dialer = make_dialer(to, token_file, certificates, bandwidth, remote_ckpt)
    options = MigrateOptions(
        tcp_close=tcp_close,
        tracker=tracker,
        lazy=lazy,
        with_files=with_files,
        on_departure=on_departure,
        on_return=on_return,
        ghost_limit_bytes=ghost_limit_bytes,
        goal=Goal(max_downtime_ms, max_rounds, throttle),
        compression=compress,
    )
    tell_round = _tell_round_as_json if as_json else _tell_round
    with metrics.of(command="migrate", to=to) as figures:
        result = migrate(pid, dialer, options, tell=note, tell_round=tell_round)
        figures |= {
            "freeze_seconds": result.downtime_ms / 1000,
            "wall_seconds": result.wall_ms / 1000,
            "bytes": result.sent_bytes,
            "pages": sum(done.n_pages for done in result.rounds),
        }
    for warning in result.warnings:
        note(warning)
    if as_json:
        emit_json(_as_json(result))
    else:
        say(
            f"process {result.pid} runs at {to}; it stood still for"
            f" {result.downtime_ms:.1f} ms, {result.sent_bytes / 1e6:.1f} MB were sent in"
            f" {len(result.rounds)} rounds"
            + (f", {result.fetched_bytes / 1e6:.1f} MB of memory later" if lazy else "")
        )


def _tell_round(decision: Decision) -> None:
    note(decision.sentence)


def _tell_round_as_json(decision: Decision) -> None:
    emit_json(
        {
            "progress": decision.sentence,
            "expected_downtime_ms": round(decision.downtime_ms, 3),
            "next": decision.verdict.name.lower(),
            "throttle": decision.throttle,
        }
    )
    sys.stdout.flush()


def _as_json(result: MigrateResult) -> dict[str, object]:
    return {
        "pid": result.pid,
        "downtime_ms": round(result.downtime_ms, 3),
        "expected_downtime_ms": round(result.expected_ms, 3),
        "wall_ms": round(result.wall_ms, 3),
        "sent_bytes": result.sent_bytes,
        "rounds": [{"pages": done.n_pages, "ms": round(done.ms, 3)} for done in result.rounds],
        "ahead_bytes": result.ahead_bytes,
        "late_bytes": result.late_bytes,
        "fetched_bytes": result.fetched_bytes,
        "warnings": list(result.warnings),
    }
