"""What an empty process is given, it has: restored into it, captured from it, compared."""

import signal
import struct

import attrs
import pytest

from ckpt.errors import RestoreFailed
from ckpt.resources.credentials import CREDENTIALS
from ckpt.resources.identity import IDENTITY, TASK_MODES
from ckpt.resources.limits import LIMITS, LimitRecord
from ckpt.resources.scheduling import SCHEDULING
from ckpt.resources.signals import (
    SIGNALS,
    THREAD_SIGNALS,
    SignalAction,
    SignalsRecord,
    ThreadSignalsRecord,
)
from ckpt.resources.threads import THREAD
from integration.resources.embryos import embryo, recapture, restore

SI_QUEUE, SI_KERNEL, SI_TIMER, SI_TKILL, CLD_EXITED = -1, 0x80, -2, -6, 1
RTMIN, RTMAX = 34, 64
SS_DISABLE, SS_AUTODISARM = 2, -(1 << 31)
SCHED_FIFO, SCHED_BATCH, SCHED_IDLE, SCHED_DEADLINE = 1, 3, 5, 6
RESET_ON_FORK = 1
SETUID, NET_RAW, SYS_NICE = 1 << 7, 1 << 13, 1 << 23
KEEP_CAPS, NO_SETUID_FIXUP, NO_AMBIENT_RAISE = 1 << 4, 1 << 2, 1 << 6


def siginfo(sig, code, value=0):
    """Return a siginfo with the sender 4711 of user 1000."""
    return struct.pack("<iiiiiiQ", sig, 0, code, 0, 4711, 1000, value).ljust(128, b"\0")


PENDING = [
    pytest.param((), id="none"),
    pytest.param((siginfo(signal.SIGUSR1, SI_QUEUE, 2**64 - 1),), id="with a value"),
    pytest.param(
        tuple(siginfo(RTMIN + 1, SI_QUEUE, n) for n in (3, 1, 2)), id="the same one in order"
    ),
    pytest.param(
        (
            siginfo(signal.SIGWINCH, SI_KERNEL),
            siginfo(signal.SIGURG, SI_KERNEL),
            siginfo(signal.SIGCHLD, CLD_EXITED),
        ),
        id="all that may end a batch",
    ),
    pytest.param(tuple(siginfo(sig, SI_TKILL) for sig in range(1, 9)), id="fatal ones"),
]


@pytest.mark.parametrize("pending", PENDING)
def test_shared_pending_signals(pending):
    actions = (
        SignalAction(signal.SIGCHLD, 1, 0, 0, 0),
        SignalAction(signal.SIGWINCH, 0x1000, 0x0400_0004, 0x2000, 2**63),
        SignalAction(RTMAX, 0x3000, 0x1000_0000, 0, 2**64 - 1 - 0x40100),
    )
    record = SignalsRecord(actions, pending)
    with embryo() as planted:
        assert restore(SIGNALS, record, planted) == []
        assert planted.leader.sigmask == 0
        assert recapture(SIGNALS, planted) == record


@pytest.mark.parametrize("pending", PENDING)
def test_pending_signals_of_a_thread(pending):
    blocked = 2**64 - 1 - (1 << 8) - (1 << 18)
    record = ThreadSignalsRecord(blocked, 0x7000_0000, SS_AUTODISARM, 65536, pending)
    with embryo() as planted:
        restore(THREAD_SIGNALS, record, planted)
        assert recapture(THREAD_SIGNALS, planted) == record
        assert recapture(SIGNALS, planted).pending == ()


def test_a_disabled_alternative_stack():
    record = ThreadSignalsRecord(0, 0, SS_DISABLE, 0, ())
    with embryo() as planted:
        restore(THREAD_SIGNALS, record, planted)
        assert recapture(THREAD_SIGNALS, planted) == record


def test_a_pending_stop_is_remembered_for_the_end():
    with embryo() as planted:
        restore(SIGNALS, SignalsRecord((), (siginfo(signal.SIGSTOP, 0),)), planted)
        assert planted.leader.deferred_stop


def test_names_and_addresses_of_a_thread():
    with embryo() as planted:
        before = recapture(THREAD, planted)
        record = attrs.evolve(
            before, name=b"a) R (b\n\xff", clear_child_tid=2**47 - 8, robust_list=0x1230
        )
        restore(THREAD, record, planted)
        assert recapture(THREAD, planted) == record


SCHEDULED = [
    {"nice": 7},
    {"policy": SCHED_BATCH, "nice": -5, "flags": RESET_ON_FORK},
    {"policy": SCHED_IDLE},
    {"policy": SCHED_FIFO, "rt_priority": 3, "nice": 4, "timer_slack_ns": 0, "runtime_ns": 0},
    {"processors": (1,), "ioprio": 2 << 13 | 6},
    {"timer_slack_ns": 123_456},
    {"runtime_ns": 5_000_000},
    {
        "policy": SCHED_DEADLINE,
        "runtime_ns": 1_000_000,
        "deadline_ns": 50_000_000,
        "period_ns": 100_000_000,
        "timer_slack_ns": 0,
    },
]


@pytest.mark.parametrize("changes", SCHEDULED, ids=str)
def test_scheduling(changes):
    with embryo() as planted:
        record = attrs.evolve(recapture(SCHEDULING, planted), **changes)
        assert restore(SCHEDULING, record, planted) == []
        again = recapture(SCHEDULING, planted)
        if "ioprio" not in changes:  # the default follows policy and nice
            again = attrs.evolve(again, ioprio=record.ioprio)
        assert again == record


def test_processors_that_are_not_here_are_told():
    with embryo() as planted:
        before = recapture(SCHEDULING, planted)
        (warning,) = restore(SCHEDULING, attrs.evolve(before, processors=(4000,)), planted)
        assert "4000" in warning
        assert recapture(SCHEDULING, planted) == before


def test_a_policy_that_is_not_here_fails_the_restore():
    with embryo() as planted:
        record = attrs.evolve(recapture(SCHEDULING, planted), policy=99)
        with pytest.raises(RestoreFailed, match="scheduling of thread"):
            restore(SCHEDULING, record, planted)


CREDENTIALS_OF = [
    {"uids": (1000,) * 4, "gids": (1000,) * 4, "groups": (27, 1000, 70_000)},
    {"uids": (1000, 0, 1001, 5), "gids": (1, 2, 3, 4)},
    {"uids": (1000,) * 4, "permitted": 0, "effective": 0},
    {"uids": (1000,) * 4, "permitted": NET_RAW, "effective": 0, "inheritable": SYS_NICE},
    {
        "uids": (1000,) * 4,
        "permitted": NET_RAW | SETUID,
        "effective": NET_RAW,
        "inheritable": NET_RAW,
        "ambient": NET_RAW,
        "bounding": NET_RAW | SYS_NICE,
        "securebits": KEEP_CAPS,
        "no_new_privs": True,
    },
    {"securebits": NO_SETUID_FIXUP | NO_SETUID_FIXUP << 1 | NO_AMBIENT_RAISE},
    {"inheritable": SYS_NICE, "bounding": 0},
]


@pytest.mark.parametrize("changes", CREDENTIALS_OF, ids=lambda changes: " ".join(changes))
def test_credentials(changes):
    with embryo() as planted:
        record = attrs.evolve(recapture(CREDENTIALS, planted), **changes)
        assert restore(CREDENTIALS, record, planted) == []
        assert recapture(CREDENTIALS, planted) == record


def test_credentials_that_are_as_wanted_need_no_privilege():
    with embryo() as planted:
        weak = attrs.evolve(
            recapture(CREDENTIALS, planted), uids=(1000,) * 4, permitted=0, effective=0
        )
        restore(CREDENTIALS, weak, planted)
        restore(CREDENTIALS, weak, planted)
        with pytest.raises(RestoreFailed, match="setting credentials"):
            restore(CREDENTIALS, attrs.evolve(weak, uids=(0,) * 4), planted)


def test_modes_of_a_thread_survive_its_credentials():
    with embryo() as planted:
        who = attrs.evolve(recapture(CREDENTIALS, planted), uids=(1000,) * 4, gids=(1000,) * 4)
        before = recapture(TASK_MODES, planted)
        record = attrs.evolve(
            before,
            personality=0x0040000,
            parent_death_signal=signal.SIGUSR1,
            time_stamp_counter=2,
            machine_check=1 if before.machine_check != -1 else -1,
            mdwe=1,
        )
        restore(CREDENTIALS, who, planted)
        (warning,) = restore(TASK_MODES, record, planted)
        assert "parent" in warning
        assert recapture(TASK_MODES, planted) == record
        assert record.dumpable == 1


def test_a_process_that_was_not_dumpable():
    with embryo() as planted:
        record = attrs.evolve(recapture(TASK_MODES, planted), dumpable=0)
        restore(TASK_MODES, record, planted)
        assert recapture(TASK_MODES, planted) == record


def test_identity():
    with embryo() as planted:
        record = attrs.evolve(recapture(IDENTITY, planted), child_subreaper=True, thp_disabled=1)
        restore(IDENTITY, record, planted)
        assert recapture(IDENTITY, planted) == record


def test_limits():
    with embryo() as planted:
        before = recapture(LIMITS, planted)
        lower = tuple(
            LimitRecord(limit.resource, limit.soft // 2, max(0, limit.hard - 1))
            for limit in before.limits
        )
        record = attrs.evolve(before, limits=lower, oom_score_adj=500, coredump_filter=0x13)
        assert restore(LIMITS, record, planted) == []
        assert recapture(LIMITS, planted) == record


def test_an_oom_adjustment_that_may_not_be_lowered_is_told():
    with embryo() as planted:
        record = attrs.evolve(recapture(LIMITS, planted), oom_score_adj=-900)
        warnings = restore(LIMITS, record, planted)
        changed = recapture(LIMITS, planted).oom_score_adj == -900
        assert changed == (not warnings)
