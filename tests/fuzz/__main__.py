"""Look for bytes that bring a decoder to something else, by coverage: `make fuzz ARGS="600"`.

    python -m tests.fuzz SECONDS [TARGET ...]

Each target has its share of the time, in a process of its own. What gets to new places is kept in
build/fuzz/TARGET, and is where the next run begins. A finding ends the target's run: its bytes are
in build/fuzz, and belong into tests/fuzz/found/TARGET with its repair.
"""

import subprocess
import sys
from pathlib import Path

KEPT = Path("build/fuzz")
LIMITS = ("-rss_limit_mb=2048", "-timeout=20", "-max_len=65536", "-len_control=20")


def fuzz(target, seconds):
    """Be the process of one target; never returns."""
    import atheris

    with atheris.instrument_imports(include=["ckpt"]):
        from tests.fuzz.changes import change, drawn
        from tests.fuzz.seeds import seeds
        from tests.fuzz.targets import run_bounded

    known = seeds()[target]
    corpus = KEPT / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(known):
        (corpus / f"seed-{number}").write_bytes(data)

    def mutate(data, max_size, seed):
        draw = drawn(seed)
        if draw.random() < 0.5:
            return atheris.Mutate(data, max_size)
        return change(target, bytes(data), draw, known)[:max_size]

    options = [f"-max_total_time={seconds}", f"-artifact_prefix={KEPT}/{target}-", *LIMITS]
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)],
        lambda data: run_bounded(target, data),
        custom_mutator=mutate,
    )
    atheris.Fuzz()


def main(seconds="60", *wanted):
    """Run the targets one after another; return how many had a finding."""
    from tests.fuzz.targets import TARGETS

    targets = wanted or tuple(TARGETS)
    share = max(1, int(seconds) // len(targets))
    found = []
    for target in targets:
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz", "--one", target, str(share)],
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        lines = done.stdout.splitlines()
        runs = next((line for line in reversed(lines) if line.startswith("Done ")), "")
        print(f"{target}: {runs or 'FOUND'}", flush=True)
        if done.returncode:
            found.append(target)
            print("\n".join(lines[-40:]))
    print(f"{len(targets)} targets, {len(found)} with a finding {found}")
    return len(found)


if sys.argv[1:2] == ["--one"]:
    fuzz(sys.argv[2], sys.argv[3])
else:
    sys.exit(min(1, main(*sys.argv[1:])))
