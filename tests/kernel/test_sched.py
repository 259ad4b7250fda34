import os
import threading

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel import sched
from ckpt.kernel.libc import PAGE_SIZE
from ckpt.kernel.sched import SchedFlag, SchedPolicy
from tests.kernel.children import ended, running

WAITING = "say(ctypes.CDLL(None).syscall(186)); wait()"


@pytest.fixture
def child():
    with running(WAITING) as child:
        child.heard()
        yield child.pid


def test_policy_and_nice_are_read_and_set(child):
    attr = sched.sched_getattr(child)
    assert attr.sched_policy == SchedPolicy.OTHER
    assert attr.sched_nice == os.getpriority(os.PRIO_PROCESS, child)
    attr.sched_policy = SchedPolicy.BATCH
    attr.sched_nice += 2
    attr.sched_flags = SchedFlag.RESET_ON_FORK
    sched.sched_setattr(child, attr)
    assert os.sched_getscheduler(child) == os.SCHED_BATCH | os.SCHED_RESET_ON_FORK
    assert os.getpriority(os.PRIO_PROCESS, child) == attr.sched_nice
    again = sched.sched_getattr(child)
    assert (again.sched_policy, again.sched_flags) == (SchedPolicy.BATCH, 1)


def test_an_unknown_policy_is_refused(child):
    attr = sched.sched_getattr(child)
    attr.sched_policy = 99
    with pytest.raises(OSError, match="Invalid argument"):
        sched.sched_setattr(child, attr)


def test_affinity(child):
    cpus = sched.read_affinity(child)
    assert cpus == os.sched_getaffinity(0)
    one = {min(cpus)}
    sched.set_affinity(child, one)
    assert sched.read_affinity(child) == one
    sched.set_affinity(child, one | {1000})
    assert sched.read_affinity(child) == one
    with pytest.raises(OSError, match="Invalid argument"):
        sched.set_affinity(child, {1000})


def test_io_priority(child):
    best_effort_6 = 2 << sched.IOPRIO_CLASS_SHIFT | 6
    sched.ioprio_set(child, best_effort_6)
    assert sched.ioprio_get(child) == best_effort_6
    with pytest.raises(OSError, match="Invalid argument"):
        sched.ioprio_set(child, 7 << sched.IOPRIO_CLASS_SHIFT)


def test_robust_list_is_the_threads_own():
    mine, n_bytes = sched.get_robust_list(threading.get_native_id())
    assert n_bytes == sched.ROBUST_LIST_HEAD_BYTES
    assert mine > PAGE_SIZE
    heads = []
    thread = threading.Thread(
        target=lambda: heads.append(sched.get_robust_list(threading.get_native_id()))
    )
    thread.start()
    thread.join()
    assert heads[0][0] not in (0, mine)


@pytest.mark.parametrize(
    "read",
    [sched.sched_getattr, sched.read_affinity, sched.ioprio_get, sched.get_robust_list],
)
def test_gone(read):
    with ended() as pid:
        pass
    with pytest.raises(TargetGone):
        read(pid)


def test_many_threads_are_asked_at_once_and_those_gone_are_left_out(child):
    with ended() as gone:
        pass
    sched.set_affinity(child, {0})
    sched.ioprio_set(child, 2 << sched.IOPRIO_CLASS_SHIFT | 6)
    attr = sched.sched_getattr(child)
    attr.sched_policy = SchedPolicy.BATCH
    mine = threading.get_native_id()
    asked = sched.SchedulingBurst([mine, gone, child])
    # What counts is when it runs.
    sched.sched_setattr(child, attr)
    told = asked.run()
    assert list(told) == [mine, child]
    assert bytes(told[mine].attr) == bytes(sched.sched_getattr(mine))
    assert told[mine].processors == sched.read_affinity(mine)
    assert told[child].policy == told[child].attr.sched_policy == SchedPolicy.BATCH
    assert told[child].processors == {0}
    assert told[child].ioprio == 2 << sched.IOPRIO_CLASS_SHIFT | 6


def test_robust_lists_of_many_threads():
    with ended() as gone:
        pass
    mine = threading.get_native_id()
    told = sched.RobustListBurst([gone, mine]).run()
    assert told == {mine: sched.get_robust_list(mine)[0]}
    assert sched.RobustListBurst([]).run() == {}
