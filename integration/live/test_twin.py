"""The promise: a twin holds the memory of one moment, and nobody notices that there was one."""

import pytest

from ckpt.engine.dump import DumpOptions, dump
from ckpt.kernel import ptrace
from ckpt.process.freezer import freeze
from ckpt.process.twin import find_obstacle
from ckpt.units import Pid
from integration.harness import Restored
from integration.live.moments import Moment, at, twins_counted
from integration.live.sweeping import Sweeper

MIB = ("--mib", "48")


def options(tracker: str) -> DumpOptions:
    return DumpOptions(incremental=True, tracker=tracker, max_freeze_ms=0)


def take_with_twin(work: Sweeper, image, tracker: str):
    with twins_counted() as n_twins:
        result = dump(work.pid, image, options(tracker))
    assert n_twins == [1], "this was to be a dump through a twin"
    assert not result.warnings
    return result


def take_without_twin(work: Sweeper, image) -> str:
    with twins_counted() as n_twins:
        result = dump(work.pid, image, options("full"))
    assert n_twins == [0]
    return result.warnings[0]


def expect_all_there(image, at_generation: int | None = None) -> None:
    more = [] if at_generation is None else ["--at", str(at_generation)]
    with Restored(image, *more) as work:
        assert work.ask("check") == "ok"
        assert work.ask("step") == "stepped"
        assert work.ask("check") == "ok"


@pytest.mark.parametrize("tracker", ["full", "compare"])
def test_it_leaves_nothing_behind(tracker, tmp_path):
    with Sweeper(*MIB, cwd=tmp_path) as work:
        before = work.outside()
        take_with_twin(work, tmp_path / "other", "full")
        take_with_twin(work, tmp_path / "image", "full")
        if tracker == "compare":
            dump(work.pid, tmp_path / "image", options(tracker))
            assert work.ask("step") == "stepped"
            take_with_twin(work, tmp_path / "image", tracker)
        work.expect_unharmed()
        assert work.outside() == before
        assert work.clones() == []
        assert work.ask("check") == "ok"
        assert work.ask("fork") == "forked"
        assert work.ask("children") == "children none sigchld 1", "it hears of a child of its own"


@pytest.mark.parametrize("tracker", ["full", "compare"])
def test_what_is_written_right_after_the_thaw_is_not_in_the_image(tracker, tmp_path):
    image = tmp_path / "image"
    with Sweeper(*MIB, cwd=tmp_path) as work:
        assert work.ask("step") == "stepped"
        take_with_twin(work, image, "full")
        if tracker == "compare":
            dump(work.pid, image, options(tracker))
        for _ in range(3):
            # Everything is written anew, twice, before the first page of the twin is read.
            with at(Moment.STORING, 1, lambda: work.ask("step")):
                newest = take_with_twin(work, image, tracker).generation
        assert work.ask("check") == "ok"
    for generation in range(newest + 1):
        expect_all_there(image, generation)


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ("subreaper", "it adopts orphans"),
        ("nproc", "the kernel refused to clone it"),
    ],
)
def test_who_cannot_have_one_is_dumped_without(argument, why, tmp_path):
    # So that another user may read the program's directory.
    tmp_path.chmod(0o755)
    image = tmp_path / "image"
    with Sweeper(*MIB, argument, cwd=tmp_path) as work:
        before = work.outside()
        assert why in take_without_twin(work, image)
        work.expect_unharmed()
        assert work.outside() == before
        assert work.ask("check") == "ok"
        assert work.ask("step") == "stepped"
        assert why in take_without_twin(work, image)
        assert work.ask("check") == "ok"
    expect_all_there(image)


def test_a_filter_of_system_calls_is_not_asked_to_let_a_clone_pass(tmp_path):
    # A dump refuses such a process before; once it does not, this must hold still.
    with (
        Sweeper("--mib", "4", "seccomp", cwd=tmp_path) as work,
        freeze(Pid(work.pid), ptrace.Option.NONE) as frozen,
    ):
        assert "seccomp" in find_obstacle(frozen, adopts_orphans=False)
