"""Which changes of a mapped file a restore accepts."""

import contextlib
import os

import attrs
import pytest

from ckpt.errors import RestoreFailed
from ckpt.kernel.features import probe_features
from ckpt.kernel.procfs.maps import read_maps
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.file_identity import identify
from ckpt.resources.memory import MEMORY, MemoryRecord, MmFields, VmaRecord, digest_of_vdso
from ckpt.units import Pid

PAGE = 4096
NO_FIELDS = MmFields(**dict.fromkeys(attrs.fields_dict(MmFields), 0))


@pytest.fixture
def files(tmp_path):
    """A file that is only read, one that is mapped shared and writable, and the program."""
    paths = [tmp_path / name for name in ("read", "written", "program")]
    for path in paths:
        path.write_bytes(bytes(2 * PAGE))
    return paths


def record_of(files):
    read, written, program = (identify(str(path), os.stat(path)) for path in files)
    vmas = [
        VmaRecord(at * PAGE, (at + 1) * PAGE, 3, bool(at), "", at, 0, ("mr", "mw"), "")
        for at in (0, 1)
    ]
    return MemoryRecord(tuple(vmas), (read, written), NO_FIELDS, program, b"", "")


def findings(record, *allowed):
    options = RestoreOptions(allow_changed=frozenset(map(str, allowed)))
    return [str(finding) for finding in MEMORY.check_files(record, options)]


def touch_later(path):
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_files_as_they_were_are_accepted(files):
    assert findings(record_of(files)) == []


def test_only_a_file_that_the_process_writes_may_have_changed(files):
    record = record_of(files)
    for path in files:
        touch_later(path)
    found = findings(record)
    assert [line.split(":")[0] for line in found] == [
        f"mapped file {files[0]}",
        f"mapped file {files[2]}",
    ]
    assert findings(record, files[0], files[2]) == []


def test_a_file_that_the_process_writes_may_have_grown_but_not_shrunk(files):
    record = record_of(files)
    os.truncate(files[1], 3 * PAGE)
    assert findings(record) == []
    os.truncate(files[1], PAGE)
    (found,) = findings(record)
    assert f"has {PAGE} bytes now, had {2 * PAGE}" in found
    assert findings(record, files[1]) == []


def test_a_missing_file_is_named_even_if_it_might_have_changed(files):
    record = record_of(files)
    for path in files:
        path.unlink()
    assert len(findings(record)) == 3
    assert len(findings(record, *files)) == 3


def test_a_file_that_cannot_be_opened_leaves_nothing_open(files):
    record = record_of(files)
    files[1].unlink()
    before = os.listdir("/proc/self/fd")
    with (
        contextlib.ExitStack() as helpers,
        pytest.raises(RestoreFailed, match=f"opening {files[1]}: No such file"),
    ):
        MEMORY.prepare(record, Opening(RestoreOptions(), helpers))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "guards",
    [((0, 4 * PAGE),), ((8 * PAGE, 9 * PAGE),), ((PAGE, PAGE),), ((0, PAGE // 2),), ((PAGE, 0),)],
)
def test_guard_regions_that_cannot_be_are_refused(files, guards):
    with pytest.raises(ValueError, match="guard region"):
        attrs.evolve(record_of(files), guards=guards)


def test_a_host_without_what_the_memory_needs_is_refused_by_name(files):
    record = record_of(files)
    sealed = attrs.evolve(record.vmas[0], flags=("sl",))
    record = attrs.evolve(
        record, vmas=(sealed, record.vmas[1]), guards=((0, PAGE),), vdso=own_vdso()
    )
    features = probe_features()
    for has, names in ((True, []), (False, ["guard regions", "sealed memory"])):
        features = attrs.evolve(features, pagemap_scan_guard=has, mseal=has)
        found = [str(finding).split(":")[0] for finding in MEMORY.check_host(record, features)]
        assert found == names


def own_vdso():
    me = Pid(os.getpid())
    return digest_of_vdso(me, read_maps(me))
