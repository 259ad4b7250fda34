"""A peer that lies, stalls or floods: each gets an error, and no memory."""

import contextlib
import os
import threading
import tracemalloc
import zlib

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.errors import Finding, HostMismatch, PeerLost, PeerRefused, ProtocolError
from ckpt.image.codec import pack
from ckpt.image.pages import MAX_FRAME_BYTES
from ckpt.migrate.frames import HEADER_BYTES, Header
from ckpt.migrate.message import DEFAULT_FIELD_BYTES, MAX_FIELD_BYTES, encode, message
from ckpt.migrate.messages import Hello, KeepAlive, Refusal
from tests.migrate.ends import SHORT, channel_and_socket, channels
from tests.migrate.spoken import Everything, Large, Pages, Word, raw_frame


def said(what):
    """Return the bytes of a message."""
    head, frame = encode(what)
    return head + bytes(frame.stored if frame else b"")


def header_of(data):
    return Header.parse(data[:HEADER_BYTES])


def with_fields(number, values, frame=b"", encoding=0):
    """Return a message whose checksums are right and whose content is anything."""
    fields = pack(values)
    header = Header(
        number, encoding, len(fields), zlib.crc32(fields), len(frame), zlib.crc32(frame)
    )
    return header.pack() + fields + frame


def expect(error, data, *kinds, match=None):
    with channel_and_socket(patience=SHORT) as (channel, peer):
        peer.sendall(data)
        with pytest.raises(error, match=match):
            channel.receive(*kinds)
        # It has ended for good, and the peer can be told so.
        with pytest.raises(PeerLost):
            channel.receive(*kinds)


WORDS = said(Word("hello", 7))
PAGES = said(Pages(1, frame=raw_frame(b"p" * 9000)))


@pytest.mark.parametrize("bit", range(8 * len(WORDS)))
def test_a_flipped_bit_is_noticed_wherever_it_is(bit):
    data = bytearray(WORDS)
    data[bit // 8] ^= 1 << bit % 8
    expect(ProtocolError, data, Word, match="damaged|no message")


@given(st.integers(0, 8 * len(PAGES) - 1))
def test_a_flipped_bit_is_noticed_in_pages_too(bit):
    data = bytearray(PAGES)
    data[bit // 8] ^= 1 << bit % 8
    expect(ProtocolError, data, Pages, match="damaged|no message")


@pytest.mark.parametrize("n_bytes", [1, HEADER_BYTES - 1, HEADER_BYTES, len(PAGES) - 1])
def test_a_message_that_is_cut_short_is_no_message(n_bytes):
    with channel_and_socket(patience=SHORT) as (channel, peer):
        peer.sendall(PAGES[:n_bytes])
        peer.close()
        with pytest.raises(PeerLost, match="ended"):
            channel.receive(Pages)


@pytest.mark.parametrize("n_bytes", [1, HEADER_BYTES, len(PAGES) - 1])
def test_a_message_that_stops_on_its_way_is_given_up(n_bytes):
    expect(PeerLost, PAGES[:n_bytes], Pages, match="in the middle")


def test_a_peer_that_drips_is_given_up_too():
    with channel_and_socket(patience=attrs.evolve(SHORT, silence_s=5.0)) as (channel, peer):
        done = threading.Event()

        def drip():
            for byte in said(Large(bytes(100))):
                if done.wait(0.01):
                    return
                peer.sendall(bytes([byte]))

        dripping = threading.Thread(target=drip)
        dripping.start()
        with channel.within(0.3), pytest.raises(PeerLost):
            channel.receive(Large)
        done.set()
        dripping.join()


def announcing(kind, n_field_bytes=0, n_frame_bytes=0, **others):
    return Header(kind.NUMBER, others.get("encoding", 0), n_field_bytes, 0, n_frame_bytes, 0).pack()


@pytest.mark.parametrize(
    "header",
    [
        announcing(Word, DEFAULT_FIELD_BYTES + 1),
        announcing(Word, (1 << 32) - 1),
        announcing(Word, 0, 1),
        announcing(Word, 0, 0, encoding=1),
        announcing(Pages, 0, MAX_FRAME_BYTES + 1),
        announcing(Pages, 0, (1 << 32) - 1),
        announcing(Large, (1 << 23) + 1),
        announcing(KeepAlive, DEFAULT_FIELD_BYTES + 1),
        announcing(KeepAlive, 0, 1),
        announcing(Refusal, (1 << 20) + 1),
    ],
)
def test_too_much_is_refused_by_its_announcement(header):
    with channel_and_socket(patience=SHORT) as (channel, peer):
        peer.sendall(header)
        with pytest.raises(ProtocolError, match="announces"):
            channel.receive(Word, Pages, Large, place=lambda n: pytest.fail(f"{n} allocated"))


def test_long_fields_take_memory_as_they_come_and_not_as_they_are_announced():
    with channel_and_socket(patience=SHORT) as (channel, peer):
        peer.sendall(announcing(Large, 1 << 23))
        tracemalloc.start()
        try:
            with pytest.raises(PeerLost):
                channel.receive(Large)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < 1 << 21


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (with_fields(9, {}), "message 9 came"),
        (said(Hello(1, 1, "begin", b"", b"")), "Hello came, Word or Pages was expected"),
        (with_fields(Word.NUMBER, {"text": 1}), "fields of its Word"),
        (with_fields(Word.NUMBER, {"text": b"x"}), "fields of its Word"),
        (with_fields(Word.NUMBER, {"text": "x", "count": True}), "fields of its Word"),
        (with_fields(Word.NUMBER, {"text": "x", "count": 1.0}), "fields of its Word"),
        (with_fields(Word.NUMBER, {}), "fields of its Word"),
        (with_fields(Word.NUMBER, ["x"]), "fields of its Word"),
        (with_fields(Word.NUMBER, None), "fields of its Word"),
        (with_fields(Pages.NUMBER, {"first_page": None}), "fields of its Pages"),
        (with_fields(Pages.NUMBER, {"first_page": 1}, b"p", encoding=77), "encoding 77"),
    ],
)
def test_what_may_not_come_is_refused(data, why):
    expect(ProtocolError, data, Word, Pages, match=why)


@given(st.binary(max_size=200))
def test_any_fields_at_all_end_in_a_message_or_an_error(fields):
    header = Header(Everything.NUMBER, 0, len(fields), zlib.crc32(fields), 0, 0)
    expect(ProtocolError, header.pack() + fields, Everything)


def test_a_frame_in_the_fields_is_not_believed():
    data = with_fields(Pages.NUMBER, {"first_page": 1, "frame": "mine"}, b"p")
    with channel_and_socket() as (channel, peer):
        peer.sendall(data)
        assert channel.receive(Pages).frame.stored == b"p"


def test_what_a_newer_peer_adds_is_left_alone():
    with channel_and_socket() as (channel, peer):
        peer.sendall(with_fields(Word.NUMBER, {"text": "x", "new": [1, 2]}))
        assert channel.receive(Word) == Word("x")


def test_silence_ends():
    with (
        channel_and_socket(patience=SHORT) as (channel, _peer),
        pytest.raises(PeerLost, match="no sign of life"),
    ):
        channel.receive(Word)


def test_a_limit_on_the_wait_for_a_message_holds_whatever_else_comes():
    patience = attrs.evolve(SHORT, silence_s=5.0)
    with channels(patience=patience) as (one, other), other.kept_alive():
        assert one.try_receive(Word, timeout_s=0.3) is None
        other.send(Word("late"))
        assert one.receive(Word).text == "late"
        with pytest.raises(PeerLost, match=r"no Word within 0\.1 s"):
            one.receive(Word, timeout_s=0.1)


def test_signs_of_life_are_listened_to_and_do_not_count_as_messages():
    with channels(patience=attrs.evolve(SHORT, silence_s=1.0)) as (one, other):
        done = threading.Event()

        def work_long():
            with other.kept_alive():
                done.wait(2.0)
            other.send(Word("done"))

        working = threading.Thread(target=work_long)
        working.start()
        assert one.receive(Word).text == "done"
        working.join()


def test_signs_of_life_that_gathered_are_no_flood():
    with channels() as (one, other):
        other._made_s -= 100
        for _ in range(150):
            one.send(KeepAlive())
        one.send(Word("at last"))
        assert other.receive(Word).text == "at last"


def test_a_flood_of_signs_of_life_is_an_error():
    expect(ProtocolError, said(KeepAlive()) * 1000, Word, match="floods")


def test_a_peer_that_takes_nothing_is_given_up():
    with channel_and_socket(patience=SHORT) as (channel, _peer):
        frame = raw_frame(os.urandom(MAX_FRAME_BYTES))
        with pytest.raises(PeerLost, match="takes nothing"):
            channel.send(Pages(0, frame=frame))
        with pytest.raises(PeerLost, match="given up"):
            channel.send(Word("still"))


def test_a_peer_that_is_gone_is_lost_when_something_is_said():
    with channel_and_socket() as (channel, peer):
        peer.close()
        with pytest.raises(PeerLost):
            channel.send(Word("x"))


def test_the_last_word_of_a_peer_is_heard_by_who_only_speaks():
    refusal = Refusal("host-full", "no space", (Finding("disk", "is full"),))
    with channel_and_socket() as (channel, peer):
        peer.sendall(said(refusal))
        peer.close()
        with pytest.raises(PeerRefused, match="disk: is full") as raised:
            channel.send(Word("x"))
        assert raised.value.peer_code == "host-full"


def test_a_refusal_cannot_draw_on_the_terminal_nor_fill_it():
    refusal = Refusal(
        "\x1b[2J" * 100, "\x1b]0;title\x07" + "x" * 60_000, (Finding("\x1b[1m", "\n\n"),)
    )
    with channels() as (one, other):
        one.send(refusal)
        with pytest.raises(PeerRefused) as raised:
            other.receive(Word)
    assert "\x1b" not in str(raised.value)
    assert "\x1b" not in raised.value.peer_code
    assert len(str(raised.value)) < 5000


def test_a_trouble_with_endless_findings_is_told_and_cut():
    findings = tuple(Finding("fd", "\U0001f600" * 2000) for _ in range(300))
    with channels() as (one, other):
        refusing = threading.Thread(target=one.refuse, args=(HostMismatch(findings),))
        refusing.start()
        with pytest.raises(PeerRefused) as raised:
            other.receive(Word)
        other.close()
        refusing.join()
    assert len(raised.value.findings) == 100


def test_findings_of_a_peer_are_counted():
    many = tuple(Finding("fd", "is odd") for _ in range(3000))
    with channels() as (one, other):
        one.send(Refusal("unsupported-state", "much", many))
        with pytest.raises(PeerRefused) as raised:
            other.receive(Word)
    assert len(raised.value.findings) == 100


def leave_with(channel, error):
    with channel:
        raise error


def test_an_error_of_ours_is_told_when_the_channel_is_left():
    with channels() as (one, other):
        error = HostMismatch((Finding("processor", "has no wings"),))
        leaving = threading.Thread(target=leave_and_forget, args=(one, error))
        leaving.start()
        with pytest.raises(PeerRefused) as raised:
            other.receive(Word)
        other.close()
        leaving.join()
    assert raised.value.peer_code == "host-mismatch"
    assert str(raised.value) == (
        "left refuses: this host cannot run the process of the image\n  processor: has no wings"
    )


def leave_and_forget(channel, error):
    with contextlib.suppress(HostMismatch):
        leave_with(channel, error)


def test_a_number_is_given_once():
    with pytest.raises(TypeError, match="number"):
        message(Word.NUMBER)
    with pytest.raises(TypeError, match="cap"):
        message(64999, max_field_bytes=MAX_FIELD_BYTES + 1)


def test_we_do_not_send_what_would_be_refused():
    with channels() as (one, _):
        with pytest.raises(ValueError, match="announces"):
            one.send(Word("x" * (DEFAULT_FIELD_BYTES + 1)))
        one.send(Word("x"))


def test_no_descriptor_is_left_behind():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with channels(patience=SHORT) as (one, _), pytest.raises(PeerLost):
            one.receive(Word)
    assert len(os.listdir("/proc/self/fd")) == before
