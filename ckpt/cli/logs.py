"""`--log-level` and `--log-json` of every command: what is done, and how long that takes.

The library tells its steps by the logger `ckpt` (`ckpt.engine.steps`); here they are written to
stderr. Without these options nothing listens and nothing is loaded for them.
"""

import sys
from typing import Any

import click

from ckpt.cli import output

LEVELS = ("info", "warning", "error")
_KEY = "ckpt.logs"
_listening = False
_NOTED_AS = {"error": 40, "warning": 30}


def log_options() -> list[click.Parameter]:
    """Return the two options, for one command; no argument of the command belongs to them."""
    return [
        click.Option(
            ["--log-level"],
            type=click.Choice(LEVELS),
            expose_value=False,
            is_eager=True,
            callback=_listen,
            help="Log on standard error from this level on; info tells each step and its time.",
        ),
        click.Option(
            ["--log-json"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_listen,
            help="Write all that goes to standard error as JSON, an object a line, from info on.",
        ),
    ]


def _listen(ctx: click.Context, param: click.Parameter, value: object) -> None:
    if not value or ctx.resilient_parsing:
        return
    chosen: dict[str, Any] = ctx.meta.setdefault(_KEY, {})
    chosen[str(param.name)] = value
    _start_listening(chosen.get("log_level", "info"), as_json=chosen.get("log_json", False))


def _start_listening(level: str, *, as_json: bool) -> None:
    global _listening
    import logging

    _listening = True

    class Handler(logging.StreamHandler[Any]):
        def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
            """Whoever read our log is gone: that harms nothing."""

    class Plain(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return f"{_iso(record.created)} {record.levelname.lower()} {record.getMessage()}"

    class Json(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            import json

            told: dict[str, object] = {
                "time": _iso(record.created),
                "level": record.levelname.lower(),
                "message": record.getMessage(),
            }
            for name in ("command", "step", "ms"):
                if hasattr(record, name):
                    told[name] = getattr(record, name)
            return json.dumps(told | getattr(record, "facts", {}), default=str)

    handler = Handler(sys.stderr)
    handler.setFormatter(Json() if as_json else Plain())
    logger = logging.getLogger("ckpt")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    if as_json:
        output.listener = lambda sentence, kind: logger.log(_NOTED_AS[kind], "%s", sentence)


def stop_listening() -> None:
    """Leave the logger as it was, for a program that calls us more than once."""
    global _listening
    if not _listening:
        return
    import logging

    _listening = False
    output.listener = None
    logger = logging.getLogger("ckpt")
    logger.handlers = []
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def _iso(created_s: float) -> str:
    import datetime

    moment = datetime.datetime.fromtimestamp(created_s, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
