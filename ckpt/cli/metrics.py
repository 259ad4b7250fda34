"""`--metrics FILE`: what a run did, for Prometheus, by node_exporter's textfile collector.

The file is replaced in one step when the work is over, whether it succeeded or not (`ckpt run`:
each time). Nothing is loaded for it before.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping

import attrs
import click

from ckpt.cli.output import note
from ckpt.cli.replacing import replace_file, require_place

FIGURES = {
    "freeze_seconds": "How long the processes stood still.",
    "wall_seconds": "How long the run took.",
    "bytes": "Bytes that were stored, or sent.",
    "pages": "Pages of memory that were stored, or sent.",
    "generation": "The generation that was written or restored.",
}
"""What a command may tell of itself, and the help of the metric `ckpt_NAME`."""

_LAST_SUCCESS = "ckpt_last_success_timestamp_seconds"


@attrs.frozen(repr=False, eq=False)
class Metrics:
    """Where the metrics of a run go; without a path, nowhere."""

    path: str | None

    @contextlib.contextmanager
    def of(self, **labels: str) -> Iterator[dict[str, float]]:
        """Lend a place for figures, by their names in `FIGURES`; write all when the block ends.

        A file that cannot be written is told on stderr and changes nothing else: the work is done.
        """
        figures: dict[str, float] = {}
        success = False
        try:
            yield figures
            success = True
        finally:
            self.write(figures, labels, success=success)

    def write(
        self, figures: Mapping[str, float], labels: Mapping[str, str], *, success: bool
    ) -> None:
        """Write what was done; for who does many things, after each."""
        if self.path is None:
            return
        from prometheus_client import CollectorRegistry, Gauge, generate_latest

        path = self.path
        registry = CollectorRegistry()
        # A label is text, and a path may be bytes that are none.
        printable = {
            name: value.encode(errors="surrogateescape").decode(errors="backslashreplace")
            for name, value in labels.items()
        }

        def tell(name: str, text: str, value: float) -> None:
            gauge = Gauge(name, text, tuple(printable), registry=registry)
            gauge.labels(**printable).set(value)

        now_s = time.time()
        for name, value in figures.items():
            tell(f"ckpt_{name}", FIGURES[name], value)
        tell("ckpt_success", "1 if the last run succeeded, else 0.", float(success))
        tell("ckpt_timestamp_seconds", "When the last run ended.", now_s)
        last_s = now_s if success else _read_last_success(path, printable)
        if last_s is not None:
            tell(_LAST_SUCCESS, "When a run succeeded last.", last_s)
        try:
            replace_file(path, generate_latest(registry).decode())
        except OSError as error:
            note(f"cannot write the metrics to {path} ({error.strerror})")


def _read_last_success(path: str, labels: Mapping[str, str]) -> float | None:
    """Return what the file said before: a run that fails does not make it forgotten."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        with open(path, encoding="utf-8") as file:
            families = list(text_string_to_metric_families(file.read()))
    except (OSError, ValueError):
        return None
    for family in families:
        for sample in family.samples:
            if sample.name == _LAST_SUCCESS and sample.labels == labels:
                return sample.value
    return None


def _parse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Metrics:
    if value is not None:
        require_place("--metrics", value)
    return Metrics(value)


_FOR_PROMETHEUS = "for Prometheus (node_exporter's textfile collector)."

metrics_option = click.option(
    "--metrics",
    metavar="FILE",
    callback=_parse,
    help=f"Replace FILE by what this run did, {_FOR_PROMETHEUS}",
)
"""Arrives as `metrics`."""

metrics_of_each_option = click.option(
    "--metrics",
    metavar="FILE",
    callback=_parse,
    help=f"Replace FILE by what each checkpoint and each restore did, {_FOR_PROMETHEUS}",
)
"""The same for a command that does many things."""
