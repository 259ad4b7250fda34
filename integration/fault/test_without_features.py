"""The promise: what a kernel lacks is done another way, or refused by name; never done by half.

A feature is switched off by giving its call a number that no kernel has (`ckpt.fault`): what works
then has not used it. The image is compared with the process page by page, and the process that is
restored judges itself.
"""

import json
import os

import pytest

from ckpt import fault
from ckpt.engine.dump import dump
from integration.errors.refusals import nobody_left, refused, untouched
from integration.fault.stepping import compare_newest
from integration.harness import Restored, become_subreaper, ckpt
from integration.live.sweeping import Sweeper
from integration.procview import lasting_differences, view_at_rest
from integration.trackers.truth import settle_on_one_cpu
from integration.workloads.driver import Program, descendants

become_subreaper()

MISSING = 11
OTHER_WAYS = {
    "pagemap-scan": ("s_threads", "compare"),
    "userfaultfd": ("s_forked", "compare"),
    "kcmp": ("s_signals", "writeprotect"),
    "mseal": ("s_signals", "writeprotect"),
    "timer-ids": ("s_timers", "writeprotect"),
    "way-back": ("s_threads", "writeprotect"),
}
"""The feature, a program that needs it, the tracker that is used then."""
NEVER_STILL = ["s_timers"]
"""It counts in its memory, and checks that itself."""
ELSEWHERE = ["process-vm", "clone3", "pidfd-getfd", "twin"]
"""Tested below, each on its own."""


def without(feature):
    return os.environ | {fault.VARIABLE: f"without-{feature}"}


def test_each_feature_is_tested():
    assert {*OTHER_WAYS, *ELSEWHERE} == set(fault.FEATURES)


@pytest.mark.parametrize("feature", OTHER_WAYS)
def test_it_is_done_another_way(feature, tmp_path, monkeypatch, promise):
    promise("what needs a feature of the kernel is done another way without it").try_once()
    program, tracker = OTHER_WAYS[feature]
    image = tmp_path / "image"
    with Program(program, cwd=tmp_path) as target:
        for pid in (target.pid, *descendants(target.pid)):
            settle_on_one_cpu(pid)
        dump(target.pid, image)
        before = view_at_rest(target.pid)
        done = ckpt(
            *("dump", "--pid", target.pid, "--incremental", "--json", image), env=without(feature)
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tracker"] == tracker
        if program not in NEVER_STILL:
            compare_newest(image, target.pid)
        assert lasting_differences(before, target.pid) == []
        assert target.ask("check") == "ok"
    monkeypatch.setenv(fault.VARIABLE, f"without-{feature}")
    with Restored(image) as back:
        assert not lasting_differences(before, back.pid)
        assert back.ask("check") == "ok"


def test_many_pages_are_filled_another_way(tmp_path, monkeypatch):
    """By process_vm_writev, where a userfaultfd would have been worth it."""
    image = tmp_path / "image"
    with Program("writer", "--mib", "16", "--rate", "100", cwd=tmp_path) as target:
        dump(target.pid, image)
    monkeypatch.setenv(fault.VARIABLE, "without-userfaultfd")
    with nobody_left():
        assert "no userfaultfd" in refused(MISSING, "restore", "--lazy", image)
    with Restored(image) as back:
        assert back.ask("check") == "ok"


def test_what_no_twin_has_is_copied_while_it_stands(tmp_path):
    image = tmp_path / "image"
    with Sweeper("--mib", "8", cwd=tmp_path) as target:
        how = ("--tracker", "full", "--max-freeze", "0", "--json")
        done = ckpt("dump", "--pid", target.pid, *how, image, env=without("twin"))
        assert done.returncode == 0, done.stderr
        (warning,) = json.loads(done.stdout)["warnings"]
        assert "the kernel refused to clone it" in warning
        target.expect_unharmed()
    with Restored(image) as back:
        assert back.ask("check") == "ok"


def test_who_shares_what_is_not_guessed(tmp_path):
    """Without kcmp, of processes made by clone(2) with flags."""
    image = tmp_path / "image"
    with (
        Program("s_clones", "sibling", "files", "all", cwd=tmp_path) as target,
        untouched(target.pid),
    ):
        message = refused(MISSING, "dump", "--pid", target.pid, image, env=without("kcmp"))
        assert "this kernel has no kcmp" in message
        assert not image.exists()


@pytest.mark.parametrize(
    ("feature", "word"), [("process-vm", "read the memory"), ("pidfd-getfd", "take a descriptor")]
)
def test_what_cannot_be_read_is_refused(feature, word, tmp_path):
    image = tmp_path / "image"
    with Program("s_threads", cwd=tmp_path) as target:
        before = view_at_rest(target.pid)
        message = refused(MISSING, "dump", "--pid", target.pid, image, env=without(feature))
        assert f"system call to {word}" in message
        assert lasting_differences(before, target.pid) == []
        assert not image.exists()


@pytest.mark.parametrize(
    ("feature", "word"), [("process-vm", "system call to"), ("clone3", "no clone3 with a number")]
)
def test_what_no_process_can_be_made_with_is_refused(feature, word, tmp_path):
    image = tmp_path / "image"
    with Program("s_threads", cwd=tmp_path) as target:
        dump(target.pid, image)
    with nobody_left(target.pid):
        message = refused(MISSING, "restore", image, env=without(feature))
    assert word in message
