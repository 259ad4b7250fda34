"""Pages that are fetched while the tree runs: over what connections, and what if there are none."""

import ctypes
import mmap
import os
import queue
import select
import threading

import pytest

from ckpt.errors import ConnectFailed, PeerLost, PeerRefused
from ckpt.image.pipeline import Compression
from ckpt.migrate.fetching import Courier, Streams
from ckpt.migrate.messages import Fetch, Fetched
from ckpt.migrate.serving import N_STREAMS, Kept, Serving
from ckpt.migrate.spans import pack_spans, unpack_spans
from ckpt.units import Pid
from tests.kernel.children import ended
from tests.migrate.ends import channels

PAGE = mmap.PAGESIZE
SPACE = "mm-1"


class Ends:
    """A dialer whose connections the test hands out."""

    def __init__(self):
        self.waiting = queue.SimpleQueue()

    def attach(self, _purpose):
        channel = self.waiting.get()
        if channel is None:
            raise ConnectFailed(peer="the test", reason="it is over")
        return channel


@pytest.fixture
def memory():
    """Our own memory is that of the tree; each page says which it is."""
    with mmap.mmap(-1, 128 * PAGE) as made:
        for page in range(128):
            made[page * PAGE : (page + 1) * PAGE] = bytes([page]) * PAGE
        pointer = (ctypes.c_char * len(made)).from_buffer(made)
        yield ctypes.addressof(pointer)
        del pointer


@pytest.fixture
def source(memory):
    ends = Ends()
    kept = [
        Kept(SPACE, Pid(os.getpid()), [(memory, memory + 100 * PAGE)]),
        Kept("none", Pid(1), []),
    ]
    with Serving(ends, kept, Compression(level=1)) as serving:
        yield ends, serving
        serving.close()
        for _ in range(N_STREAMS):
            ends.waiting.put(None)


def numbers(raw):
    return [raw[at] for at in range(0, len(raw), PAGE)]


def wait_until_settled(courier):
    while not courier.is_settled:
        select.select([courier.wake_fd], [], [])
        os.eventfd_read(courier.wake_fd)


def pages(memory, first, n):
    return (memory + first * PAGE, memory + (first + n) * PAGE)


@pytest.mark.parametrize("packed", [b"1234567", bytes(16), pack_spans([(PAGE, PAGE + 1)])])
def test_what_is_no_list_of_ranges_is_not_taken_for_one(packed):
    with pytest.raises(ValueError, match="list of address ranges"):
        unpack_spans(packed)


def test_ranges_out_of_order_are_refused():
    spans = [(4 * PAGE, 5 * PAGE), (PAGE, 2 * PAGE)]
    with pytest.raises(ValueError, match="out of order"):
        unpack_spans(pack_spans(spans))
    assert unpack_spans(pack_spans(spans[::-1])) == spans[::-1]


def test_pages_are_fetched_as_they_are(source, memory):
    ends, serving = source
    streams = Streams("the source")
    with channels() as (here, there):
        ends.waiting.put(there)
        streams.add(here)
        wanted = [pages(memory, 3, 2), pages(memory, 50, 1)]
        assert numbers(streams.fetch(SPACE, wanted, awaited=True)) == [3, 4, 50]
        for _ in range(2):
            assert numbers(streams.fetch(SPACE, wanted, awaited=False)) == [3, 4, 50]
        assert serving.sent_bytes == 3 * PAGE, "the same pages again are no more of the memory"


def test_after_a_cut_they_come_over_the_next_connection(source, memory):
    ends, _ = source
    streams = Streams("the source")
    with channels() as (here, there), channels() as (here_again, there_again):
        there.close()
        streams.add(here)
        found = queue.SimpleQueue()
        wanted = [pages(memory, 7, 1)]
        thread = threading.Thread(
            target=lambda: found.put(numbers(streams.fetch(SPACE, wanted, awaited=True)))
        )
        thread.start()
        ends.waiting.put(there_again)
        streams.add(here_again)
        assert found.get() == [7]
        thread.join()


def test_who_waits_for_a_source_that_is_gone_is_told(memory):
    streams = Streams("the source")
    found = queue.SimpleQueue()

    def fetch():
        try:
            found.put(streams.fetch(SPACE, [pages(memory, 0, 1)], awaited=True))
        except PeerLost as error:
            found.put(error.reason)

    thread = threading.Thread(target=fetch)
    thread.start()
    streams.give_up("it has ended")
    assert found.get() == "it has ended"
    thread.join()


def test_that_the_original_has_ended_is_told(memory):
    ends, streams = Ends(), Streams("the source")
    wanted = [pages(memory, 0, 1)]
    with ended() as pid, Serving(ends, [Kept(SPACE, Pid(pid), wanted)], Compression()) as serving:
        with channels() as (here, there):
            ends.waiting.put(there)
            streams.add(here)
            with pytest.raises(PeerRefused, match="does not exist"):
                streams.fetch(SPACE, wanted, awaited=True)
        serving.close()
        for _ in range(N_STREAMS):
            ends.waiting.put(None)


def test_a_source_that_cannot_be_reached_is_given_up_after_a_time(memory, monkeypatch):
    monkeypatch.setattr("ckpt.migrate.fetching._RECONNECT_S", 0.01)
    with pytest.raises(PeerLost, match="could not be reached"):
        Streams("the source").fetch(SPACE, [pages(memory, 0, 1)], awaited=True)


@pytest.mark.parametrize(
    ("space", "first", "n"), [("mm-2", 0, 1), ("none", 0, 1), (SPACE, 99, 2), (SPACE, 0, 0)]
)
def test_nothing_else_of_the_memory_is_told(source, memory, space, first, n):
    ends, _ = source
    with channels() as (here, there):
        ends.waiting.put(there)
        here.send(Fetch(space, pack_spans([pages(memory, first, n)] if n else [])))
        with pytest.raises(Exception, match="asks for"):
            here.receive(Fetched)


def test_a_server_is_given_all_of_its_pages(source, memory):
    ends, _ = source
    streams = Streams("the source")
    courier = Courier(streams)
    served = courier.pages(SPACE, [pages(memory, 1, 1), pages(memory, 10, 90)], "nothing helps")
    batches = list(served.iter_batches())
    assert sum(length for _, pieces in batches for _, _, length in pieces) == 91 * PAGE
    with channels() as (here, there):
        ends.waiting.put(there)
        streams.add(here)
        came = [served.fetch(key, awaited=index == 1) for index, (key, _) in enumerate(batches)]
        assert numbers(b"".join(came)) == [1, *range(10, 100)]
        assert not courier.is_settled
        served.finish()
        wait_until_settled(courier)
        assert courier.failure is None
    courier.close()


def test_a_server_that_ends_too_early_is_noticed(memory):
    courier = Courier(Streams("the source"))
    courier.pages(SPACE, [pages(memory, 1, 1)], "nothing helps")
    courier.begin()
    wait_until_settled(courier)
    assert "before all were there" in courier.failure.message()
    courier.close()


def test_a_server_without_a_courier_is_told_so(memory):
    streams = Streams("the source")
    courier = Courier(streams)
    served = courier.pages(SPACE, [pages(memory, 1, 1)], "nothing helps")
    streams.give_up("it has ended")
    with pytest.raises(PeerLost, match="fetches no more"):
        served.fetch((0, 0, 0), awaited=True)
    courier.close()
