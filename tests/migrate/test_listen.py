import contextlib
import os
import select
import socket

import attrs
import pytest

from ckpt.errors import PeerLost, PeerRefused
from ckpt.migrate.handshake import PREFACE_BYTES, pack_preface
from ckpt.migrate.listen import MAX_STRANGERS, MAX_UNPROVED_EACH
from ckpt.migrate.messages import Purpose
from tests.migrate.ends import SHORT
from tests.migrate.receivers import dialer_to, echo, open_when_there_is_room, serving, survive_a_cut
from tests.migrate.spoken import Pages, Word, raw_frame


def say(channel, text, count=0):
    channel.send(Word(text, count))
    return channel.receive(Word)


def plain(listener):
    return socket.create_connection((listener.address.host, listener.address.port), 5)


def read_end(connection):
    """Return what comes until the other side ends, however it does that."""
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1 << 16)
    return b""


def test_a_session_talks_and_ends_with_what_its_handler_returns():
    with serving(echo) as (listener, ends), dialer_to(listener).open() as channel:
        assert say(channel, "hello") == Word("hello")
        channel.send(Word("end", 7))
        assert ends.readline() == "7\n"
        with pytest.raises(PeerLost):
            channel.receive(Word)


def test_once_is_one_session_and_the_listener_ends_with_it():
    with serving(echo, once=True) as (listener, ends):
        with dialer_to(listener).open() as channel:
            with pytest.raises(PeerRefused) as raised:
                dialer_to(listener).open()
            assert raised.value.peer_code == "busy"
            assert say(channel, "still here") == Word("still here")
            channel.send(Word("end", 3))
            assert ends.readline() == "3\n"
        assert ends.read() == ""


def test_a_trouble_of_the_handler_is_told_with_its_findings():
    with serving(echo) as (listener, ends), dialer_to(listener).open() as channel:
        with pytest.raises(PeerRefused, match=r"processor: has no wings") as raised:
            say(channel, "refuse")
        assert raised.value.peer_code == "host-mismatch"
        assert ends.readline() == "43\n"


@pytest.mark.parametrize(("fate", "exit_code"), [("crash", -9), ("bug", 70)])
def test_a_session_that_dies_disturbs_no_other(fate, exit_code):
    with (
        serving(echo) as (listener, ends),
        dialer_to(listener).open() as one,
        dialer_to(listener).open() as other,
    ):
        assert say(one, "pid").count != say(other, "pid").count
        with pytest.raises(PeerLost):
            say(one, fate)
        assert ends.readline() == f"{exit_code}\n"
        assert say(other, "fine") == Word("fine")
        with dialer_to(listener).open() as third:
            assert say(third, "fine") == Word("fine")


def test_further_streams_come_to_the_process_of_their_session():
    with serving(echo) as (listener, _):
        dialer, stranger = dialer_to(listener), dialer_to(listener)
        with dialer.open() as channel, stranger.open() as another:
            channel.send(Word("await"))
            with dialer.attach(Purpose.STREAM) as stream:
                assert stream.receive(Word).text == "joined to stream"
                assert say(stream, "over the stream").text == "over the stream"
            assert channel.receive(Word).text == "left"
            assert say(another, "alone").text == "alone"


def test_a_cut_session_is_resumed():
    with serving(survive_a_cut) as (listener, ends):
        dialer = dialer_to(listener)
        channel = dialer.open()
        for count in (1, 2, 3):
            assert say(channel, "again").count == count
            channel.close()
            channel = dialer.attach(Purpose.RESUME)
        with channel:
            assert say(channel, "end").count == 4
        assert ends.readline() == "4\n"


def test_a_session_that_has_ended_is_unknown_and_that_is_said_by_the_right_one():
    with serving(echo) as (listener, ends):
        dialer = dialer_to(listener)
        with dialer.open() as channel:
            channel.send(Word("end"))
            assert ends.readline() == "0\n"
        with pytest.raises(PeerRefused) as raised:
            dialer.attach(Purpose.RESUME)
        assert raised.value.peer_code == "unknown-session"


def test_a_session_is_not_joined_without_its_key():
    with serving(echo) as (listener, _):
        dialer, thief = dialer_to(listener), dialer_to(listener)
        with dialer.open() as channel, thief.open():
            thief._ticket = type(thief._ticket)(dialer._ticket.session_id, thief._ticket.key)
            channel.send(Word("await"))
            with pytest.raises(Exception, match="token") as raised:
                thief.attach(Purpose.STREAM)
            assert raised.type.__name__ == "NotTrusted"
            with dialer.attach(Purpose.STREAM) as stream:
                assert stream.receive(Word).text == "joined to stream"


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        bytes(PREFACE_BYTES),
        os.urandom(1 << 16),
        pack_preface(b"") + os.urandom(1 << 12),
        pack_preface(os.urandom(16)) + b"\x16\x03\x01" + bytes(200),
        b"",
    ],
)
def test_garbage_is_hung_up_on_and_the_next_one_is_served(garbage):
    with serving(echo) as (listener, _):
        with plain(listener) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
            # At most an alert of TLS.
            assert len(read_end(connection)) < 16
        with dialer_to(listener).open() as channel:
            assert say(channel, "hello").text == "hello"


def test_who_says_nothing_is_hung_up_on_when_too_many_do():
    with serving(echo) as (listener, _), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(plain(listener)) for _ in range(MAX_STRANGERS + 3)]
        assert [read_end(connection) for connection in silent[:3]] == [b""] * 3
        with dialer_to(listener).open() as channel:
            assert say(channel, "hello").text == "hello"


def test_who_stalls_in_the_handshake_gets_few_processes_and_little_time():
    with (
        serving(echo, patience=attrs.evolve(SHORT, handshake_s=2.0)) as (listener, _),
        contextlib.ExitStack() as stack,
    ):
        stalling = [stack.enter_context(plain(listener)) for _ in range(MAX_UNPROVED_EACH)]
        for connection in stalling:
            connection.sendall(pack_preface(b""))
        with plain(listener) as one_more:
            one_more.sendall(pack_preface(b""))
            assert read_end(one_more) == b""
            assert not any(select.select(stalling, [], [], 0)[0])
        assert [read_end(connection) for connection in stalling] == [b""] * MAX_UNPROVED_EACH
        with open_when_there_is_room(listener) as channel:
            assert say(channel, "hello").text == "hello"


def test_a_session_survives_the_end_of_the_listener():
    with serving(echo) as (listener, _):
        channel = dialer_to(listener).open()
    with channel:
        assert say(channel, "hello").text == "hello"


def test_pages_travel_both_checked_and_encrypted():
    data = os.urandom(1 << 20)

    def take_pages(session):
        pages = session.channel.receive(Pages)
        session.channel.send(Pages(pages.first_page + 1, frame=pages.frame))
        session.channel.receive(Word)
        return 0

    with serving(take_pages) as (listener, _), dialer_to(listener).open() as channel:
        channel.send(Pages(41, frame=raw_frame(data)))
        back = channel.receive(Pages)
        assert (back.first_page, back.frame.stored) == (42, data)
        channel.send(Word("end"))
        assert channel.traffic.sent_bytes > 1 << 20 < channel.traffic.received_bytes
