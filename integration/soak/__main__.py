"""Dump a redis under load, again and again, and see that nothing piles up.

    python -m integration.soak [--dumps 10000] [--minutes 60]

Exits with 1 if there was an error, or growth.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from integration.soak.soak import Outcome, soak

TELL_EVERY = 200


def tell(outcome: Outcome) -> None:
    if outcome.n_dumps % TELL_EVERY == 0:
        print(outcome.report(), end="\n\n", flush=True)


def main() -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dumps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no more after this")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave nothing behind
    with tempfile.TemporaryDirectory(prefix="ckpt-soak-") as folder:
        outcome = soak(Path(folder), chosen.dumps, most_s=chosen.minutes * 60, tell=tell)
    print(outcome.report())
    return 1 if outcome.troubles() else 0


if __name__ == "__main__":
    sys.exit(main())
