"""`ckpt run`: start a command under protection, and bring it back by the same line."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from ckpt.cli.duration import parse_duration, parse_optional_duration
from ckpt.cli.keys import access_of, encrypt_to_option, identity_option
from ckpt.cli.metrics import Metrics, metrics_of_each_option
from ckpt.cli.names import Inherit, parse_external, parse_inherit
from ckpt.cli.output import json_option, note
from ckpt.errors import CkptError, UsageError
from ckpt.image.keys import PrivateKey, Recipient

if TYPE_CHECKING:
    from ckpt.engine.supervising import Event

_EXAMPLE = """\b
Example:
  ckpt run /var/ckpt/job -- ./simulate --steps 1000000
  ckpt run --every 5m --checkpoint-on SIGUSR1 /var/ckpt/job -- ./simulate
  ckpt run --again /var/ckpt/job -- ./simulate            from the beginning
  ckpt run --encrypt-to ckpt1... --identity /root/ckpt.key /var/ckpt/job -- ./simulate
"""

_NOT_FOR_CHECKPOINTS = frozenset(
    {
        signal.SIGKILL,
        signal.SIGSTOP,
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGCHLD,
        *(signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP),
    }
)


_MEASURED = {
    "checkpoint": {
        "generation": ("generation", 1),
        "freeze_ms": ("freeze_seconds", 1e-3),
        "wall_ms": ("wall_seconds", 1e-3),
        "bytes": ("bytes", 1),
        "pages": ("pages", 1),
    },
    "restored": {"generation": ("generation", 1), "restore_ms": ("wall_seconds", 1e-3)},
    "checkpoint-failed": {},
}
"""Events that are measured, and what of each becomes which metric; none: it is a failure."""


def _parse_signals(
    _ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]
) -> frozenset[int]:
    """Return their numbers; see `click.Option.callback`."""
    names = {number.name: number for number in signal.Signals}
    numbers = set()
    for value in values:
        name = value.upper() if value.upper().startswith("SIG") else f"SIG{value.upper()}"
        if name not in names or names[name] in _NOT_FOR_CHECKPOINTS:
            raise click.BadParameter(f"{value!r} is no signal that can be used for this")
        numbers.add(int(names[name]))
    return frozenset(numbers)


@click.command("run", epilog=_EXAMPLE, context_settings={"allow_interspersed_args": False})
@click.option(
    "--every",
    "every_s",
    default="30s",
    show_default=True,
    callback=parse_duration,
    metavar="TIME",
    help="How often a checkpoint is taken: 500ms, 30s, 5m, 1h.",
)
@click.option(
    "--timeout",
    "timeout_s",
    callback=parse_optional_duration,
    metavar="TIME",
    help="Give a checkpoint up that is not on disk after TIME, and try again when the next is due;"
    " the last one, when this command is told to stop, takes as long as it takes.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="How many checkpoints are kept (10, if nothing is said): older ones are removed when there"
    " is a new one, as by ckpt prune.",
)
@click.option("--keep-all", is_flag=True, help="Remove none.")
@click.option(
    "--checkpoint-on",
    multiple=True,
    callback=_parse_signals,
    metavar="SIGNAL",
    help="Take a checkpoint at once when this command gets SIGNAL (SIGUSR1, say: a notice that the"
    " machine will be taken away); may be repeated.",
)
@click.option(
    "--restart",
    type=click.Choice(["no", "on-failure"]),
    default="no",
    show_default=True,
    help="When COMMAND is killed, or ends with a status other than 0: end with it, or bring it back"
    " from its newest checkpoint, up to five times without a new one.",
)
@click.option(
    "--again",
    is_flag=True,
    help="Start COMMAND over, whatever IMAGE_DIR has of it.",
)
@click.option(
    "--new-pids",
    is_flag=True,
    help="Bring it back in a pid namespace of its own: its pids may be taken here. (After a reboot"
    " that is done where they are.)",
)
@click.option(
    "--external",
    multiple=True,
    callback=parse_external,
    metavar="KEY",
    help="Accept that KEY, or auto, leads outside the tree (see ckpt dump); may be repeated.",
)
@click.option(
    "--inherit",
    multiple=True,
    callback=parse_inherit,
    metavar="FD=PATH|KEY=FD",
    help="When it is brought back, put this in the place of what was there (see ckpt restore); may"
    " be repeated.",
)
@click.option(
    "--allow-changed",
    multiple=True,
    metavar="PATH",
    help="When it is brought back, accept that the file PATH has changed; may be repeated.",
)
@click.option(
    "--tcp-close",
    is_flag=True,
    help="Do not keep TCP connections: they come back as if their peers had reset them.",
)
@click.option(
    "--trust-image",
    is_flag=True,
    help="Take an IMAGE_DIR that another user owns or can write to: what is brought back runs what"
    " he put there, with the rights that he put there.",
)
@metrics_of_each_option
@encrypt_to_option
@identity_option
@json_option
@click.argument("image_dir")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    every_s: float,
    timeout_s: float | None,
    keep: int | None,
    keep_all: bool,
    checkpoint_on: frozenset[int],
    restart: str,
    again: bool,
    new_pids: bool,
    external: tuple[str, ...],
    inherit: Inherit,
    allow_changed: tuple[str, ...],
    tcp_close: bool,
    trust_image: bool,
    metrics: Metrics,
    encrypt_to: tuple[Recipient, ...],
    private: tuple[PrivateKey, ...],
    as_json: bool,
    image_dir: str,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND with regular checkpoints into IMAGE_DIR; the same line brings it back.

    Whatever ends it before it is done (a kill, a crash, a reboot), this line, given again, lets it
    go on from its newest checkpoint that is whole. SIGTERM, SIGINT and the end of the terminal take
    a last checkpoint, end it, and end this command with 75; a second one ends both at once. When
    COMMAND ends by itself, its exit status is that of this command, and it is not run again if that
    is 0. To bring back what is encrypted takes --identity; to take checkpoints does not. With
    --json, each event is an object on a line of its own on standard output.
    """
    words = command[1:] if command[0] == "--" else command
    if not words or (words is command and command[0].startswith("-")):
        raise UsageError(
            "the command goes behind IMAGE_DIR and --, options before them (see ckpt run --help)"
        )
    if keep_all and keep is not None:
        raise UsageError("--keep and --keep-all exclude each other (see ckpt run --help)")
    from ckpt.engine.dump import DumpOptions
    from ckpt.engine.protection import DEFAULT_KEEP, RunOptions
    from ckpt.engine.supervising import run
    from ckpt.resources.base import RestoreOptions

    options = RunOptions(
        every_s=every_s,
        keep_last=None if keep_all else keep or DEFAULT_KEEP,
        checkpoint_on=checkpoint_on,
        restart_on_failure=restart == "on-failure",
        again=again,
        dumping=DumpOptions(
            timeout_s=timeout_s,
            tcp_close=tcp_close,
            external=external,
            encrypt_to=encrypt_to,
            access=access_of(private),
        ),
        restoring=RestoreOptions(
            allow_changed=frozenset(allow_changed),
            inherit=inherit.by_number,
            external=inherit.by_name,
            tcp_close=tcp_close,
            no_cgroups=True,
            new_pids=new_pids,
        ),
        access=access_of(private, trusts_anybody=trust_image),
    )
    labels = {"command": "run", "image_dir": os.path.abspath(image_dir)}
    tell = _measuring(_tell_as_json if as_json else _tell, metrics, labels)
    try:
        return run(image_dir, words, options, tell)
    except CkptError:
        metrics.write({}, labels, success=False)
        raise


def _measuring(
    tell: "Callable[[Event], None]", metrics: Metrics, labels: dict[str, str]
) -> "Callable[[Event], None]":
    """Return what also writes the metrics, where there is something to write."""

    def tell_and_measure(event: "Event") -> None:
        measured = _MEASURED.get(event.name)
        if measured is not None:
            figures = {
                name: float(str(event.facts[fact])) * scale
                for fact, (name, scale) in measured.items()
            }
            # See `_tell`.
            with contextlib.suppress(OSError):
                metrics.write(figures, labels, success=bool(figures))
        tell(event)

    return tell_and_measure


def _tell(event: "Event") -> None:
    for sentence in event.sentences:
        # A terminal that was closed must not end what is protected.
        with contextlib.suppress(OSError):
            note(sentence)


def _tell_as_json(event: "Event") -> None:
    import json

    _tell(event)
    line = json.dumps({"event": event.name, **event.facts}) + "\n"
    # Nor must one who reads no more, or a full disk; and what is brought back needs our stdout.
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), line.encode())
