"""Reads `tests/allowed.toml`, where every exception from a rule stands with its reason."""

import fnmatch
import tomllib
from pathlib import Path

import attrs

ALLOWED_TOML = Path(__file__).parents[1] / "allowed.toml"


@attrs.frozen
class AllowedSkip:
    """A test that may skip where the machine lacks something that it cannot be given."""

    test: str
    """Pattern (fnmatch) of node ids."""
    message: str
    """Pattern (fnmatch) of what the test says when it skips."""
    because: str

    def covers(self, nodeid: str, message: str) -> bool:
        return matches(nodeid, self.test) and matches(message, self.message)


@attrs.frozen
class AllowedUse:
    """A file that may do what is forbidden elsewhere."""

    file: str
    """Pattern (fnmatch) of paths from the top of the repository."""
    because: str


@attrs.frozen
class Allowed:
    skip: tuple[AllowedSkip, ...] = ()
    sleep: tuple[AllowedUse, ...] = ()
    heavy_import: tuple[AllowedUse, ...] = ()


def read_allowed(path: Path = ALLOWED_TOML) -> Allowed:
    """Parse the list; an entry that gives no reason, or has a field too many, is an error."""
    tables = tomllib.loads(path.read_text())
    kinds = {"skip": AllowedSkip, "sleep": AllowedUse, "heavy_import": AllowedUse}
    if unknown := tables.keys() - kinds.keys():
        raise ValueError(f"{path}: unknown tables {sorted(unknown)}")
    lists = {
        name: tuple(kind(**entry) for entry in tables.get(name, ())) for name, kind in kinds.items()
    }
    for name, entries in lists.items():
        for entry in entries:
            if not entry.because.strip():
                raise ValueError(f"{path}: [[{name}]] without a reason: {entry}")
    return Allowed(**lists)


def matches(text: str, pattern: str) -> bool:
    """Like `fnmatch`, but `[` is itself: node ids of parametrized tests contain it."""
    return fnmatch.fnmatchcase(text, pattern.replace("[", "[[]"))
