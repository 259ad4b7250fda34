"""`ckpt restore`: bring the process of an image directory back."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import click

from ckpt.cli.keys import access_of, identity_option
from ckpt.cli.metrics import Metrics, metrics_option
from ckpt.cli.names import Inherit, parse_inherit
from ckpt.cli.output import emit_json, json_option, note, say
from ckpt.cli.stores import local_image
from ckpt.errors import UsageError
from ckpt.image.access import Access
from ckpt.image.ahead import Ahead
from ckpt.image.chain import Chain
from ckpt.image.keys import PrivateKey
from ckpt.image.objects import parse_place
from ckpt.units import GenerationNo

_EXAMPLE = """\b
Example:
  ckpt restore /var/ckpt/job                    the newest; ends as the process ends
  ckpt restore --at 3 --detach /var/ckpt/job    an older one, in the background
  ckpt restore --inherit 1=/tmp/output --detach /var/ckpt/job
  ckpt restore --inherit 'pipe:[4711]=5' /var/ckpt/job 5>/tmp/fifo
  ckpt restore --trust-image --image-dir /var/ckpt/job s3://backups/job
"""


@click.command("restore", epilog=_EXAMPLE)
@click.option(
    "--at", type=click.IntRange(min=0), metavar="N", help="Take generation N instead of the newest."
)
@click.option("--detach", is_flag=True, help="Print the pid and return; do not wait for the end.")
@click.option(
    "--inherit",
    multiple=True,
    callback=parse_inherit,
    metavar="FD=PATH|KEY=FD",
    help="Open PATH as its descriptor FD instead of what it had there. Of what led outside the tree"
    " (dump --external) KEY is the name: pipe:[4711]. A number behind the = is a descriptor that"
    " this command was started with, anything else a path. May be repeated, for both ends of a pipe"
    " too.",
)
@click.option(
    "--allow-changed",
    multiple=True,
    metavar="PATH",
    help="Accept that the file PATH has changed since the checkpoint; may be repeated.",
)
@click.option(
    "--tcp-close",
    is_flag=True,
    help="Let TCP connections come back closed, as if their peers had reset them.",
)
@click.option(
    "--lazy",
    is_flag=True,
    help="Let the process run at once; its memory comes when it is touched, and in the background.",
)
@click.option(
    "--no-cgroups",
    is_flag=True,
    help="Leave the process in the control groups of this command.",
)
@click.option(
    "--on-arrival",
    metavar="COMMAND",
    default="",
    help="Run COMMAND before anything is made, when no packet for its TCP connections is answered"
    " any more: to give this host the address that they need.",
)
@click.option(
    "--new-pids",
    is_flag=True,
    help="Give the process a pid namespace of its own: its pids may be taken here.",
)
@click.option(
    "--trust-image",
    is_flag=True,
    help="Take an image that another user owns or can write to: the process runs what he put there,"
    " with the rights that he put there.",
)
@click.option(
    "--image-dir",
    "keep_in",
    metavar="DIR",
    help="With a URL: fetch into DIR and keep it, for the next dump to go on with. It is fetched"
    " into a directory that is removed again if not given.",
)
@metrics_option
@identity_option
@json_option
@click.argument("image_dir")
def command(
    at: int | None,
    detach: bool,
    inherit: Inherit,
    allow_changed: tuple[str, ...],
    tcp_close: bool,
    lazy: bool,
    no_cgroups: bool,
    on_arrival: str,
    new_pids: bool,
    trust_image: bool,
    keep_in: str | None,
    metrics: Metrics,
    private: tuple[PrivateKey, ...],
    as_json: bool,
    image_dir: str,
) -> int:
    """Bring the process of IMAGE_DIR back, with its pid, and wait until it ends.

    The exit status is that of the process (128 and the signal's number if a signal ended it).
    Where its standard streams led to a terminal or to another process, it gets those of this
    command.

    IMAGE_DIR may be a URL of object storage ('ckpt copy'), for which --trust-image is needed:
    nothing tells who wrote what is there.
    """
    if lazy and keep_in is None and not isinstance(parse_place(image_dir), Path):
        raise UsageError("--lazy reads on when this command is done: give --image-dir with a URL")
    access = access_of(private, trusts_anybody=trust_image)
    with contextlib.ExitStack() as stack:
        figures = stack.enter_context(metrics.of(command="restore", image_dir=_name_of(image_dir)))
        fetched = stack.enter_context(
            local_image(image_dir, at, keep_in, trusts_anybody=trust_image)
        )
        image_dir, at = fetched.image_dir, fetched.at
        ahead = None if lazy else _begin_to_check(stack, image_dir, at, access)
        # Loaded while the image is being checked: that takes both as long.
        from ckpt.engine.restore import restore, wait_for_end
        from ckpt.resources.base import RestoreOptions

        options = RestoreOptions(
            allow_changed=frozenset(allow_changed),
            inherit=inherit.by_number,
            external=inherit.by_name,
            new_pids=new_pids,
            no_cgroups=no_cgroups,
            on_arrival=on_arrival,
            tcp_close=tcp_close,
        )
        result = restore(image_dir, at, options, lazy=lazy, ahead=ahead, access=access)
        figures |= {
            "wall_seconds": result.restore_ms / 1000,
            "generation": result.generation,
        }
    for warning in result.warnings:
        note(warning)
    if as_json:
        emit_json(
            {
                "pid": result.pid,
                "generation": result.generation,
                "restore_ms": round(result.restore_ms, 3),
                "warnings": list(result.warnings),
            }
        )
    elif detach:
        say(str(result.pid))
    if detach:
        return 0
    with _terminal_of(result.pid):
        return wait_for_end(result.pid)


def _name_of(place: str) -> str:
    parsed = parse_place(place)
    return os.path.abspath(parsed) if isinstance(parsed, Path) else parsed


def _begin_to_check(
    stack: contextlib.ExitStack, image_dir: str, at: int | None, access: Access
) -> Ahead:
    chain = Chain.open(Path(image_dir), access)
    stack.enter_context(chain.in_use())
    number = chain.require(None if at is None else GenerationNo(at))
    return stack.enter_context(Ahead(chain, number))


@contextlib.contextmanager
def _terminal_of(pid: int) -> Iterator[None]:
    """Make a process that leads a group of its own the foreground of our terminal, if we are it."""
    try:
        ours = os.tcgetpgrp(0)
        theirs = os.getpgid(pid)
        ask = ours == os.getpgrp() and theirs != ours and os.getsid(pid) == os.getsid(0)
    except OSError:  # no terminal, or it has ended already
        ask = False
    if not ask:
        yield
        return
    with _ignoring(signal.SIGTTOU):
        os.tcsetpgrp(0, theirs)
        _continue_reader(pid, theirs)
        try:
            yield
        finally:
            os.tcsetpgrp(0, ours)


def _continue_reader(pid: int, group: int) -> None:
    """Continue a process that has tried to read the terminal since it was let go."""
    with contextlib.suppress(ChildProcessError):
        stop = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
        if stop is not None and stop.si_status == signal.SIGTTIN:
            os.killpg(group, signal.SIGCONT)


@contextlib.contextmanager
def _ignoring(number: signal.Signals) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)
