"""A program that takes all its dumps in one process, so that it is seen what one leaves behind.

    python dumper.py PID IMAGE_DIR KEEP

For each line on its standard input it takes an incremental dump, prunes the chain to KEEP
generations, and says as JSON on a line what came of it.
"""

import json
import sys
import time
from pathlib import Path

from ckpt.engine.dump import DumpOptions, dump
from ckpt.errors import CkptError
from ckpt.image.chain import Chain
from ckpt.image.prune import Retention, prune


def dump_and_prune(pid: int, image: Path, keep: int) -> dict[str, object]:
    began_s = time.monotonic()
    try:
        made = dump(pid, image, DumpOptions(incremental=True))
        prune(Chain.open(image), Retention(keep))
    except CkptError as error:
        return {"error": error.message()}
    return {
        "generation": made.generation,
        "kind": str(made.kind),
        "reason": made.reason,
        "warnings": made.warnings,
        "freeze_ms": made.freeze_ms,
        "wall_ms": made.wall_ms,
        "all_ms": (time.monotonic() - began_s) * 1000,
    }


def main() -> None:
    pid, image, keep = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for _ in sys.stdin:
        print(json.dumps(dump_and_prune(pid, image, keep)), flush=True)


if __name__ == "__main__":
    main()
