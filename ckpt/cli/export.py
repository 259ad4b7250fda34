"""`ckpt export`: a process of a checkpoint as an ELF core file."""

from pathlib import Path

import click

from ckpt.cli.keys import access_of, identity_option
from ckpt.cli.lost import warn_of_loss
from ckpt.cli.output import emit_json, json_option, note, progress, say
from ckpt.engine.core_file import export_core
from ckpt.image.chain import Chain
from ckpt.image.keys import PrivateKey

_EXAMPLE = """\b
Example:
  ckpt export /var/ckpt/job -o core.4711              the newest checkpoint
  ckpt export --at 3 --pid 4712 /var/ckpt/job         another process, into core.4712
  gdb /usr/bin/program core.4711
"""


@click.command("export", epilog=_EXAMPLE)
@click.option(
    "--at", type=click.IntRange(min=0), metavar="N", help="Take generation N instead of the newest."
)
@click.option(
    "--pid",
    type=click.IntRange(min=1),
    metavar="PID",
    help="Take this process of the tree instead of its root.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write FILE instead of core.PID; one that is there is replaced.",
)
@identity_option
@json_option
@click.argument("image_dir")
def command(
    at: int | None,
    pid: int | None,
    output: str | None,
    private: tuple[PrivateKey, ...],
    as_json: bool,
    image_dir: str,
) -> None:
    """Write a process of IMAGE_DIR into an ELF core file, which gdb opens. Nothing is started.

    It has all threads with their registers and the memory of the checkpoint. What the process had
    mapped and never written is not in a checkpoint: the debugger takes it from the files.
    """
    path = Path(output) if output else None
    chain = Chain.open(Path(image_dir), access_of(private))
    if at is None:
        warn_of_loss(chain)
    with chain.in_use(), progress() as report:
        done = export_core(
            chain,
            path,
            at=at,
            pid=pid,
            report=lambda done_bytes: report("writing memory", done_bytes),
        )
    for warning in done.warnings:
        note(warning)
    if as_json:
        emit_json(
            {
                "file": str(done.path),
                "generation": done.generation,
                "pid": done.pid,
                "threads": done.n_threads,
                "bytes": done.size_bytes,
                "warnings": list(done.warnings),
            }
        )
        return
    say(
        f"{done.path}: process {done.pid} at generation {done.generation},"
        f" {done.n_threads} thread{'s' if done.n_threads > 1 else ''}"
    )
