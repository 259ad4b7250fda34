"""What a thread may ask the kernel comes back, and what cannot is named.

That filters forbid all that a dump does inside is part of the workload.
"""

import os

import attrs
import pytest

from ckpt.errors import UnsupportedState
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import Prctl
from ckpt.kernel.procfs.status import read_status
from ckpt.process.arena import arena
from ckpt.process.freezer import freeze
from ckpt.process.remote import call
from ckpt.resources.base import Stopped
from ckpt.resources.seccomp import SECCOMP, ConfinedRecord, FilterRecord, SeccompRecord
from ckpt.units import Pid
from integration.errors.refusals import refused, untouched
from integration.freezer.targets import child
from integration.harness import Restored, become_subreaper, dump
from integration.resources.confined import (
    ALLOW,
    LOAD_IMMEDIATE,
    RETURN,
    RETURN_LOADED,
    USER_NOTIF,
    confine,
    program,
)
from integration.resources.embryos import FEATURES, capture, embryo, look, restore
from integration.workloads.driver import Program

become_subreaper()
HARMLESS = program((RETURN, ALLOW))


@pytest.mark.parametrize("variant", ["strict", "shared"])
def test_variants_come_back(variant, tmp_path):
    image = tmp_path / "image"
    with Program("s_seccomp", variant, cwd=tmp_path) as work:
        dump(work.pid, image)
        assert work.ask("step sync") == "stepped"
        assert dump(work.pid, image)["kind"] == "delta"
        assert work.ask("check") == "ok"
    with Restored(image) as work:
        assert work.ask("check") == "ok"
        assert dump(work.pid, image)["kind"] == "delta"
        assert work.quit() == 0
    with Restored(image, "--at", "0") as work:
        assert work.ask("check") == "ok"
        assert work.ask("step sync") == "stepped"
        assert work.ask("check") == "ok"


def test_equal_filters_are_recorded_once_and_in_order():
    other = program((LOAD_IMMEDIATE, 3), (RETURN, ALLOW))
    with child(lambda: confine(HARMLESS, other, HARMLESS)) as pid:
        record = capture(SECCOMP, pid)
    assert record.filters == (FilterRecord(HARMLESS, log=False), FilterRecord(other, log=False))
    assert record.threads == (ConfinedRecord(2, (0, 1, 0)),)


def test_who_is_not_confined_costs_nothing():
    with child(lambda: None) as pid:
        assert capture(SECCOMP, pid) == SeccompRecord((), ())
        assert look(SECCOMP, pid) == []


@pytest.mark.parametrize(
    "listening",
    [
        program((RETURN, ALLOW), (RETURN, USER_NOTIF)),
        program(
            *[(LOAD_IMMEDIATE, ALLOW), (RETURN_LOADED, 0)],
            *[(LOAD_IMMEDIATE, USER_NOTIF | 7), (RETURN_LOADED, 0)],
        ),
    ],
    ids=["returned", "computed"],
)
def test_a_filter_with_a_listener_is_seen(listening):
    with (
        child(lambda: confine(HARMLESS, listening)) as pid,
        untouched(pid),
        pytest.raises(UnsupportedState) as caught,
    ):
        capture(SECCOMP, pid)
    assert "SECCOMP_RET_USER_NOTIF" in str(caught.value)


def test_a_filter_with_a_listener_is_named(tmp_path):
    with Program("s_seccomp", "listener", cwd=tmp_path) as work:
        with untouched(work.pid):
            message = refused(21, "dump", "--pid", work.pid, tmp_path / "image")
        assert "SECCOMP_RET_USER_NOTIF" in message
        assert work.ask("check") == "ok"


def test_without_the_privilege_it_is_named():
    weak = attrs.evolve(FEATURES, capabilities=FEATURES.capabilities - {"sys_admin"})
    with child(lambda: confine(HARMLESS)) as pid:
        record = capture(SECCOMP, pid)
    assert list(SECCOMP.check_host(record, FEATURES)) == []
    (finding,) = SECCOMP.check_host(record, weak)
    assert "cap_sys_admin" in str(finding)
    assert list(SECCOMP.check_host(SeccompRecord((), ()), weak)) == []


def test_a_restorer_that_is_confined_itself_is_named(tmp_path):
    image = tmp_path / "image"
    with Program("s_seccomp", "shared", cwd=tmp_path) as work:
        dump(work.pid, image)
        message = refused(
            21, "dump", "--pid", work.pid, image, preexec_fn=lambda: confine(HARMLESS)
        )
        assert "so is ckpt itself" in message
    message = refused(43, "restore", image, preexec_fn=lambda: confine(HARMLESS))
    assert "so is ckpt itself" in message


def test_an_embryo_in_strict_mode_still_obeys():
    with embryo() as planted:
        restore(SECCOMP, SeccompRecord((), (ConfinedRecord(1, ()),)), planted)
        (reply,) = planted.run([_ask_mode()])
        assert reply.value == 1


def _ask_mode():
    return call(NR.prctl, Prctl.GET_SECCOMP)


def test_a_filter_that_kills_at_everything():
    """Only our suspension stands between a dump and the end of the process."""

    def live_without_calls():
        confine(program((RETURN, 0x8000_0000)))
        while True:
            pass

    with child(lambda: None, live_without_calls) as pid:
        while not read_status(Pid(pid)).seccomp_mode:
            os.sched_yield()
        with untouched(pid):
            record = capture_suspended(pid)
    assert record.threads[0].chain == (0,)


def capture_suspended(pid):
    with (
        freeze(Pid(pid), ptrace.Option.SUSPEND_SECCOMP) as frozen,
        arena(Pid(pid), frozen.tgid, frozen.leader) as lent,
    ):
        (reply,) = lent.run(frozen.leader, [call(NR.getpid)])
        assert reply.value == pid
        capturing = SECCOMP.capture(Stopped(frozen, frozen.leader, FEATURES, {}))
        next(capturing)
        try:
            capturing.send([])
        except StopIteration as stop:
            return stop.value
    raise AssertionError("the capture asks for more")
