"""The promise: an epoch is read as it was written, or not at all."""

import json
import os
import select
import stat

import attrs
import pytest

from ckpt import fault
from ckpt.errors import HostFull
from ckpt.process.tree import Identity, read_identity
from ckpt.tracker import epoch as module
from ckpt.tracker.base import TrackerName
from ckpt.tracker.epoch import Epoch, advance, forget, invalidate, read_epoch, read_void
from ckpt.units import GenerationNo, Pid
from tests.kernel.children import running

PID = Pid(os.getpid())
PARENT = read_identity(Pid(os.getppid()))
EPOCH = Epoch(
    process=read_identity(PID),
    exec_id="7ffe0-00ff",
    chain_id="ab" * 16,
    generation=GenerationNo(7),
    digest="00ff",
    tracker=TrackerName.WRITEPROTECT,
    keeper=Identity("boot", Pid(4712), 1235),
)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """Use a directory of the test's own, which is not there yet."""
    monkeypatch.setattr(module, "STATE_DIR", tmp_path / "state")
    return tmp_path / "state"


@pytest.mark.parametrize("keeper", [EPOCH.keeper, None])
@pytest.mark.parametrize("tracker", TrackerName)
def test_what_was_written_is_read(tracker, keeper):
    written = attrs.evolve(EPOCH, tracker=tracker, keeper=keeper)
    advance(written)
    assert read_epoch(PID) == written
    assert isinstance(read_epoch(PID).tracker, TrackerName)


def test_each_process_has_its_own():
    other = attrs.evolve(EPOCH, process=PARENT, generation=GenerationNo(0))
    advance(EPOCH)
    advance(other)
    invalidate(PID)
    assert read_epoch(PID) is None
    assert read_epoch(PARENT.pid) == other


def test_the_newer_one_replaces_the_older(state):
    advance(EPOCH)
    advance(attrs.evolve(EPOCH, generation=GenerationNo(8)))
    assert read_epoch(PID).generation == 8
    assert [path.name for path in state.iterdir()] == [f"{PID}.epoch"], "and leaves nothing else"


def test_the_directory_is_nobody_elses(state):
    advance(EPOCH)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert stat.S_IMODE((state / f"{PID}.epoch").stat().st_mode) == 0o600


def test_nothing_was_ever_written():
    assert read_epoch(PID) is None
    invalidate(PID)


def test_invalidate_twice():
    advance(EPOCH)
    invalidate(PID)
    invalidate(PID)
    assert read_epoch(PID) is None


def without(key):
    raw = attrs.asdict(EPOCH)
    del raw[key]
    return json.dumps(raw)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "17",
        "\xff",
        *map(without, ["process", "exec_id", "chain_id", "generation", "tracker", "keeper"]),
        json.dumps(attrs.asdict(EPOCH) | {"tracker": "telepathy"}),
        json.dumps(attrs.asdict(EPOCH) | {"generation": "seven"}),
        json.dumps(attrs.asdict(EPOCH) | {"process": {"pid": PID}}),
        json.dumps(attrs.asdict(EPOCH) | {"process": PID}),
        json.dumps(attrs.asdict(EPOCH) | {"keeper": [1]}),
    ],
)
def test_what_cannot_be_understood_is_no_epoch(state, text):
    state.mkdir()
    (state / f"{PID}.epoch").write_bytes(text.encode("latin-1"))
    assert read_epoch(PID) is None


def test_a_state_directory_that_is_none(state):
    state.write_text("a file")
    with pytest.raises(HostFull, match="will be full") as caught:
        advance(EPOCH)
    assert str(state) in str(caught.value)
    assert read_epoch(PID) is None


def test_what_was_invalidated_still_names_its_keeper():
    advance(EPOCH)
    invalidate(PID)
    invalidate(PID)
    assert read_epoch(PID) is None
    assert read_void(PID) == EPOCH
    forget(PID)
    assert read_void(PID) is None


def test_a_keeper_that_is_named_no_more_is_ended():
    with running("wait()") as keeper:
        pidfd = os.pidfd_open(keeper.pid)
        advance(attrs.evolve(EPOCH, keeper=read_identity(Pid(keeper.pid))))
        invalidate(PID)
        advance(EPOCH)
        assert select.select([pidfd], [], [], 60)[0]
        os.close(pidfd)


def test_a_kill_in_a_write_leaves_what_names_the_keeper(state):
    child = os.fork()
    if child == 0:
        fault.plan("epoch-noted=kill")
        advance(EPOCH)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert read_epoch(PID) is None
    assert read_void(PID) == EPOCH
    assert len(list(state.iterdir())) == 1


def test_a_failed_write_leaves_nothing_but_what_names_the_keeper(state):
    """Something is in the way of the rename: the whole content was written by then."""
    advance(EPOCH)
    in_the_way = state / "4712.epoch"
    in_the_way.mkdir()
    other = attrs.evolve(EPOCH, process=Identity("boot", Pid(4712), 1))
    with pytest.raises(HostFull, match="Is a directory"):
        advance(other)
    assert {path.name for path in state.iterdir()} == {f"{PID}.epoch", "4712.epoch", "4712.void"}
    assert list(in_the_way.iterdir()) == []
    assert read_epoch(PID) == EPOCH


def written(state, process, name=None):
    """Write an epoch of `process` as if a dump of it had, under any name."""
    state.mkdir(exist_ok=True)
    path = state / (name or f"{process.pid}.epoch")
    path.write_text(json.dumps(attrs.asdict(attrs.evolve(EPOCH, process=process))))
    return path


def frames_of(state, pid, content=bytes(32)):
    path = state / f"{pid}.frames"
    path.write_bytes(content)
    return path


def test_what_ended_processes_leave_is_removed_with_the_next_epoch(state):
    with running("wait()") as alive:
        gone = read_identity(Pid(alive.pid))
    used_again = attrs.evolve(PARENT, start_ticks=PARENT.start_ticks - 1)
    layout = state / f"{gone.pid}.layout"
    ended = [written(state, gone), frames_of(state, gone.pid), written(state, used_again), layout]
    layout.write_text("1000 2000 rw-p\n")
    ended += [written(state, gone, f"{gone.pid}.{kind}") for kind in ("void", "writing")]
    advance(EPOCH)
    assert not [path.name for path in ended if path.exists()]
    assert read_epoch(PID) == EPOCH


def test_what_another_boot_left_is_removed(state):
    old = written(state, attrs.evolve(PARENT, boot_id="before"))
    advance(EPOCH)
    assert not old.exists()


def test_what_living_processes_have_stays(state):
    with running("wait()") as alive:
        living = [
            written(state, read_identity(Pid(alive.pid))),
            frames_of(state, alive.pid),
            frames_of(state, PID),
        ]
        advance(EPOCH)
        assert all(path.exists() for path in living)


def test_what_is_not_certainly_ours_is_left_alone(state):
    with running("wait()") as alive:
        gone = read_identity(Pid(alive.pid))
    other = written(state, gone, "notes.epoch")
    broken = written(state, gone)
    broken.write_text("{")
    odd = frames_of(state, gone.pid, b"odd")
    misnamed = written(state, gone, f"{PARENT.pid}.epoch")
    link = state / f"0{gone.pid}.epoch"
    link.symlink_to(other)
    linked = state / "999999999.epoch"
    linked.symlink_to(written(state, gone, "target"))
    (state / "999999998.frames").mkdir()
    before = sorted(state.iterdir())
    advance(EPOCH)
    assert sorted(state.iterdir()) == sorted([*before, state / f"{PID}.epoch"])
    assert all(path.exists() for path in (other, broken, odd, misnamed, link, linked))
