"""Shells as they are: a pipeline that checks what comes through it, and a ring of 50 processes.

Both count aloud. What was printed before the kill and what is printed after the restore make one
count, without a gap and without a number twice.
"""

import pytest

from integration.apps.app import App, reap_killed
from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import ANSWER_S, descendants

PIPELINE = r"""
numbers() { n=0; while :; do echo $n; n=$((n + 1)); done; }
checked() {
    expected=0
    while read -r got; do
        [ "$got" = "$expected" ] || { echo "got $got, not $expected"; exit 1; }
        expected=$((expected + 1))
        [ $((expected % 500)) != 0 ] || echo $((expected / 500))
    done
}
numbers | sed -u 's/$/ /' | tr -d ' ' | checked
"""
# tr keeps what it reads until it has a full buffer: 4096 bytes that are nowhere but in its memory.
LINKS = 47
RING = rf"""
link() {{ while read -r number; do echo $((number + 1)); done; }}
links=link
for ((nth = 1; nth < {LINKS}; nth++)); do links+=' | link'; done
coproc eval "$links"
exec {{to}}>&"${{COPROC[1]}}" {{from}}<&"${{COPROC[0]}}"
(
    # Each echo to the ring puts the standard output aside for that long: not in the first shell.
    sent=0
    while :; do
        echo $sent >&"$to"
        read -r got <&"$from"
        [ "$got" = $((sent + {LINKS})) ] || {{ echo "got $got, sent $sent"; exit 1; }}
        sent=$got
        echo $((sent / {LINKS}))
    done
)
echo "the ring has ended with $?"
"""
become_subreaper()


def rest_of(app):
    """Return the lines that a program has left behind."""
    lines = []
    while True:
        try:
            lines.append(app.line())
        except EOFError:
            return lines


@pytest.mark.parametrize(
    ("script", "below"), [(PIPELINE, 4), (RING, 2 + LINKS)], ids=["pipeline", "ring"]
)
def test_a_shell_and_all_below_it_count_on(script, below, tmp_path):
    image = tmp_path / "image"
    with App(["bash", "-c", script], tmp_path) as shell:
        lines = [shell.line() for _ in range(5)]
        family = descendants(shell.pid)
        assert len(family) == below
        assert dump(shell.pid, image)["kind"] == "full"
        lines += [shell.line() for _ in range(5)]
        assert dump(shell.pid, image, "--kill")["kind"] == "delta"
        shell.process.wait(ANSWER_S)
        reap_killed(family)
        lines += rest_of(shell)
    with Restored(image) as back:
        assert descendants(back.pid) == family
        lines += [back.line() for _ in range(10)]
    assert lines == [str(nth) for nth in range(1, len(lines) + 1)]
