"""Lengths of time on a command line: 500ms, 30s, 5m, 1h, 2d."""

import re

import click

_FORM = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_optional_duration(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> float | None:
    """Return what `parse_duration` does, or None if the option was not given."""
    return None if value is None else parse_duration(ctx, param, value)


def parse_duration(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    """Return seconds, more than 0; see `click.Option.callback`."""
    found = _FORM.fullmatch(value)
    seconds = float(found[1]) * _UNIT_S[found[2]] if found else 0.0
    if seconds <= 0:
        raise click.BadParameter(f"{value!r} is not of the form 30s, 5m or 1h")
    return seconds
