"""What judges a soak finds a program that keeps something each time, and no other."""

import random
import sys
from pathlib import Path

import pytest

from integration.apps.app import App
from integration.soak.growth import ALLOWED, Series, growths, read_held
from integration.soak.leaking import LEAKS

LEAKING = Path(__file__).with_name("leaking.py")
N_TIMES = 100
FIGURES = {
    "descriptor": {"ckpt: fds"},
    "mapping": {"ckpt: mappings"},
    # Its stack is one, and a guard.
    "thread": {"ckpt: threads", "ckpt: mappings"},
    "zombie": {"ckpt: children"},
    "memory": {"ckpt: KiB"},
    "nothing": set(),
}


@pytest.mark.parametrize("kind", LEAKS)
def test_a_program_that_keeps_something_is_found(kind, tmp_path):
    series = Series()
    with App([sys.executable, LEAKING, kind], tmp_path) as program:
        for nth in range(N_TIMES):
            assert program.ask(str(nth)) == str(nth)
            series.take(read_held("ckpt", program.pid))
    found = {grown.name for grown in series if grown.is_growth}
    assert found == FIGURES[kind], growths(series)


def series_of(name, figures):
    series = Series()
    for figure in figures:
        series.take({name: figure})
    return series


@pytest.mark.parametrize("n_dumps", [100, 10_000])
def test_noise_is_no_growth(n_dumps):
    chance = random.Random(1)
    noisy = [30_000 + chance.gauss(0, 2_000) for _ in range(n_dumps)]
    assert growths(series_of("ckpt: KiB", noisy)) == []


def test_a_slow_leak_is_found_where_there_are_many():
    chance = random.Random(1)
    # One KiB for each dump, hidden in noise.
    leaking = [30_000 + nth + chance.gauss(0, 2_000) for nth in range(10_000)]
    (sentence,) = growths(series_of("ckpt: KiB", leaking))
    assert sentence.startswith("ckpt: KiB")


def test_warming_up_is_no_growth_but_one_descriptor_later_is():
    name = "ckpt: fds"
    assert name not in ALLOWED
    assert growths(series_of(name, [4] * 20 + [5] * 80)) == []
    assert growths(series_of(name, [4] * 99 + [5])) != []
    # What comes and goes is told too: it may be a matter of luck what is left at the end.
    assert growths(series_of(name, [4] * 60 + [5] + [4] * 39)) != []
