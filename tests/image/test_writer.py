"""The writer under load: order, ownership of buffers, bounds, and what a failure does."""

import queue
import threading

import pytest

from ckpt.errors import HostFull
from ckpt.image.chain import Chain
from ckpt.image.format import Fate
from ckpt.image.pages import MAX_FRAME_BYTES, Encoding
from ckpt.image.pipeline import SLOTS_PER_THREAD
from ckpt.image.reader import PageReader
from ckpt.image.runs import RunTableBuilder
from ckpt.image.writer import WriterOptions
from ckpt.units import addr_range
from tests.image.chain_model import PAGE, NoSyncStore, hard_page, new_chain, soft_page

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path):
    return new_chain(tmp_path / "chain")


def commit_all(writer):
    """Commit every page written so far as one run from address 0."""
    builder = RunTableBuilder(PAGE)
    builder.add(0, writer.n_pages, Fate.DATA, 0)
    return writer.commit(spaces={"mm": builder.build()}, records={}, host={}, tracker="full")


def read_back(chain, number, n_bytes):
    return PageReader(Chain.open(chain.path), number).read("mm", addr_range(0, n_bytes))


def big_buffers(n, n_bytes):
    """Buffers of which some compress, some do not, and no two are the same."""
    made = []
    for seed in range(n):
        page = soft_page(seed) if seed % 3 else hard_page(seed)
        made.append((page[: PAGE - 4] + seed.to_bytes(4, "little")) * (n_bytes // PAGE))
    return made


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_pages_keep_their_order_whichever_thread_is_first(chain, threads):
    buffers = big_buffers(24, MIB // 4)
    with chain.lock(), chain.begin(None, options=WriterOptions(threads=threads)) as writer:
        firsts = [writer.write_pages(buffer) for buffer in buffers]
        commit_all(writer)
    assert firsts == [n * 64 for n in range(24)]
    whole = b"".join(buffers)
    assert read_back(chain, 0, len(whole)) == whole


def test_the_same_input_gives_the_same_file_with_any_number_of_threads(chain):
    buffers = big_buffers(16, MIB // 4)
    contents = []
    for number, threads in enumerate((1, 2, 5)):
        with chain.lock(), chain.begin(None, options=WriterOptions(threads=threads)) as writer:
            for buffer in buffers:
                writer.write_pages(buffer)
            commit_all(writer)
        contents.append((chain.path / f"gen-{number:06d}/pages-0").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_a_buffer_is_the_callers_again_once_released_and_only_then(chain):
    """The pool scribbles over a buffer the moment it comes back."""
    pool = queue.SimpleQueue()
    for _ in range(3):
        pool.put(bytearray(MIB // 2))
    contents = big_buffers(40, MIB // 2)
    n_released = []

    def give_back(buffer):
        buffer[:] = b"\xee" * len(buffer)
        n_released.append(1)
        pool.put(buffer)

    with chain.lock(), chain.begin(None) as writer:
        for content in contents:
            buffer = pool.get()
            buffer[:] = content
            writer.write_pages(memoryview(buffer), lambda buffer=buffer: give_back(buffer))
        commit_all(writer)
    assert len(n_released) == 40
    assert pool.qsize() == 3
    whole = b"".join(contents)
    assert read_back(chain, 0, len(whole)) == whole


def test_a_buffer_of_many_frames_is_released_once_after_the_last(chain):
    content = b"".join(big_buffers(5, MIB)) + soft_page(7)
    buffer = bytearray(content)
    released = threading.Event()

    def scribble():
        assert not released.is_set()
        buffer[:] = bytes(len(buffer))
        released.set()

    with chain.lock(), chain.begin(None) as writer:
        writer.write_pages(memoryview(buffer), scribble)
        manifest = commit_all(writer)
    assert released.is_set()
    assert list(manifest.page_files[0].frames.n_pages) == [256] * 5 + [1]
    assert read_back(chain, 0, len(content)) == content


def test_short_writes_share_frames_and_are_released_at_once(chain):
    pages = [soft_page(n) for n in range(600)]
    buffer = bytearray(PAGE)
    n_released = []
    with chain.lock(), chain.begin(None) as writer:
        for n, page in enumerate(pages):
            buffer[:] = page
            assert writer.write_pages(buffer, lambda: n_released.append(1)) == n
            assert len(n_released) == n + 1
        manifest = commit_all(writer)
    assert list(manifest.page_files[0].frames.n_pages) == [256, 256, 88]
    assert read_back(chain, 0, 600 * PAGE) == b"".join(pages)


def test_short_and_long_writes_stay_in_order(chain):
    parts = [soft_page(1), hard_page(2) * 100, soft_page(3), soft_page(4) * 300, hard_page(5)]
    with chain.lock(), chain.begin(None) as writer:
        for part in parts:
            writer.write_pages(part)
        manifest = commit_all(writer)
    whole = b"".join(parts)
    assert read_back(chain, 0, len(whole)) == whole
    assert max(manifest.page_files[0].frames.n_pages) * PAGE == MAX_FRAME_BYTES


def test_an_empty_write_is_released_and_takes_no_place(chain):
    released = []
    with chain.lock(), chain.begin(None) as writer:
        assert writer.write_pages(b"", lambda: released.append(1)) == 0
        assert writer.write_pages(soft_page(1)) == 0
        commit_all(writer)
    assert released == [1]


def test_a_generation_without_pages_has_no_page_file(chain):
    with chain.lock(), chain.begin(None) as writer:
        manifest = commit_all(writer)
    assert manifest.page_files == ()
    assert [entry.name for entry in (chain.path / "gen-000000").iterdir()] == ["manifest"]


def test_part_of_a_page_is_refused_and_the_buffer_comes_back(chain):
    released = []
    with chain.lock(), chain.begin(None) as writer:
        with pytest.raises(ValueError, match="whole number of pages"):
            writer.write_pages(bytes(PAGE + 1), lambda: released.append(1))
        assert writer.n_pages == 0
    assert released == [1]


def test_page_files_are_closed_when_long_enough(chain):
    options = WriterOptions(page_file_bytes=2 * PAGE)
    pages = [hard_page(n) for n in range(5)]
    with chain.lock(), chain.begin(None, options=options) as writer:
        for page in pages:
            writer.write_pages(page)
            writer.flush()
        manifest = commit_all(writer)
    assert [file.size_bytes for file in manifest.page_files] == [2 * PAGE, 2 * PAGE, PAGE]
    assert [file.frames.encodings[0] for file in manifest.page_files] == [Encoding.RAW] * 3
    assert read_back(chain, 0, 5 * PAGE) == b"".join(pages)


def test_no_more_is_under_way_than_the_bound(chain):
    """Counts, when a frame is released, how many were handed over since: no clock needed."""
    threads = 2
    handed = 0
    most = []
    content = hard_page(1) * 256

    def released(number):
        most.append(handed - number)

    with chain.lock(), chain.begin(None, options=WriterOptions(threads=threads)) as writer:
        for number in range(100):
            handed += 1
            writer.write_pages(content, lambda number=number: released(number))
        writer.flush()
    assert len(most) == 100
    # One more than the slots: the one that write_pages is waiting with.
    assert max(most) <= threads * SLOTS_PER_THREAD + 1


class FullStore(NoSyncStore):
    """Has room for so many frames."""

    room = 3

    def append(self, fd, data):
        if self.room == 0:
            raise HostFull("no space left on the test", "make room")
        self.room -= 1
        super().append(fd, data)


def test_a_failed_write_is_raised_soon_and_every_buffer_comes_back(tmp_path):
    chain = Chain.create_or_open(tmp_path / "chain", make_store=NoSyncStore)
    full = Chain.open(chain.path, make_store=FullStore)
    handed, released = 0, []
    content = hard_page(1) * 256

    def dump():
        nonlocal handed
        with full.lock(), full.begin(None) as writer:
            while True:
                handed += 1
                writer.write_pages(content, lambda: released.append(1))

    with pytest.raises(HostFull, match="no space left on the test"):
        dump()
    assert len(released) == handed
    assert handed < 3 + 2 * SLOTS_PER_THREAD * 2
    assert [entry.name for entry in chain.path.iterdir() if entry.name != "lock"] == ["CKPT"]


def test_after_a_failure_flush_and_commit_fail_too(tmp_path):
    Chain.create_or_open(tmp_path / "chain", make_store=NoSyncStore)
    full = Chain.open(tmp_path / "chain", make_store=FullStore)
    full.store.room = 0
    with full.lock(), full.begin(None) as writer:
        writer.write_pages(soft_page(1))
        for _ in range(2):
            with pytest.raises(HostFull):
                writer.flush()
        with pytest.raises(HostFull):
            commit_all(writer)
    assert full.generations() == []


def test_a_dump_interrupted_within_a_buffer_gets_it_back_when_the_threads_are_done(chain):
    """Ctrl-C while write_pages waits, with some frames of the buffer under way."""
    buffer = bytearray(hard_page(1) * 256 * 5)
    released = []

    def interrupted_dump():
        with chain.lock(), chain.begin(None) as writer:
            submit = writer._pipeline._workers.submit
            n_submitted = 0

            def submit_three(job):
                nonlocal n_submitted
                if n_submitted == 3:
                    raise KeyboardInterrupt
                n_submitted += 1
                return submit(job)

            writer._pipeline._workers.submit = submit_three
            try:
                writer.write_pages(memoryview(buffer), lambda: released.append(1))
            finally:
                assert released == []

    with pytest.raises(KeyboardInterrupt):
        interrupted_dump()
    assert released == [1]
    assert not chain.path.exists(), "a chain that was made for it alone"


def test_threads_end_with_the_writer(chain):
    before = threading.active_count()
    with chain.lock():
        with chain.begin(None) as writer:
            writer.write_pages(soft_page(1) * 600)
            commit_all(writer)
        assert threading.active_count() == before
        with chain.begin(None) as writer:
            writer.write_pages(soft_page(1) * 600)
        assert threading.active_count() == before


def test_a_closed_writer_takes_nothing(chain):
    with chain.lock(), chain.begin(None) as writer:
        commit_all(writer)
        with pytest.raises(ValueError, match="closed"):
            writer.write_pages(soft_page(1))


def test_writing_no_pages_makes_no_frame(tmp_path):
    chain = Chain.create_or_open(tmp_path / "chain")
    released = []
    with chain.lock(), chain.begin(None) as writer:
        assert writer.write_pages(b"", lambda: released.append(1)) == 0
        writer.flush()
        manifest = writer.commit(spaces={}, records={}, host={}, tracker="full")
    assert released == [1]
    assert manifest.stored_bytes == 0
