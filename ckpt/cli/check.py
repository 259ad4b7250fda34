"""`ckpt check`: what this kernel offers, and what of a process could not be captured."""

import attrs
import click

from ckpt.cli.names import parse_external
from ckpt.cli.output import emit_json, json_option, say
from ckpt.engine.capture import look
from ckpt.errors import Finding, UnsupportedState
from ckpt.kernel.features import Features, probe_features
from ckpt.process.tree import reachable_as, refuse_untouchable
from ckpt.resources.base import CaptureOptions
from ckpt.tracker.choose import AUTO, choose_tracker
from ckpt.units import Pid

_EXAMPLE = """\b
Example:
  ckpt check                 which tracker this kernel allows
  ckpt check --pid 4711      whether process 4711 can be checkpointed, and if not, why
"""


@click.command("check", epilog=_EXAMPLE)
@click.option(
    "--pid",
    type=click.IntRange(min=1),
    metavar="PID",
    help="Also name what of this process cannot be checkpointed; it is not touched.",
)
@click.option(
    "--external",
    multiple=True,
    callback=parse_external,
    metavar="KEY",
    help="As it would be given to dump; may be repeated.",
)
@json_option
def command(pid: int | None, external: tuple[str, ...], as_json: bool) -> int:
    """Say what this kernel offers, and which tracker a dump would use.

    With --pid, also what a dump of that process would refuse, and why; the exit code is 21 then.
    """
    features = probe_features()
    findings: list[Finding] = []
    if pid is not None:
        root = reachable_as(Pid(pid))
        refuse_untouchable(root)
        findings = look(root, features, CaptureOptions(external=external))
    tracker = choose_tracker(AUTO, features)
    if as_json:
        emit_json(
            {
                "features": _plain(features),
                "tracker": str(tracker),
                "pid": pid,
                "findings": [attrs.asdict(finding) for finding in findings],
            }
        )
    else:
        for name, value in _plain(features).items():
            say(f"{name:24} {_word(value)}")
        say(f"{'tracker':24} {tracker}")
        for finding in findings:
            say(f"refused: {finding}")
        if pid is not None and not findings:
            say(f"process {pid} can be checkpointed")
    return UnsupportedState.exit_code if findings else 0


def _plain(features: Features) -> dict[str, object]:
    plain = attrs.asdict(features)
    plain["capabilities"] = sorted(features.capabilities)
    return plain


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) if isinstance(value, list) else str(value)
