"""What the project promises, section by section: (case, measure) -> goals.

The figures are for medians on a quiet machine, the ratios for the same run. `RATIO` is to CRIU,
or whatever the second column of the section is.
"""

from integration.bench.report import Goal, GoalsOf, Of


def _ratio(limit: float) -> Goal:
    return Goal(limit, Of.RATIO)


MEMORY: GoalsOf = {
    ("1 GiB random", "freeze"): (Goal(10), _ratio(1 / 40)),
    ("1 GiB random", "wall"): (_ratio(1.2),),
    ("1 GiB random", "restore"): (_ratio(0.5),),
    ("1 GiB half", "wall"): (_ratio(1.5),),
    ("1 GiB half", "image"): (_ratio(0.62),),
    ("4 GiB random", "freeze"): (Goal(20), _ratio(1 / 100)),
    ("4 GiB random", "restore --lazy, net"): (Goal(60),),
} | {
    (f"{size} {fill}", measure): (Goal(200),)
    for size in ("64 MiB", "256 MiB", "1 GiB", "4 GiB")
    for fill in ("random", "half", "sparse")
    for measure in ("dump's memory", "restore's memory")
}
OBJECTS: GoalsOf = {
    (case, "freeze"): (_ratio(0.5),)
    for case in ("500 threads", "10,000 VMAs", "1,000 fds", "50 processes")
}
REDIS: GoalsOf = {("1,000,000 keys", "freeze"): (Goal(8),)}
DELTA: GoalsOf = {
    ("4 GiB, 1 % scattered", "freeze"): (Goal(12),),
    ("4 GiB, 1 % clustered", "freeze"): (Goal(12),),
}
TRACKED: GoalsOf = {
    ("10,000 pages/s, a delta every second", "throughput"): (Goal(0.95, Of.RATIO, at_least=True),),
}
BUSY: GoalsOf = {("1 GiB, 100,000 pages/s", "freeze"): (Goal(40),)}
SMALL: GoalsOf = {("1 MiB", "freeze"): (Goal(5),), ("1 MiB", "wall"): (Goal(200),)}
