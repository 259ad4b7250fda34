"""The text of /proc as real processes had it, with a few lines added by hand.

All were taken on Linux 6.18. Added in `maps`: the five mappings from 7f0000000000 on, which no
process there had.
"""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "captures"


def raw(name):
    return (FOLDER / name).read_bytes()


def text(name):
    return raw(name).decode(errors="surrogateescape")
