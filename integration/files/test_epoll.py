"""epoll instances: what they watch, and how."""

import ctypes
import os
import select
import struct

from ckpt.kernel.arch import NR
from ckpt.process.remote import In, Out, call
from integration.files.processes import brought_back, look, opened_by

EVENT = struct.Struct("<IQ")
CTL_MOD = 3
EPOLLEXCLUSIVE = 1 << 28


def add(epoll, fd, events, data):
    """EPOLL_CTL_ADD with a word of our own, which Python's epoll does not offer."""
    libc = ctypes.CDLL(None, use_errno=True)
    event = ctypes.create_string_buffer(EVENT.pack(events, data))
    assert libc.epoll_ctl(epoll, 1, fd, event) == 0, os.strerror(ctypes.get_errno())


def new_epoll(number):
    """Make an epoll instance under a number and return it."""
    with select.epoll() as made:
        return os.dup2(made.fileno(), number)


def wait(built, epoll, n_events=10):
    """Return what epoll_wait reports at once: (events, data), sorted."""
    size = EVENT.size * n_events
    (reply,) = built.run([call(NR.epoll_wait, epoll, Out(size), n_events, 0)])
    assert reply.ok, str(reply)
    return sorted(EVENT.iter_unpack(reply.outs[0][: reply.value * EVENT.size]))


def items(record):
    return {
        (number, item.fd): (item.events, item.data)
        for number, description in enumerate(record.descriptions)
        if description.kind == "epoll"
        for item in description.record.items
    }


def holders(record):
    return sorted(
        (item.fd, item.held_by)
        for description in record.descriptions
        if description.kind == "epoll"
        for item in description.record.items
    )


def test_items_come_back_with_their_words():
    word = 0xFEDC_BA98_7654_3210

    def prepare():
        os.pipe()  # 3, 4
        os.eventfd(1)  # 5
        new_epoll(50)
        add(50, 3, select.EPOLLIN | select.EPOLLRDHUP, word)
        add(50, 4, select.EPOLLOUT | select.EPOLLET, 4)
        add(50, 5, select.EPOLLIN | EPOLLEXCLUSIVE, 5)

    with brought_back(prepare) as (record, built):
        assert items(built.capture()) == items(record)
        assert wait(built, 50) == [(select.EPOLLIN, 5), (select.EPOLLOUT, 4)]
        built.write(4, b"x")
        assert wait(built, 50) == [(select.EPOLLIN, 5), (select.EPOLLIN, word)]
        assert built.warnings == []


def test_the_same_description_under_two_numbers():
    def prepare():
        reader, writer = os.pipe()
        os.dup2(reader, 30)
        epoll = new_epoll(60)
        add(epoll, reader, select.EPOLLIN, 3)
        add(epoll, 30, select.EPOLLIN, 30)
        os.write(writer, b"x")

    with brought_back(prepare) as (record, built):
        assert items(built.capture()) == items(record)
        assert wait(built, 60) == [(select.EPOLLIN, 3), (select.EPOLLIN, 30)]


def test_epolls_that_watch_epolls():
    def prepare():
        os.pipe()  # 3, 4
        for number in (10, 11, 12):
            new_epoll(number)
        # The watcher has the lower number.
        add(10, 11, select.EPOLLIN, 11)
        add(11, 12, select.EPOLLIN | select.EPOLLET, 12)
        add(12, 3, select.EPOLLIN, 3)

    with brought_back(prepare) as (record, built):
        assert items(built.capture()) == items(record)
        assert wait(built, 10) == []
        built.write(4, b"x")
        assert wait(built, 10) == [(select.EPOLLIN, 11)]
        assert wait(built, 11) == [(select.EPOLLIN, 12)]
        assert wait(built, 12) == [(select.EPOLLIN, 3)]


def test_one_shots_that_have_fired_and_those_that_have_not():
    once = select.EPOLLIN | select.EPOLLONESHOT

    def prepare():
        os.eventfd(1)  # 3
        os.eventfd(0)  # 4
        new_epoll(50)
        add(50, 3, once | select.EPOLLET, 3)
        add(50, 4, once, 4)
        with select.epoll.fromfd(os.dup(50)) as epoll:
            assert epoll.poll(0) == [(3, select.EPOLLIN)]

    with brought_back(prepare) as (record, built):
        assert items(record)[3, 3][0] == select.EPOLLONESHOT | select.EPOLLET
        assert items(built.capture()) == items(record)
        assert wait(built, 50) == []
        built.write(4, struct.pack("<Q", 1))
        assert wait(built, 50) == [(select.EPOLLIN, 4)]
        again = call(NR.epoll_ctl, 50, CTL_MOD, 3, In(EVENT.pack(select.EPOLLIN, 33)))
        assert built.run([again])[0].ok
        assert wait(built, 50) == [(select.EPOLLIN, 33)]
        assert built.warnings == []


def test_a_fired_one_shot_that_cannot_fire_again_is_told():
    def prepare():
        reader, writer = os.pipe()
        epoll = new_epoll(60)
        add(epoll, reader, select.EPOLLIN | select.EPOLLONESHOT, 3)
        os.write(writer, b"x")
        with select.epoll.fromfd(os.dup(epoll)) as watching:
            watching.poll(0)
        os.read(reader, 1)

    with brought_back(prepare) as (_, built):
        assert len(built.warnings) == 1
        assert "fd 3, a one-shot registration that had fired" in built.warnings[0]
        built.write(4, b"x")
        assert wait(built, 60) == []


def test_files_that_have_other_numbers_now():
    def prepare():
        os.eventfd(0)  # 3
        os.dup2(3, 30)
        os.dup2(3, 31, inheritable=False)
        reader, _ = os.pipe()  # 4, 5
        os.dup2(reader, 50)
        new_epoll(60)
        add(60, 30, select.EPOLLIN, 30)
        add(60, 31, select.EPOLLIN, 31)
        add(60, 50, select.EPOLLIN, 50)
        os.close(30)  # closed
        os.dup2(5, 31, inheritable=False)  # another file's
        os.dup2(60, 50)  # that of the epoll itself
        os.close(60)

    with brought_back(prepare) as (record, built):
        assert holders(record) == [(30, 3), (31, 3), (50, 4)]
        assert holders(built.capture()) == holders(record)
        assert sorted(map(int, os.listdir(f"/proc/{built.pid}/fd"))) == [0, 1, 2, 3, 4, 5, 31, 50]
        assert wait(built, 50) == []
        built.write(31, b"x")
        assert wait(built, 50) == [(select.EPOLLIN, 50)]
        built.write(3, struct.pack("<Q", 1))
        assert wait(built, 50) == [(select.EPOLLIN, 30), (select.EPOLLIN, 31), (select.EPOLLIN, 50)]


def test_a_fired_one_shot_that_has_another_number_now():
    def prepare():
        os.eventfd(1)  # 3
        os.dup2(3, 30)
        new_epoll(60)
        add(60, 30, select.EPOLLIN | select.EPOLLONESHOT, 30)
        with select.epoll.fromfd(os.dup(60)) as epoll:
            assert epoll.poll(0) == [(30, select.EPOLLIN)]
        os.close(30)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        assert wait(built, 60) == []
        assert built.warnings == []


def test_a_file_that_only_somebody_else_has_open_is_refused():
    ours = os.eventfd(0)

    def prepare():
        new_epoll(60)
        add(60, 30, select.EPOLLIN, 30)
        os.close(30)

    try:
        with opened_by(prepare, fds={30: ours}) as pid:
            (found,) = look(pid)
    finally:
        os.close(ours)
    assert found.startswith("fd 60 (anon_inode:[eventpoll]): is an epoll that still watches a file")
    assert "whose descriptor 30 was closed or given to another file" in found


def test_many_items():
    def prepare():
        for number in range(100, 800):
            counter = os.eventfd(number % 2)
            os.dup2(counter, number)
            os.close(counter)
        new_epoll(50)
        for number in range(100, 800):
            add(50, number, select.EPOLLIN, number)

    with brought_back(prepare) as (record, built):
        assert len(items(record)) == 700
        assert items(built.capture()) == items(record)
        ready = wait(built, 50, 1000)
        assert [data for _, data in ready] == list(range(101, 800, 2))
