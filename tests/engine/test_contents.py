"""The promise: a file without a name comes back byte for byte; a delta keeps what differs."""

import ctypes
import errno
import fcntl
import mmap
import os
import stat

import attrs
import pytest

from ckpt.engine.content_files import Contents
from ckpt.engine.contents import ContentCopy, mapped_end
from ckpt.engine.copying import CHUNK_BYTES, HOLD_BYTES, Copy
from ckpt.errors import RestoreFailed
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate
from ckpt.resources.content import ContentKind, ContentRecord, Found
from tests.image.chain_model import PAGE, hard_page, new_chain, soft_page

TORN_BYTES = 123


def record_of(fd, kind=ContentKind.MEMFD, **fields):
    status = os.fstat(fd)
    values = {
        "key": f"{status.st_dev:x}:{status.st_ino:x}",
        "kind": str(kind),
        "space": f"{kind}-1-fd{fd}",
        "path": "a name",
        "size_bytes": status.st_size,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "accessed_ns": status.st_atime_ns,
        "modified_ns": status.st_mtime_ns,
    }
    return ContentRecord(**(values | fields))


def store(chain, parent, fd, record):
    """Write a generation with one content, as a dump does; return its totals by fate."""
    reader = None if parent is None else PageReader(chain, parent)
    with chain.lock(), chain.begin(parent) as writer:
        contents = ContentCopy(Copy(writer), reader, 0)
        contents.read([Found(record, f"/proc/self/fd/{fd}")])
        contents.store()
        manifest = writer.commit(spaces=contents.tables(), records={}, host={}, tracker="full")
    totals = manifest.spaces[record.space].totals()
    return manifest.generation, {fate: n for fate, n in totals.items() if n}


def brought_back(chain, generation, record):
    """Return the content, the blocks and the seals of the file that a restore makes."""
    with Contents([record]) as contents:
        contents.fill(PageReader(chain, generation))
        fd = os.open(contents.paths[record.key], os.O_RDONLY)
        try:
            contents.finish()
            content = os.pread(fd, record.size_bytes + PAGE, 0)
            status = os.fstat(fd)
            return content, status
        finally:
            os.close(fd)


@pytest.fixture
def chain(tmp_path):
    return new_chain(tmp_path / "chain")


@pytest.fixture
def memfd():
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    yield fd
    os.close(fd)


def whole(fd):
    return os.pread(fd, os.fstat(fd).st_size, 0)


def test_holes_stay_holes_and_the_rest_comes_back(chain, memfd):
    os.truncate(memfd, 1000 * PAGE + TORN_BYTES)
    os.pwrite(memfd, hard_page(1) + soft_page(2), 500 * PAGE)
    os.pwrite(memfd, b"the end", 1000 * PAGE + 100)
    record = record_of(memfd)
    generation, totals = store(chain, None, memfd, record)
    assert totals == {Fate.DATA: 3, Fate.ZERO: 998}
    content, status = brought_back(chain, generation, record)
    assert content == whole(memfd)
    assert status.st_blocks == os.fstat(memfd).st_blocks


def test_a_delta_keeps_what_differs_from_the_parent_and_nothing_else(chain, memfd):
    os.truncate(memfd, 64 * PAGE)
    os.pwrite(memfd, b"".join(map(hard_page, range(32))), 0)
    record = record_of(memfd)
    full, _ = store(chain, None, memfd, record)
    os.pwrite(memfd, b"x", 3 * PAGE + 5)
    os.pwrite(memfd, hard_page(7), 7 * PAGE)  # what is there already
    os.pwrite(memfd, hard_page(99), 40 * PAGE)
    fcntl_punch(memfd, 10 * PAGE, 2 * PAGE)
    before = brought_back(chain, full, record)[0]
    delta, totals = store(chain, full, memfd, record)
    assert totals == {Fate.DATA: 2, Fate.PARENT: 29, Fate.ZERO: 33}
    assert brought_back(chain, delta, record)[0] == whole(memfd)
    assert brought_back(chain, full, record)[0] == before != whole(memfd)


def fcntl_punch(fd, start, n_bytes):
    """Make a hole (fallocate(2), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    assert libc.fallocate(fd, 3, start, n_bytes) == 0


def test_a_file_that_grows_or_shrinks_is_whole_in_every_generation(chain, memfd):
    generations = []
    parent = None
    for n_bytes in (5 * PAGE + 1, 9 * PAGE, PAGE // 2, 0, 3 * PAGE + 7):
        os.truncate(memfd, n_bytes)
        os.pwrite(memfd, hard_page(n_bytes)[: n_bytes // 2], 0)
        record = record_of(memfd)
        parent, _ = store(chain, parent, memfd, record)
        generations.append((parent, record, whole(memfd)))
    for generation, record, content in generations:
        assert brought_back(chain, generation, record)[0] == content


def test_more_than_the_buffers_hold_is_stored_too(chain, memfd):
    """The buffers go round while the tree stands; all pages are in their places in the end."""
    n_bytes = 5 * CHUNK_BYTES + 3 * PAGE
    assert n_bytes < HOLD_BYTES
    os.pwrite(memfd, b"".join(soft_page(n) for n in range(n_bytes // PAGE)), 0)
    record = record_of(memfd)
    generation, totals = store(chain, None, memfd, record)
    assert totals == {Fate.DATA: n_bytes // PAGE}
    assert brought_back(chain, generation, record)[0] == whole(memfd)


def test_what_a_mapping_shows_behind_the_end_comes_back(chain, memfd):
    os.truncate(memfd, PAGE)
    with mmap.mmap(memfd, PAGE) as mapped:
        os.truncate(memfd, TORN_BYTES)
        # Writing through the mapping does not ask for the size.
        mapped[TORN_BYTES + 5 : TORN_BYTES + 9] = b"here"
    record = record_of(memfd)
    generation, _ = store(chain, None, memfd, record)
    with Contents([record]) as contents:
        contents.fill(PageReader(chain, generation))
        fd = os.open(contents.paths[record.key], os.O_RDONLY)
        assert os.fstat(fd).st_size == TORN_BYTES
        with mapped_end(record, fd, mmap.PROT_READ) as (address, len_bytes):
            assert len_bytes == PAGE - TORN_BYTES
            assert ctypes.string_at(address, 12) == b"\0\0\0\0\0here\0\0\0"
        os.close(fd)


@pytest.mark.parametrize("seals", [0, 1, 2 | 4, 2 | 4 | 8, 16, 1 | 16, 1 | 2 | 4 | 8 | 16])
def test_seals_come_back_and_do_not_forbid_the_filling(chain, memfd, seals):
    os.pwrite(memfd, hard_page(1), 0)
    generation, _ = store(chain, None, memfd, record_of(memfd))
    record = record_of(memfd, seals=seals)
    with Contents([record]) as contents:
        contents.fill(PageReader(chain, generation))
        fd = os.open(contents.paths[record.key], os.O_RDWR)
        # A mapping that was there before the seal must be possible again.
        mapped = None if seals & 8 else mmap.mmap(fd, PAGE)
        contents.finish()
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == seals
        assert os.pread(fd, PAGE, 0) == hard_page(1)
        if mapped:
            mapped.close()
        os.close(fd)


def test_shared_memory_is_shown_as_such(memfd):
    record = record_of(memfd, ContentKind.ANONYMOUS, path="/dev/zero", size_bytes=5 * PAGE)
    with Contents([record]) as contents:
        fd = os.open(contents.paths[record.key], os.O_RDWR)
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/zero (deleted)"
        assert os.fstat(fd).st_size == 5 * PAGE
        os.close(fd)


# -- names -----------------------------------------------------------------------------------------


def deleted(folder, name="file", kind=ContentKind.DELETED, **fields):
    fd = os.memfd_create("x")
    record = record_of(fd, kind, path=str(folder / name), mode=0o640, **fields)
    os.close(fd)
    return record


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_deleted_file_is_made_where_it_was_and_leaves_no_name(tmp_path):
    (tmp_path / "taken").write_text("another")
    records = [deleted(tmp_path), deleted(tmp_path, "taken"), deleted(tmp_path / "no" / "folder")]
    records = [attrs.evolve(one, key=str(n)) for n, one in enumerate(records)]
    with Contents(records) as contents:
        shown = [os.readlink(contents.paths[one.key]) for one in records]
        assert listing(tmp_path) == ["taken"]
    assert shown[0] == f"{tmp_path}/file (deleted)"
    assert shown[1].startswith(f"{tmp_path}/.taken.")
    assert shown[2] == f"{tmp_path}/no/folder/file (deleted)"
    assert (tmp_path / "taken").read_text() == "another"


def test_a_spare_name_does_not_grow(tmp_path):
    (tmp_path / "taken").touch()
    record = deleted(tmp_path, "taken")
    for _ in range(3):
        with Contents([record]) as contents:
            shown = os.readlink(contents.paths[record.key]).removesuffix(" (deleted)")
            assert len(os.path.basename(shown)) == len(".taken.") + 16
            (tmp_path / os.path.basename(shown)).touch()
            record = attrs.evolve(record, path=shown)


def test_a_deleted_directory_has_its_name_until_the_end(tmp_path):
    record = deleted(tmp_path / "up", "here", ContentKind.DIRECTORY)
    with Contents([record]) as contents:
        assert listing(tmp_path) == ["up", "up/here"]
        assert contents.paths[str(tmp_path / "up" / "here")] == str(tmp_path / "up" / "here")
        contents.finish()
        assert listing(tmp_path) == []


def test_posix_shm_takes_its_name_at_the_end_only(tmp_path):
    (tmp_path / "file").write_text("old")
    record = deleted(tmp_path, kind=ContentKind.POSIX_SHM)
    with Contents([record]) as contents:
        assert (tmp_path / "file").read_text() == "old"
        contents.finish()
        assert (tmp_path / "file").read_text() == ""
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert listing(tmp_path) == ["file"]


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("old")
    n_open = len(os.listdir("/proc/self/fd"))
    records = [
        deleted(tmp_path, kind=ContentKind.POSIX_SHM),
        deleted(tmp_path, "folder", ContentKind.DIRECTORY),
        deleted(tmp_path / "folder" / "below"),
    ]
    with pytest.raises(ZeroDivisionError), Contents(records):
        raise ZeroDivisionError
    assert listing(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"
    blocked = deleted(tmp_path / "file", "below")  # a file where a directory must be
    with (
        pytest.raises(RestoreFailed, match=os.strerror(errno.EEXIST)),
        Contents([*records, blocked]),
    ):
        pass
    assert listing(tmp_path) == ["file"]
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_a_directory_whose_name_is_taken_is_told(tmp_path):
    (tmp_path / "here").touch()
    with (
        pytest.raises(RestoreFailed, match=os.strerror(errno.EEXIST)),
        Contents([deleted(tmp_path, "here", ContentKind.DIRECTORY)]),
    ):
        pass
    assert listing(tmp_path) == ["here"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kind": "pipe"}, "unknown kind"),
        ({"size_bytes": -1}, "no file has -1 bytes"),
        ({"mode": 0o10000}, "mode 10000"),
        ({"path": "a\0b"}, "is no name"),
        ({"kind": "deleted", "path": "relative"}, "is no name"),
    ],
)
def test_what_no_file_can_be_is_refused(memfd, fields, problem):
    with pytest.raises(ValueError, match=problem):
        record_of(memfd, **({"kind": "memfd"} | fields))
