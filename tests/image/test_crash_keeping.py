"""A kill or a power cut at any step of `squash` and `prune` loses nothing that was to be kept.

Each step that changes the disk is the last one, in turn. After a power cut all is gone, too, that
was not waited for: content of files that were not synced, and names in directories that were not.
"""

import os
import shutil
from functools import partial

import pytest

from ckpt.errors import HostFull
from ckpt.image import placing
from ckpt.image.chain import Chain
from ckpt.image.prune import Retention, prune
from ckpt.image.squash import squash
from ckpt.image.store import Store
from tests.image.chain_model import add_generation, new_chain, parent
from tests.image.test_crash import STEPS as STEPS_OF_WRITING
from tests.image.test_crash import run_in_child, temporaries
from tests.image.test_squash import HISTORY, assert_replays

# Two deltas on generation 1, so that something is kept that is no child of what is merged.
BRANCHED = [*HISTORY, (1, {"mm": [parent(0, 11)]}), (3, {"mm": [parent(0, 11)]})]
STEPS = STEPS_OF_WRITING | {"link_file", "remove_file", "remove_temporary"}
JOBS = {
    "squash": (partial(squash, number=3), {0, 1, 3, 4, 5}),
    "prune": (partial(prune, retention=Retention(1, 2.0)), {1, 3, 5}),
}


class SteppingStore(Store):
    stop_at = None
    n_steps = 0

    def stop(self):
        raise HostFull(f"step {self.stop_at}", "this is a test")

    def __getattribute__(self, name):
        if name in STEPS:
            number = self.n_steps
            self.n_steps += 1
            if number == self.stop_at:
                self.stop()
        return super().__getattribute__(name)


class KilledStore(SteppingStore):
    def stop(self):
        os._exit(9)


class PowerCutStore(KilledStore):
    """Undoes, when it stops, what was done and not synced; the last first."""

    n_lost = None

    def __init__(self, path):
        super().__init__(path)
        self.spare = path.parent / f"{path.name}-spare"
        self.unsynced = []  # (the directory that must be synced, what is in it now, how to undo it)
        self.contents = {}  # descriptor -> its file, while it is not synced

    def stop(self):
        for path in self.contents.values():
            if path.exists():
                path.write_bytes(b"")
        for _, _, undo in reversed(self.unsynced[: self.n_lost]):
            undo()
        os._exit(9)

    def note(self, path, undo):
        self.unsynced.append((path.parent, path, undo))

    def make_directory(self, name):
        Store.make_directory(self, name)
        self.note(self.path / name, lambda: shutil.rmtree(self.path / name, ignore_errors=True))

    def create_file(self, *parts):
        fd = Store.create_file(self, *parts)
        path = self.path.joinpath(*parts)
        self.contents[fd] = path
        self.note(path, lambda: path.unlink(missing_ok=True))
        return fd

    def link_file(self, old, new):
        path = self.path.joinpath(*new)
        self.note(path, lambda: path.unlink(missing_ok=True))
        return Store.link_file(self, old, new)

    def sync_file(self, fd):
        self.contents.pop(fd, None)

    def sync_directory(self, name="."):
        self.unsynced = [one for one in self.unsynced if one[0] != self.path / name]

    def rename(self, name, new_name):
        old, new = self.path / name, self.path / new_name
        self.spare.mkdir(exist_ok=True)
        saved = self.spare / f"{len(list(self.spare.iterdir()))}"
        if new.exists():
            os.link(new, saved)
        Store.rename(self, name, new_name)

        def undo():
            if old.parent.exists():
                os.rename(new, old)
            else:
                new.unlink()
            if saved.exists():
                os.rename(saved, new)

        # A name that is gone again cannot be lost.
        self.unsynced = [one for one in self.unsynced if one[1] != old]
        self.note(new, undo)


class DisorderStore(PowerCutStore):
    """Loses the first step that was not synced, and keeps those behind it."""

    n_lost = 1


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Generations 0 and 1, 2 and 3, 4 and 5 are each of one period of two seconds."""
    made = new_chain(tmp_path_factory.mktemp("crash") / "chain")
    for number, (above, spaces) in enumerate(BRANCHED):
        add_generation(made, spaces, above, created_s=float(number + 2))
    return made.path


def start(original, path, kind, stop_at):
    shutil.copytree(original, path)
    chain = Chain.open(path, make_store=kind)
    chain.store.stop_at = stop_at
    return chain


def iter_stopped(original, tmp_path, kind, job):
    """Do `job` on a copy of the chain, with each of its steps as the one where it stops."""
    counted = start(original, tmp_path / "counted", SteppingStore, None)
    job(counted)
    for stop_at in range(counted.store.n_steps):
        path = tmp_path / f"stopped-{stop_at}"
        yield path, partial(job, start(original, path, kind, stop_at))
        shutil.rmtree(path)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("kind", [KilledStore, PowerCutStore, DisorderStore])
def test_stopped_at_any_step_everything_that_is_kept_is_whole(
    original, tmp_path, monkeypatch, promise, kind, name
):
    stays = promise("what is kept is whole, stopped at any step of removing the rest")
    if kind is not KilledStore:
        monkeypatch.setattr(placing, "LINK_FROM_BYTES", 1)
    job, kept = JOBS[name]
    seen = set()
    for path, stopped in iter_stopped(original, tmp_path, kind, job):
        stays.try_once()
        assert run_in_child(stopped) == 9
        present = Chain.open(path).generations()
        assert kept <= set(present)
        assert_replays(path, BRANCHED, present)
        seen.add(tuple(present))
        # The next writer tidies up, and the same again ends where it would have.
        after = Chain.open(path)
        with after.lock():
            assert temporaries(path) == []
            assert all(not after.list_strays(after.manifest(n)) for n in present)
        job(after)
        assert_replays(path, BRANCHED, after.generations())
    assert len(seen) > 1, "before the first one was removed, and after it"


@pytest.mark.parametrize("name", JOBS)
def test_an_error_at_any_step_leaves_nothing_behind(original, tmp_path, promise, name):
    stays = promise("an error at any step of removing generations harms none that is kept")
    job, kept = JOBS[name]
    for path, failing in iter_stopped(original, tmp_path, SteppingStore, job):
        stays.try_once()
        with pytest.raises(HostFull):
            failing()
        present = Chain.open(path).generations()
        assert kept <= set(present)
        assert_replays(path, BRANCHED, present)
