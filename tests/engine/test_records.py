"""The promise: every record comes back from an image as it went in, and nothing else is taken."""

import sys
import types
import typing

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.engine.records import (
    EndedLeader,
    Place,
    ProcessImage,
    ThreadImage,
    TreeImage,
    decode_tree,
    encode_tree,
)
from ckpt.errors import ImageCorrupt
from ckpt.image.codec import pack, unpack
from ckpt.process.clones import Shares
from ckpt.resources.file_identity import FileIdentity
from ckpt.resources.files.descriptions import Description, FdRecord, FilesRecord
from ckpt.resources.files.kinds import EXTERNAL, KINDS
from ckpt.resources.memory import KERNEL_VMAS, MemoryRecord, MmFields, VmaRecord
from ckpt.resources.registry import PROCESS, THREAD
from ckpt.units import Pid, Tid

PAGE_SIZE = 4096
PATH = "/images/job/gen-000000/manifest"

# What a path or a name of the target may hold: text, and bytes that are none.
texts = st.binary(max_size=12).map(lambda raw: raw.decode(errors="surrogateescape"))
PLAIN = {
    int: st.integers(-(1 << 63), (1 << 64) - 1),
    bool: st.booleans(),
    str: texts,
    bytes: st.binary(max_size=20),
}

# Fields whose record refuses what cannot be; each its own test where it is declared.
NARROW = {
    ("FilesystemRecord", "umask"): st.integers(0, 0o777),
    ("ForegroundRecord", "settings"): st.sampled_from([b"", bytes(44)]),
    ("ContentRecord", "kind"): st.sampled_from(["anonymous", "memfd"]),
    ("ContentRecord", "path"): texts.map(lambda text: text.replace("\0", "")),
    ("ContentRecord", "size_bytes"): st.integers(0, (1 << 63) - 1),
    ("ContentRecord", "mode"): st.integers(0, 0o7777),
    ("PipeRecord", "capacity_bytes"): st.integers(0, 1 << 20),
    ("TcpRecord", "family"): st.sampled_from([2, 10]),
    ("TcpRecord", "numbers"): st.just({}),
    ("TcpRecord", "structs"): st.just({}),
    ("EventfdRecord", "count"): st.integers(0, (1 << 64) - 2),
    ("EpollItem", "events"): st.integers(0, (1 << 32) - 1),
    ("EpollItem", "data"): st.integers(0, (1 << 64) - 1),
    ("ExternalRecord", "stream"): st.integers(0, 2),
    ("ExternalRecord", "streams"): st.just((0, 1, 2)),
    ("SeccompRecord", "threads"): st.just(()),
    ("SeccompRecord", "filters"): st.just(()),
    ("GroupRecord", "path"): st.just("/a"),
    ("NamespacesRecord", "own"): st.just(("uts",)),
    ("MountRecord", "kind"): st.sampled_from(["absent", "changed"]),
    ("MountRecord", "path"): st.just("/mnt"),
    ("MountRecord", "source"): st.just("/srv"),
    ("MountRecord", "data"): st.just(""),
    **{
        ("SysvRecord", name): st.just(())
        for name in ("attached", "segments", "semaphores", "queues", "settings")
    },
    ("RegistersRecord", "prstatus"): st.just(bytes(216)),
    ("RegistersRecord", "xstate"): st.just(bytes(832)),
    ("Owner", "kind"): st.integers(0, 2),
    ("Owner", "signal"): st.integers(0, 64),
}


def values_of(kind):
    """Return a strategy for a type as it stands in a record."""
    if attrs.has(kind):
        return records_of(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, args))
    if kind is type(None):
        return st.none()
    return PLAIN[kind]


def records_of(record):
    """Return a strategy for a class of records."""
    if record is FilesRecord:
        return tables_of_files()
    if record is MemoryRecord:
        return address_spaces()
    strategies = {}
    for field in attrs.fields(attrs.resolve_types(record)):
        narrow = NARROW.get((record.__name__, field.name))
        strategies[field.name] = values_of(field.type) if narrow is None else narrow
    return st.builds(record, **strategies)


@st.composite
def address_spaces(draw):
    """Mappings in order, of whole pages, with files that are there."""
    files = draw(st.lists(records_of(FileIdentity), max_size=2))
    borders = draw(st.lists(st.integers(1, 1 << 20), max_size=6, unique=True).map(sorted))
    vmas = tuple(
        VmaRecord(
            start=start * PAGE_SIZE,
            end=end * PAGE_SIZE,
            prot=draw(st.integers(0, 7)),
            shared=draw(st.booleans()),
            special=draw(st.sampled_from(["", *KERNEL_VMAS])),
            file=draw(st.integers(-1, len(files) - 1)),
            offset_bytes=draw(st.integers(0, 9)) * PAGE_SIZE,
            flags=tuple(draw(st.lists(texts, max_size=3))),
            name=draw(texts),
        )
        for start, end in zip(borders[::2], borders[1::2], strict=False)
    )
    return MemoryRecord(
        vmas=vmas,
        files=tuple(files),
        mm=draw(records_of(MmFields)),
        exe=draw(records_of(FileIdentity)),
        auxv=draw(PLAIN[bytes]),
        vdso=draw(texts),
    )


_PLAIN_KINDS = [
    kind
    for kind in (*KINDS, EXTERNAL)
    # Those that refuse most of what can be drawn have an example each in test_table.
    if kind.name
    in ("regular", "directory", "chardev", "pipe", "tcp", "eventfd", "epoll", "external")
]


@st.composite
def tables_of_files(draw):
    kinds = draw(st.lists(st.sampled_from(_PLAIN_KINDS), max_size=4))
    numbers = draw(
        st.sets(st.integers(0, 3000), min_size=len(kinds), max_size=2 * len(kinds)).map(sorted)
    )
    flags = PLAIN[int]
    return FilesRecord(
        tuple(
            Description(index, k.name, draw(flags), draw(records_of(k.record)))
            for index, k in enumerate(kinds)
        ),
        tuple(
            FdRecord(fd, index % len(kinds), draw(st.booleans()))
            for index, fd in enumerate(numbers)
        ),
    )


threads_of = {r.name: records_of(r.record) for r in THREAD}
numbers = st.lists(st.integers(1, 1 << 22), min_size=1, max_size=2, unique=True)


PLAIN[Pid] = st.integers(1, 1 << 22)
places = records_of(Place).map(lambda place: attrs.evolve(place, parent=Pid(0)))


@st.composite
def process_images(draw):
    """Return the image of a process of one or two threads; its leader is one of them."""
    tids = draw(numbers)
    return ProcessImage(
        pid=Pid(draw(st.sampled_from(tids))),
        place=draw(places),
        stopped_by=draw(st.integers(0, 64)),
        resources={r.name: draw(records_of(r.record)) for r in PROCESS},
        threads=tuple(
            ThreadImage(Tid(tid), {name: draw(of) for name, of in threads_of.items()})
            for tid in tids
        ),
    )


images = process_images()


@given(process_images())
@settings(max_examples=5, deadline=None)
def test_a_first_thread_that_has_ended_is_told_and_is_none_of_the_threads(one):
    ended = attrs.evolve(one, pid=Pid(1 << 23), ended_leader=EndedLeader(5 << 8, "gone"))
    raw = plain(ended)
    assert decode(raw).processes == (ended,)
    del raw["processes"][0]["ended_leader"]
    with pytest.raises(ImageCorrupt):
        decode(raw)


@given(process_images())
@settings(max_examples=5, deadline=None)
def test_what_is_shared_is_recorded_once_and_comes_back_to_both(one):
    shares = Shares(files=one.pid, directories=one.pid)
    place = attrs.evolve(one.place, parent=one.pid)
    child = attrs.evolve(one, pid=Pid(1 << 23), place=place, shares=shares)
    child = attrs.evolve(child, threads=(ThreadImage(Tid(1 << 23), one.threads[0].resources),))
    raw = unpack(pack(encode_tree(TreeImage((one, child)))))
    own, others = (set(process["resources"]) for process in raw["processes"])
    assert own - others == {"files", "file_owners", "filesystem"}
    assert decode(raw).processes == (one, child)


@attrs.frozen
class Manifest:
    """What `decode_tree` wants of one."""

    records: object


def decode(records):
    return decode_tree(Manifest(records), PATH)


def plain(image):
    """Return the records as they come out of a manifest."""
    return unpack(pack(encode_tree(TreeImage((image,)))))


@settings(max_examples=50)
@given(images)
def test_what_went_in_comes_back(image):
    assert decode(plain(image)) == TreeImage((image,))


@settings(max_examples=50)
@given(images)
def test_every_resource_of_the_registry_is_stored(image):
    (process,) = plain(image)["processes"]
    assert process["resources"].keys() == {resource.name for resource in PROCESS}
    for thread in process["threads"]:
        assert thread["resources"].keys() == {resource.name for resource in THREAD}


def iter_places(raw, way=()):
    """Walk everything inside of plain values: the container and the key in it."""
    entries = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for key, value in entries:
        yield (*way, key)
        if isinstance(value, dict | list):
            yield from iter_places(value, (*way, key))


def at(raw, way):
    for key in way:
        raw = raw[key]
    return raw


WRONG = [None, "text", b"bytes", 1.5, True, -1.0, [], {}, [None], {"x": 1}]


def refuses(raw):
    """Decode what must be refused."""
    with pytest.raises(ImageCorrupt) as caught:
        decode(raw)
    assert caught.value.path == PATH
    assert caught.value.exit_code == 31


def fits(kind, wrong):
    """Tell whether a wrong value happens to be right: of the same kind of plain value."""
    return type(kind) is type(wrong) and (not isinstance(wrong, list | dict))


@settings(max_examples=50)
@given(images, st.data())
def test_a_value_of_a_wrong_type_is_refused(image, data):
    raw = plain(image)
    way = data.draw(st.sampled_from(list(iter_places(raw))), "way")
    wrong = data.draw(st.sampled_from([w for w in WRONG if not fits(at(raw, way), w)]), "value")
    before = at(raw, way)
    if isinstance(before, list) and isinstance(wrong, list) and not wrong:
        wrong = [None]  # an empty list may be right
    if isinstance(before, dict) and isinstance(wrong, dict) and before.keys() <= wrong.keys():
        return
    at(raw, way[:-1])[way[-1]] = wrong
    refuses(raw)


def fields_with_a_default():
    """Return the names of fields that came later: an older image does not have them."""
    modules = [module for name, module in sys.modules.items() if name.startswith("ckpt.resources")]
    classes = {
        one
        for module in modules
        for one in vars(module).values()
        if isinstance(one, type) and attrs.has(one)
    }
    return {f.name for one in classes for f in attrs.fields(one) if f.default is not attrs.NOTHING}


OPTIONAL = fields_with_a_default()


@settings(max_examples=50)
@given(images, st.data())
def test_a_missing_field_is_refused(image, data):
    raw = plain(image)
    ways = [way for way in iter_places(raw) if isinstance(way[-1], str) and way[-1] not in OPTIONAL]
    way = data.draw(st.sampled_from(ways), "way")
    del at(raw, way[:-1])[way[-1]]
    refuses(raw)


@settings(max_examples=50)
@given(images, st.data())
def test_a_field_of_a_later_version_is_ignored(image, data):
    raw = plain(image)
    ways = [(), *(way for way in iter_places(raw) if isinstance(at(raw, way), dict))]
    for way in ways:
        if way[-1:] not in (("numbers",), ("structs",)):
            at(raw, way)["of a later version"] = data.draw(st.sampled_from(WRONG))
    assert decode(raw) == TreeImage((image,))


@pytest.mark.parametrize("records", [{}, {"processes": None}, {"processes": []}, {"processes": 7}])
def test_no_process(records):
    refuses(records)


@pytest.mark.parametrize("tids", [[], [2], [2, 3], [1, 1], [1, 2, 2], [1, 0], [1, -1]])
@given(st.data())
@settings(max_examples=1)
def test_threads_whose_numbers_cannot_be(tids, data):
    raw = plain(data.draw(images))
    (process,) = raw["processes"]
    thread = process["threads"][0]
    process["pid"], process["threads"] = 1, [thread | {"tid": tid} for tid in tids]
    refuses(raw)


def test_the_message_is_one_sentence():
    with pytest.raises(ImageCorrupt) as caught:
        decode({"processes": [{"pid": "seven", "stopped_by": 0}]})
    assert "\n" not in str(caught.value)
    assert "int expected, str found" in str(caught.value)


PLACE = {"parent": 0, "session": 1, "group": 1, "exit_signal": 17}


def test_a_deep_error_names_its_field():
    """A group of errors says only how many there are; the field is what helps."""
    image = {
        "pid": 1,
        "place": PLACE,
        "stopped_by": 0,
        "resources": {"cgroups": {"groups": []}, "memory": {}},
        "threads": [],
    }
    with pytest.raises(ImageCorrupt) as caught:
        decode({"processes": [image]})
    assert "vmas" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_inside_of_a_list_names_the_way():
    vma = dict.fromkeys(["start", "end", "prot", "file", "offset_bytes"], 0)
    vma |= {"shared": False, "special": "", "flags": [], "name": ""}
    file = {"path": "/x", "size_bytes": 0, "mtime_ns": 0}
    mm = dict.fromkeys([field.name for field in attrs.fields(MmFields)], 0)
    memory = {"vmas": [vma, vma | {"prot": "rw"}], "files": [], "mm": mm, "exe": file, "auxv": b""}
    process = {
        "pid": 1,
        "place": PLACE,
        "stopped_by": 0,
        "resources": {"cgroups": {"groups": []}, "memory": memory},
    }
    with pytest.raises(ImageCorrupt) as caught:
        decode({"processes": [process]})
    assert "memory.vmas.1.prot: int expected, str found" in str(caught.value)
