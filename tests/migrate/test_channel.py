import os
import threading

import pytest

from ckpt.errors import (
    Finding,
    PeerLost,
    ProtocolError,
)
from ckpt.image.pages import MAX_FRAME_BYTES, Encoding
from tests.migrate.ends import channels
from tests.migrate.spoken import Everything, Large, Pages, Word, raw_frame

FULL = Everything(
    text="caf\u00e9 \udcff",
    data=b"\0\xff",
    number=-(1 << 63),
    ratio=0.1,
    yes=True,
    maybe=None,
    some=(1, 2, 1 << 64 - 1),
    pair=(1, "one"),
    named={"a": 1},
    findings=(Finding("fd 7", "is odd"),),
)


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_what_is_said_is_heard():
    with channels() as (one, other):
        one.send(FULL)
        one.send(Word("next"))
        assert other.receive(Everything) == FULL
        assert other.receive(Word, Everything) == Word("next")
        other.send(Word("back"))
        assert one.receive(Word).text == "back"


@pytest.mark.parametrize("n_bytes", [0, 1, 4096, 1 << 13, (1 << 13) + 1, MAX_FRAME_BYTES])
def test_a_page_frame_arrives_with_its_checksum_in_the_place_it_is_given(n_bytes):
    data = os.urandom(n_bytes)
    buffer = memoryview(bytearray(MAX_FRAME_BYTES))
    with channels() as (one, other):
        sender = in_thread(lambda: one.send(Pages(first_page=7, frame=raw_frame(data))))
        pages = other.receive(Pages, place=lambda n: buffer[:n])
        sender.join()
    assert pages.first_page == 7
    assert pages.frame.stored == data
    assert pages.frame.checksum == raw_frame(data).checksum
    assert pages.frame.encoding is Encoding.RAW
    assert buffer[:n_bytes] == data


def test_long_fields_arrive():
    large = Large(os.urandom(3 << 20))
    with channels() as (one, other):
        sender = in_thread(lambda: one.send(large))
        assert other.receive(Large) == large
        sender.join()


def test_a_message_that_is_not_expected_is_an_error():
    with channels() as (one, other):
        one.send(Word("now?"))
        with pytest.raises(ProtocolError, match=r"Word came, Pages or Large was expected"):
            other.receive(Pages, Large)
        with pytest.raises(PeerLost):
            other.receive(Word)
