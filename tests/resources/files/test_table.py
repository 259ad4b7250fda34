"""The record of all descriptors: what it refuses, and what follows from it without a kernel."""

from types import SimpleNamespace

import attrs
import cattrs
import pytest

from ckpt.errors import UsageError
from ckpt.image.codec import pack, unpack
from ckpt.kernel.arch import NR
from ckpt.process.stand_in import Identity
from ckpt.resources.base import RestoreOptions
from ckpt.resources.file_identity import FileIdentity
from ckpt.resources.files import kinds, placing, table
from ckpt.resources.files.chardev import ChardevRecord
from ckpt.resources.files.descriptions import Description, FdRecord, FilesRecord
from ckpt.resources.files.directory import DirectoryRecord
from ckpt.resources.files.epoll import EpollItem, EpollRecord
from ckpt.resources.files.eventfd import EventfdRecord
from ckpt.resources.files.external import ExternalRecord
from ckpt.resources.files.fifo import Deleted, FifoRecord
from ckpt.resources.files.inet import InetAddress, Membership
from ckpt.resources.files.inode_path import Inode
from ckpt.resources.files.inotify import InotifyRecord, WatchRecord
from ckpt.resources.files.linked import LinkedRecord
from ckpt.resources.files.mqueue import MqueueRecord
from ckpt.resources.files.netlink import NetlinkRecord
from ckpt.resources.files.packet import LinkMembership, PacketRecord
from ckpt.resources.files.pidfd import PidfdRecord
from ckpt.resources.files.pipe import PipeRecord
from ckpt.resources.files.process_file import ProcessFileRecord
from ckpt.resources.files.pty import MasterFile, PairState, PtyRecord
from ckpt.resources.files.pty_queues import Queues
from ckpt.resources.files.raw import RawRecord
from ckpt.resources.files.regular import RegularRecord
from ckpt.resources.files.signalfd import SignalfdRecord
from ckpt.resources.files.sockopts import SocketOptions
from ckpt.resources.files.tcp import TcpRecord
from ckpt.resources.files.timerfd import TimerfdRecord
from ckpt.resources.files.udp import Datagram, UdpRecord
from ckpt.resources.files.unix_build import NOBODY, UnixRecord
from ckpt.resources.files.unix_passed import Passed
from ckpt.resources.files.unix_queue import Message
from ckpt.resources.plain import structure
from tests.resources.files.test_tcp_record import RECORD as CONNECTION

O_RDWR = 2
OPTIONS = SocketOptions(
    {"SO_PASSCRED": 1}, {"SO_LINGER": bytes(8)}, 0, 7, bytes(8), filter_locked=True
)

RECORDS = {
    "regular": RegularRecord(
        FileIdentity("/a \udcff", 10, 2**62, "ab"), 5, written=True, by_name=False
    ),
    "directory": DirectoryRecord("/d", 2**63 - 1),
    "linked": LinkedRecord(FileIdentity("/a", 10, 2**62, "ab"), 5, written=False, opened_as="/was"),
    "chardev": ChardevRecord("/dev/null", 1, 3),
    "pty": PtyRecord(
        *("master", "/dev/ptmx", 3),
        hung_up=False,
        exclusive=False,
        master=MasterFile("/dev/ptmx", O_RDWR),
        pair=PairState(
            *(bytes(44), bytes(36), (24, 80, 0, 65535)),
            packets=True,
            locked=False,
            exclusive=True,
            slave_closed=False,
            mode=0o620,
            uid=0,
            gid=5,
            queues=Queues(b"typed", b"shown"),
        ),
    ),
    "pipe": PipeRecord(4711, 65536, packets=True, content=(b"one", b"\xff")),
    "tcp": TcpRecord(2, "127.0.0.1", 80, 0, 0, 128, {"IP_TTL": 64}, {"SO_LINGER": bytes(8)}, 0, 7),
    "unix": UnixRecord(
        *(7, 1, b"\0\xff", "/a \udcff", 0o777, 0, 2**32 - 1, 5, (8, 9)),
        is_connected=True,
        peer=8,
        peer_name=b"/a \xff",
        peer_is_outside=False,
        accepted=False,
        credentials=Identity(4711, 0, 2**32 - 1, (5, 6)),
        client=NOBODY,
        shutdown=3,
        was_reset=True,
        messages=(
            Message(b"\xff", b"./a", 4711, 0, 0),
            Message(
                b"", b"", 0, 0, 0, (Passed("eventfd", O_RDWR, EventfdRecord(7, semaphore=False)),)
            ),
        ),
        options=OPTIONS,
    ),
    "tcp connection": CONNECTION,
    "udp": UdpRecord(
        *(17, InetAddress(10, "::1", 65535, 1, 2**32 - 1), None, 3),
        datagrams=(Datagram(InetAddress(2, "127.0.0.1", 7), b"\xff"),),
        memberships=(Membership("lo", "239.0.0.1", excludes=True, sources=("127.0.0.1",)),),
        options=OPTIONS,
        numbers={"IP_TTL": 64},
        structs={"IP_OPTIONS": b""},
    ),
    "netlink": NetlinkRecord(3, 0, 2**32 - 1, (1, 36), 0, 0, OPTIONS, {"NETLINK_CAP_ACK": 1}),
    "packet": PacketRecord(
        *(3, 0x806, "lo", (LinkMembership("lo", 1, 0, bytes(6)),), 9),
        has_unread=True,
        options=OPTIONS,
        numbers={"PACKET_AUXDATA": 1},
    ),
    "raw": RawRecord(
        *(1, InetAddress(2, "127.0.0.1", 1), InetAddress(2, "127.0.0.1", 0)),
        has_unread=False,
        memberships=(),
        options=OPTIONS,
        numbers={"IP_TTL": 64},
        structs={"ICMP_FILTER": bytes(4)},
    ),
    "eventfd": EventfdRecord(2**64 - 1, semaphore=True),
    "mqueue": MqueueRecord(
        "a \udcff",
        inode=7,
        unlinked=False,
        max_messages=10,
        max_message_bytes=8192,
        n_messages=3,
        mode=0o600,
        uid=0,
        gid=2**32 - 1,
    ),
    "signalfd": SignalfdRecord(2**64 - 1),
    "timerfd": TimerfdRecord(9, 3, 2**64 - 1, 2**62, 2**62),
    "fifo": FifoRecord(
        "/f", Deleted(1, 2, 3), 7, has_writer=True, hung_up=False, capacity_bytes=4096, content=b"x"
    ),
    "pidfd": PidfdRecord(4711),
    "process_file": ProcessFileRecord("/proc/4711/a \udcff", 2**62),
    "inotify": InotifyRecord(
        (WatchRecord(1, 2**31 + 1, Inode(254, 0, 2**63, 1, b"\xff"), "/a \udcff", is_link=True),),
        16,
    ),
    "epoll": EpollRecord((EpollItem(3, 2**31 + 1, 2**64 - 1),)),
    "external": ExternalRecord(1, "/dev/pts/0", (0, 1)),
}


def files(*kinds, fds=None):
    """Return a record with one description of each kind; each at its own number, or at `fds`."""
    descriptions = tuple(
        Description(index, kind, O_RDWR, RECORDS[kind]) for index, kind in enumerate(kinds)
    )
    numbers = fds or {number: number for number in range(len(kinds))}
    entries = (FdRecord(fd, at, close_on_exec=False) for fd, at in sorted(numbers.items()))
    return FilesRecord(descriptions, tuple(entries))


def plain(record):
    converter = cattrs.Converter(unstruct_collection_overrides={tuple: list})
    return unpack(pack(converter.unstructure(record)))


def test_every_kind_has_an_example_here():
    assert RECORDS.keys() == {kind.name for kind in (*kinds.KINDS, kinds.EXTERNAL)}


def test_every_kind_survives_the_image():
    record = files(*RECORDS)
    assert structure(plain(record), FilesRecord) == record


@pytest.mark.parametrize("kind", RECORDS)
def test_a_field_of_a_wrong_type_is_refused(kind):
    values = plain(files(kind))
    for name, value in values["descriptions"][0]["record"].items():
        broken = plain(files(kind))
        broken["descriptions"][0]["record"][name] = 1.5 if isinstance(value, int) else 7
        with pytest.raises(Exception, match=r".") as caught:
            structure(broken, FilesRecord)
        assert not isinstance(caught.value, AssertionError | AttributeError)


@pytest.mark.parametrize("kind", RECORDS)
def test_a_missing_field_is_refused(kind):
    broken = plain(files(kind))
    record = broken["descriptions"][0]["record"]
    # The first: those at the end may be younger than the format.
    del record[next(iter(record))]
    with pytest.raises(Exception, match=r"."):
        structure(broken, FilesRecord)


def test_a_kind_of_the_future_is_refused():
    with pytest.raises(ValueError, match="unknown kind of file 'teapot'"):
        Description(0, "teapot", 0, {})


@pytest.mark.parametrize(
    "numbers", [(1, 1), (2, 1), (-1, 0), (0, 2**31)], ids=["twice", "order", "negative", "large"]
)
def test_impossible_numbers_are_refused(numbers):
    entries = tuple(FdRecord(fd, 0, close_on_exec=False) for fd in numbers)
    with pytest.raises(ValueError, match="descriptor"):
        FilesRecord((Description(0, "chardev", 0, RECORDS["chardev"]),), entries)


def test_descriptors_and_descriptions_must_belong_together():
    description = Description(0, "chardev", 0, RECORDS["chardev"])
    entry = FdRecord(0, 0, close_on_exec=False)
    for descriptions, entries in (
        ((description, description), (entry,)),
        ((description,), (attrs.evolve(entry, description=-1),)),
    ):
        with pytest.raises(ValueError, match="belong together"):
            FilesRecord(descriptions, entries)


def test_hostile_values_of_the_kinds_are_refused():
    for make in (
        lambda: EventfdRecord(2**64, semaphore=False),
        lambda: EpollItem(3, 2**32, 0),
        lambda: ExternalRecord(3, "", (3,)),
        lambda: PipeRecord(1, 2**40, packets=False, content=()),
        lambda: attrs.evolve(RECORDS["tcp"], family=1),
        lambda: attrs.evolve(RECORDS["tcp"], numbers={"SO_NOTHING": 1}),
        lambda: attrs.evolve(RECORDS["unix"], kind=3),
        lambda: attrs.evolve(RECORDS["unix"], name=bytes(109)),
        lambda: attrs.evolve(RECORDS["unix"], path="relative"),
        lambda: attrs.evolve(RECORDS["unix"], backlog=2**40),
        lambda: attrs.evolve(RECORDS["unix"], uid=-1),
        lambda: Message(b"", b"", 2**31, 0, 0),
        lambda: Passed("epoll", O_RDWR, EpollRecord(())),
        lambda: Identity(1, 0, 2**32),
        lambda: attrs.evolve(RECORDS["unix"].options, numbers={"SO_NOTHING": 1}),
        lambda: attrs.evolve(RECORDS["unix"].options, numbers={"SO_MARK": 2**31}),
        lambda: attrs.evolve(RECORDS["unix"].options, packet_filter=b"short"),
    ):
        with pytest.raises(ValueError, match=r"."):
            make()


def test_the_highest_descriptor():
    assert files().highest_fd == -1
    assert files("chardev", fds={2: 0, 900: 0}).highest_fd == 900


def closing(record):
    return [one.args for one in placing._iter_closing(record)]


def test_everything_between_the_descriptors_is_closed():
    last = 2**32 - 1
    assert closing(files()) == [(0, last, 0)]
    assert closing(files("chardev", "eventfd")) == [(2, last, 0)]
    assert closing(files("chardev", fds={1: 0, 2: 0, 7: 0})) == [(0, 0, 0), (3, 6, 0), (8, last, 0)]


def keys(record, **inherit):
    chosen = {int(name[1:]): path for name, path in inherit.items()}
    sources = placing.plan_sources(record, RestoreOptions(inherit=chosen))
    return {source.key: source.instead or "" for source in sources}


def test_each_description_is_opened_once():
    record = files("regular", "eventfd", fds={0: 0, 1: 0, 5: 1})
    assert keys(record) == {"file 0": "", "file 1": ""}


def test_a_stream_is_split_by_number_and_its_duplicates_follow():
    record = files("external", fds={0: 0, 1: 0, 9: 0})
    assert keys(record) == {"file 0 stream 0": "", "file 0 stream 1": ""}


def test_inherit_replaces_one_stream_or_a_whole_description():
    streams = files("external", fds={0: 0, 1: 0, 9: 0})
    assert keys(streams, _9="/x") == {"file 0 stream 0": "", "file 0 stream 1 replaced": "/x"}
    assert keys(streams, _0="/x") == {"file 0 stream 0 replaced": "/x", "file 0 stream 1": ""}
    shared = files("regular", fds={3: 0, 4: 0})
    assert keys(shared, _4="/x") == {"file 0 replaced": "/x"}


def test_inherit_of_what_was_not_open_is_a_usage_error():
    with pytest.raises(UsageError, match="--inherit 7"):
        list(table.check_files(files("chardev"), RestoreOptions(inherit={7: "/x"})))


def test_inherit_of_one_description_by_two_paths_is_a_usage_error():
    shared = files("regular", fds={3: 0, 4: 0})
    with pytest.raises(UsageError, match="--inherit 3 and 4 are one open file"):
        keys(shared, _3="/x", _4="/y")
    assert keys(shared, _3="/x", _4="/x") == {"file 0 replaced": "/x"}


def watching(number, *fds):
    return Description(
        number, "epoll", O_RDWR, EpollRecord(tuple(EpollItem(fd, 1, 0) for fd in fds))
    )


def test_an_epoll_is_filled_after_those_that_it_watches():
    descriptions = (
        watching(0, 1, 2),
        watching(1, 2),
        watching(2, 3),
        Description(3, "eventfd", 0, RECORDS["eventfd"]),
    )
    entries = tuple(FdRecord(fd, fd, close_on_exec=False) for fd in range(4))
    order = placing._plan_attaching(FilesRecord(descriptions, entries))
    assert [description.id for description in order] == [3, 2, 1, 0]


def test_epolls_in_a_circle_end_all_the_same():
    entries = tuple(FdRecord(fd, fd, close_on_exec=False) for fd in range(2))
    order = placing._plan_attaching(FilesRecord((watching(0, 1), watching(1, 0)), entries))
    assert sorted(description.id for description in order) == [0, 1]


def test_a_descriptor_that_dup3_places():
    record = files("chardev", fds={0: 0})
    entry = attrs.evolve(record.fds[0], close_on_exec=True)

    rebuilt = SimpleNamespace(inherited={"file 0 replaced": 77})
    placed = placing._place(entry, rebuilt)
    assert (placed.nr, placed.args) == (NR.dup3, (77, 0, 0o2000000))
