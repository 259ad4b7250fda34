"""A generation is whole or absent, whichever step is the last one, or the first that fails."""

import os
import resource
from functools import partial

import pytest

from ckpt.errors import HostFull
from ckpt.image.chain import Chain
from ckpt.image.newest import read_newest
from ckpt.image.reader import PageReader
from ckpt.image.verify import verify
from ckpt.image.writer import WriterOptions
from tests.image.chain_model import (
    NoSyncStore,
    add_generation,
    data,
    hard_page,
    new_chain,
    pages_by_frames,
    parent,
    replay,
    soft_page,
)

HISTORY = [
    (None, {"mm": [data(0, soft_page(1), hard_page(2))]}),
    (0, {"mm": [parent(0, 1), data(1, hard_page(3), hard_page(4))]}),
]
STEPS = frozenset(
    {
        "make_root",
        "make_directory",
        "create_file",
        "append",
        "sync_file",
        "close_file",
        "sync_directory",
        "rename",
    }
)

N_STEPS_OF_NOTE = 6
"""Behind the commit: the file is created, written, synced, closed, renamed, its name synced."""


class Died(BaseException):
    pass


class SteppingStore(NoSyncStore):
    """Counts the steps that change the disk; does something before step number `stop_at`."""

    stop_at = None
    n_steps = 0

    def instead(self, step):
        raise HostFull(f"step {step}", "this is a test")

    def __getattribute__(self, name):
        if name in STEPS:
            number = self.n_steps
            self.n_steps += 1
            if number == self.stop_at:
                self.instead(name)
        return super().__getattribute__(name)


class DyingStore(SteppingStore):
    def instead(self, _step):
        os._exit(9)


def run_in_child(job):
    """Run `job` in a forked child and return its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            job()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def second_generation(chain):
    above, spaces = HISTORY[1]
    return add_generation(chain, spaces, above, options=WriterOptions(threads=1))


def opened(path, kind, stop_at=None):
    chain = Chain.open(path, make_store=kind)
    chain.store.stop_at = stop_at
    return chain


@pytest.fixture
def chain(tmp_path):
    made = new_chain(tmp_path / "chain")
    add_generation(made, HISTORY[0][1])
    return made


def count_steps(tmp_path):
    made = new_chain(tmp_path / "counted")
    add_generation(made, HISTORY[0][1])
    again = opened(made.path, SteppingStore)
    second_generation(again)
    return again.store.n_steps


def assert_replays(path, number):
    reader = PageReader(Chain.open(path), number)
    for space, pages in replay(HISTORY, number).items():
        assert pages_by_frames(reader, space) == pages


def temporaries(path):
    return [entry.name for entry in path.iterdir() if entry.name.startswith(".tmp-")]


def test_a_kill_at_any_step_leaves_the_old_chain_or_the_new_one(tmp_path, promise):
    kept = promise("a kill at any step of a writer leaves the old chain or the new one")
    n_steps = count_steps(tmp_path)
    assert n_steps > 8
    seen = set()
    for stop_at in range(n_steps):
        kept.try_once()
        path = tmp_path / f"killed-{stop_at}"
        add_generation(new_chain(path), HISTORY[0][1])
        status = run_in_child(partial(second_generation, opened(path, DyingStore, stop_at)))
        assert status == 9
        after = Chain.open(path)
        present = after.generations()
        seen.add(len(present))
        assert verify(after) == []
        for number in present:
            assert_replays(path, number)
        # The next writer tidies up, gets the number that is free, and notes it.
        written = second_generation(opened(path, NoSyncStore))
        assert written.generation == len(present)
        assert read_newest(after.store, after.chain_id) == written.generation
        assert temporaries(path) == []
        assert verify(Chain.open(path)) == []
    assert seen == {1, 2}, "before the rename and after it"


def test_an_error_at_any_step_leaves_nothing_behind(tmp_path, promise):
    kept = promise("an error at any step of a writer leaves nothing behind")
    for stop_at in range(count_steps(tmp_path) - N_STEPS_OF_NOTE):
        kept.try_once()
        path = tmp_path / f"failed-{stop_at}"
        add_generation(new_chain(path), HISTORY[0][1])
        failing = opened(path, SteppingStore, stop_at)
        with pytest.raises(HostFull):
            second_generation(failing)
        assert temporaries(path) == []
        present = Chain.open(path).generations()
        assert verify(Chain.open(path)) == []
        # The same Chain goes on; the step that failed does not fail again.
        assert second_generation(failing).generation == len(present)
        assert_replays(path, 1)


def test_an_error_behind_the_commit_leaves_a_chain_that_is_good(tmp_path, promise):
    """Who cannot note what is newest has made a generation all the same."""
    kept = promise("an error at any step of noting the newest leaves a good chain")
    n_steps = count_steps(tmp_path)
    seen = set()
    for stop_at in range(n_steps - N_STEPS_OF_NOTE, n_steps):
        kept.try_once()
        path = tmp_path / f"failed-{stop_at}"
        add_generation(new_chain(path), HISTORY[0][1])
        failing = opened(path, SteppingStore, stop_at)
        assert second_generation(failing).generation == 1
        assert temporaries(path) == []
        after = Chain.open(path)
        seen.add(read_newest(after.store, after.chain_id))
        assert (verify(after), after.require(None)) == ([], 1)
        assert second_generation(failing).generation == 2
        assert read_newest(after.store, after.chain_id) == 2
    assert seen == {0, 1}, "before the rename and after it"


def test_leaving_without_commit_leaves_nothing_behind(chain):
    before = sorted(chain.path.rglob("*"))
    with chain.lock(), chain.begin(0) as writer:
        writer.write_pages(hard_page(7) * 300)
    assert sorted(chain.path.rglob("*")) == before


def test_an_exception_of_the_dump_leaves_nothing_behind(chain):
    before = sorted(chain.path.rglob("*"))

    def interrupted_dump():
        with chain.lock(), chain.begin(0) as writer:
            writer.write_pages(hard_page(7) * 300)
            raise Died

    with pytest.raises(Died):
        interrupted_dump()
    assert sorted(chain.path.rglob("*")) == before
    assert second_generation(chain).generation == 1


def test_a_kill_while_the_header_is_made(tmp_path):
    path = tmp_path / "new"
    stop_at = 0
    while True:

        def make(stop_at=stop_at):
            class Dying(DyingStore):
                pass

            Dying.stop_at = stop_at
            Chain.create_or_open(path, make_store=Dying)

        status = run_in_child(make)
        if status == 0:
            break
        assert status == 9
        stop_at += 1
        # Whatever is there now, the next one can go on with.
        assert Chain.create_or_open(path).generations() == []
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()
    assert stop_at >= 5


def test_a_full_disk_is_told_in_one_sentence(chain):
    """RLIMIT_FSIZE makes the kernel refuse a write in earnest, as a full disk does."""

    def write_too_much():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))
        released = []
        try:
            with chain.lock(), chain.begin(0) as writer:
                for n in range(64):
                    pages = memoryview(hard_page(n) * 64)
                    writer.write_pages(pages, lambda n=n: released.append(n))
                writer.flush()
        except HostFull as error:
            text = str(error)
            if "File too large" in text and str(chain.path) in text and "\n" not in text:
                # Every buffer that was accepted or refused came back, once.
                os._exit(7 if released and sorted(released) == list(range(len(released))) else 8)

    assert run_in_child(write_too_much) == 7
    assert temporaries(chain.path) == []
    assert chain.generations() == [0]


class RecordingStore(NoSyncStore):
    """Writes down which step was done to which name."""

    def __init__(self, path):
        super().__init__(path)
        self.steps = []
        self.names = {}

    def make_directory(self, name):
        super().make_directory(name)
        self.steps.append(("make", name))

    def create_file(self, *parts):
        fd = super().create_file(*parts)
        self.names[fd] = parts[-1]
        return fd

    def append(self, fd, data):
        super().append(fd, data)
        self.steps.append(("write", self.names[fd]))

    def sync_file(self, fd):
        self.steps.append(("sync", self.names[fd]))

    def sync_directory(self, name="."):
        self.steps.append(("sync", name))

    def rename(self, name, new_name):
        super().rename(name, new_name)
        self.steps.append(("rename", new_name))


def test_the_order_of_writes_is_the_specified_one(chain):
    """What must be on the disk before what: a power cut cannot be had in a test."""
    recording = opened(chain.path, RecordingStore)
    second_generation(recording)
    steps = recording.store.steps
    repeats = [step for n, step in enumerate(steps) if n and step == steps[n - 1]]
    assert set(repeats) <= {("sync", "pages-0")}
    assert [step for n, step in enumerate(steps) if not n or step != steps[n - 1]] == [
        ("make", ".tmp-gen-000001"),
        ("write", "pages-0"),
        ("sync", "pages-0"),
        ("write", "manifest"),
        ("sync", "manifest"),
        ("sync", ".tmp-gen-000001"),
        ("rename", "gen-000001"),
        ("sync", "."),
        ("write", ".tmp-newest"),
        ("sync", ".tmp-newest"),
        ("rename", "newest"),
        ("sync", "."),
    ]


def test_the_header_is_made_in_the_same_order(tmp_path):
    stores = []

    def make_store(path):
        stores.append(RecordingStore(path))
        return stores[0]

    Chain.create_or_open(tmp_path / "other", make_store=make_store)
    assert stores[0].steps == [
        ("write", ".tmp-CKPT"),
        ("sync", ".tmp-CKPT"),
        ("rename", "CKPT"),
        ("sync", "."),
    ]
