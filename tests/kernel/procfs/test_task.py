import os
import resource
import struct
import threading

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ckpt.errors import TargetGone
from ckpt.kernel.procfs import task
from ckpt.kernel.procfs.task import Limit, PosixTimer
from tests.kernel.children import ended, running
from tests.kernel.procfs.captured import raw, text

ME = os.getpid()


def test_limits():
    limits = task.parse_limits(text("limits"))
    assert sorted(limits) == list(range(16))
    assert limits[resource.RLIMIT_CPU] == Limit(task.RLIM_INFINITY, task.RLIM_INFINITY)
    assert limits[resource.RLIMIT_STACK] == Limit(8388608, task.RLIM_INFINITY)
    assert limits[resource.RLIMIT_NOFILE] == Limit(20000, 20000)
    assert limits[resource.RLIMIT_NICE] == Limit(0, 0)  # without a unit


def test_limits_of_ours_are_those_of_getrlimit():
    for number, limit in task.read_limits(ME).items():
        ours = [value % 2**64 for value in resource.getrlimit(number)]
        assert [limit.soft, limit.hard] == ours


def test_an_unknown_limit_is_refused():
    with pytest.raises(ValueError, match="Max patience"):
        task.parse_limits("Limit\nMax patience              1   1   seconds\n")


def test_timers():
    assert task.parse_timers(text("timers")) == [
        PosixTimer(3, 10, 2**64 - 1, "signal", to_thread=False, target=12432, clock_id=-6),
        PosixTimer(2, 64, 7, "signal", to_thread=True, target=12432, clock_id=7),
        PosixTimer(1, 0, 0, "none", to_thread=False, target=12432, clock_id=0),
        PosixTimer(0, 34, 0xDEADBEEF1234, "signal", to_thread=False, target=12432, clock_id=1),
    ]
    assert task.parse_timers("") == []


@pytest.mark.parametrize(
    ("broken", "what"),
    [("signal: 1/0\n", "starts with"), ("ID: 1\nsignal: 1/0\nClockID: 0\n", "no field 'notify'")],
)
def test_half_a_timer_is_refused(broken, what):
    with pytest.raises(ValueError, match=what):
        task.parse_timers(broken)


TIMERS = """
    libc = ctypes.CDLL(None)
    made = ctypes.c_int()
    sigevent = (ctypes.c_int * 16)(77, 0, 12, 0)  # SIGEV_SIGNAL, SIGUSR2
    assert libc.syscall(222, 1, sigevent, ctypes.byref(made)) == 0
    say(made.value)
    wait()
"""


def test_timers_of_a_live_process(features):
    with running(TIMERS) as child:
        (made,) = child.heard()
        if features.posix_timers_listed:
            (timer,) = task.read_timers(child.pid)
            assert timer == PosixTimer(made, 12, 77, "signal", False, child.pid, 1)


def test_auxv():
    pairs = task.parse_auxv(raw("auxv"))
    values = dict(pairs)
    assert pairs[0][0] == task.AT_SYSINFO_EHDR
    assert values[6] == 4096  # AT_PAGESZ
    assert task.AT_MINSIGSTKSZ in values
    assert task.AT_NULL not in values


def test_auxv_of_ours_is_that_of_getauxval():
    import ctypes

    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes = [ctypes.c_ulong]
    getauxval.restype = ctypes.c_ulong
    pairs = task.read_auxv(ME)
    assert len(pairs) > 15
    hwcap = 16  # glibc answers with a word of its own
    seen = {kind: value for kind, value in pairs if kind != hwcap}
    assert {kind: getauxval(kind) for kind in seen} == seen


@given(st.lists(st.tuples(st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1))), st.binary())
def test_auxv_ends_at_the_null_entry(pairs, rest):
    words = b"".join(struct.pack("QQ", *pair) for pair in [*pairs, (0, 0)])
    assert task.parse_auxv(words + rest) == pairs


def test_auxv_without_an_end_is_refused():
    with pytest.raises(ValueError, match="AT_NULL"):
        task.parse_auxv(struct.pack("QQ", 6, 4096))
    assert task.parse_auxv(b"") == []


def test_timens_offsets():
    zero = task.parse_timens_offsets(text("timens_offsets"))
    assert (zero.monotonic_ns, zero.boottime_ns) == (0, 0)
    shifted = task.parse_timens_offsets("monotonic  -3  500\nboottime  7 0\n")
    assert (shifted.monotonic_ns, shifted.boottime_ns) == (-2_999_999_500, 7_000_000_000)
    assert task.parse_timens_offsets("1 2 0\n7 4 0\n").boottime_ns == 4_000_000_000
    with pytest.raises(ValueError, match="boottime"):
        task.parse_timens_offsets("monotonic 0 0\n")


def test_timens_offsets_of_ours():
    before = task.read_timens_offsets(ME)
    assert task.read_timens_offsets(os.getppid()) == before


def test_exec_start():
    assert task.parse_exec_start_ns(text("sched")) == 2_879_791_568_610
    assert task.parse_exec_start_ns("se.exec_start : 1.5\n") == 1_500_000
    assert task.parse_exec_start_ns("nr_switches : 5\n") is None


def test_exec_start_moves_when_the_thread_runs():
    first = task.read_exec_start_ns(ME, threading.get_native_id())
    assert sum(range(10**6)) > 0
    os.sched_yield()
    second = task.read_exec_start_ns(ME, threading.get_native_id())
    assert first is None or first < second


def test_io():
    counters = task.parse_io(text("io"))
    assert (counters.rchar_bytes, counters.wchar_bytes) == (670803, 92160)
    assert (counters.n_read_calls, counters.n_write_calls) == (120, 12)
    assert (counters.read_bytes, counters.write_bytes) == (8065024, 131072)
    with pytest.raises(ValueError, match="rchar"):
        task.parse_io("wchar: 1\n")


def test_io_counts_what_is_read():
    before = task.read_io(ME)
    with open("/dev/zero", "rb", buffering=0) as zero:
        zero.read(123456)
    after = task.read_io(ME)
    assert after.rchar_bytes - before.rchar_bytes >= 123456
    assert after.n_read_calls > before.n_read_calls


def test_small_numbers():
    with running("say('ready'); wait()") as child:
        child.heard()
        assert task.read_personality(child.pid) == task.read_personality(ME)
        task.write_oom_score_adj(child.pid, 321)
        assert task.read_oom_score_adj(child.pid) == 321
        assert task.read_oom_score_adj(ME) != 321


def test_gone():
    with ended() as pid, pytest.raises(TargetGone):
        task.read_auxv(pid)
    for read in (
        task.read_limits,
        task.read_timers,
        task.read_auxv,
        task.read_timens_offsets,
        task.read_io,
        task.read_oom_score_adj,
        task.read_personality,
    ):
        with pytest.raises(TargetGone):
            read(pid)
    with pytest.raises(TargetGone):
        task.read_exec_start_ns(pid, pid)
    with pytest.raises(TargetGone):
        task.write_oom_score_adj(pid, 0)
