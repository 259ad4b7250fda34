"""Full dumps of what costs by the piece: threads, mappings, open files, processes; redis; next to
nothing.
"""

import functools

from integration.bench import goals
from integration.bench.cycle import Case, measure, time_python
from integration.bench.memory import RATE
from integration.bench.report import Collector, Section
from integration.bench.target import start_redis, start_target
from integration.bench.tools import Bench

_KEYS = 1_000_000
_KINDS = {"threads": 500, "VMAs": 10_000, "fds": 1000, "processes": 50}
_SMALL_ROUNDS = 10
_LIBRARIES = "import click, attrs, ptrace.binding"


def object_case(kind: str, n: int, rounds: int) -> Case:
    """Return the case of a process with so many threads, VMAs or fds, or of so many processes."""
    start = functools.partial(start_target, **{"mib": 1, kind.lower(): n})
    return Case(f"{n:,} {kind}", start, 64, rounds)


def measure_objects(bench: Bench) -> list[Section]:
    """Measure one case for each kind."""
    into = Collector()
    for kind, n in _KINDS.items():
        measure(bench, object_case(kind, n, 4), into)
    return [into.section("many objects, 1 MiB of memory, tmpfs", goals.OBJECTS)]


def measure_redis(bench: Bench) -> list[Section]:
    """Measure redis-server without a client."""
    into = Collector()
    start = functools.partial(start_redis, n_keys=_KEYS)
    # Its memory cannot be checked by the board: the dump alone, the way back is tested elsewhere.
    measure(bench, Case(f"{_KEYS:,} keys", start, 256, 3, restores=False), into)
    into.note("it does not listen: CRIU 4.1 cannot dump a TCP socket under Linux 6.16 and newer")
    return [into.section("redis-server, tmpfs", goals.REDIS)]


def measure_busy(bench: Bench) -> list[Section]:
    """Measure a process that writes more than can be caught up with."""
    into = Collector()
    for rate in (RATE, 100_000):
        start = functools.partial(start_target, mib=1024, rate=rate)
        case = Case(f"1 GiB, {rate:,} pages/s", start, 1024, 3, restores=False)
        measure(bench, case, into)
    return [into.section("freeze of a busy process, random pages, tmpfs", goals.BUSY)]


def measure_small(bench: Bench) -> list[Section]:
    """Measure the whole command, for a process of 1 MiB."""
    into = Collector()
    measure(bench, Case("1 MiB", functools.partial(start_target, mib=1), 1, _SMALL_ROUNDS), into)
    nothing, libraries = (min(time_python(code) for _ in range(5)) for code in ("pass", _LIBRARIES))
    into.note(f"python alone takes {nothing:.0f} ms, with the libraries {libraries:.0f} ms")
    return [into.section("a small process, tmpfs", goals.SMALL)]
