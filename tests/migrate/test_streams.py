"""Several connections at once, what limits them, and processes that only inherited one."""

import os
import threading

import pytest

from ckpt.errors import PeerLost
from ckpt.image.pages import MAX_FRAME_BYTES, check_frame
from ckpt.migrate.buffers import FrameBuffers
from ckpt.migrate.channel import new_buffer
from ckpt.migrate.messages import Purpose
from ckpt.migrate.pace import Bandwidth, add_up
from tests.migrate.ends import SHORT, channel_and_socket, channels
from tests.migrate.receivers import PATIENT, dialer_to, serving
from tests.migrate.spoken import Pages, Word, raw_frame

N_STREAMS = 3
N_FRAMES = 20


def collect_streams(session):
    """Take pages from all streams at once, in threads, into few buffers; tell what came."""
    buffers = FrameBuffers(2)
    came = []

    def take(channel):
        channel.checks_frames = False
        with channel:
            for _ in range(N_FRAMES):
                pages = channel.receive(Pages, place=buffers.take)
                check_frame(pages.frame.stored, pages.frame.checksum)
                came.append((pages.first_page, bytes(pages.frame.stored[:8])))
                buffers.give_back(pages.frame.stored)
            channel.send(Word("taken"))

    threads = []
    for _ in range(N_STREAMS):
        joined = session.accept(PATIENT.handshake_s)
        threads.append(threading.Thread(target=take, args=(joined.channel,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    session.channel.send(Word("all", hash(tuple(sorted(came)))))
    return 0


def test_streams_carry_pages_side_by_side():
    frames = [
        [raw_frame(os.urandom(MAX_FRAME_BYTES - stream)) for _ in range(N_FRAMES)]
        for stream in range(N_STREAMS)
    ]
    with serving(collect_streams) as (listener, _):
        dialer = dialer_to(listener)

        def send(stream, channel):
            with channel:
                for index, frame in enumerate(frames[stream]):
                    channel.send(Pages(stream * N_FRAMES + index, frame=frame))
                channel.receive(Word)

        with dialer.open() as channel:
            streams = [dialer.attach(Purpose.STREAM) for _ in range(N_STREAMS)]
            threads = [
                threading.Thread(target=send, args=(number, stream))
                for number, stream in enumerate(streams)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            everything = channel.receive(Word)
    sent = sorted(
        (stream * N_FRAMES + index, frame.stored[:8])
        for stream in range(N_STREAMS)
        for index, frame in enumerate(frames[stream])
    )
    # The child is a fork: its hash is ours.
    assert everything == Word("all", hash(tuple(sent)))
    total = add_up(stream.traffic for stream in streams)
    assert total.sent_bytes > N_STREAMS * N_FRAMES * (MAX_FRAME_BYTES - N_STREAMS)


def test_pages_wait_for_the_bandwidth_and_messages_do_not():
    waited = []
    bandwidth = Bandwidth(1_000_000, clock=lambda: 0.0, sleep=waited.append)
    frame = raw_frame(os.urandom(1 << 20))
    with channels(bandwidth=bandwidth) as (one, other):
        taking = threading.Thread(target=lambda: other.receive(Pages))
        taking.start()
        one.send(Pages(0, frame=frame))
        taking.join()
        n_waits = len(waited)
        one.send(Word("at once"))
        assert other.receive(Word).text == "at once"
    # The clock stands still: each wait is for all that went before.
    assert waited[-1] == pytest.approx(3 * (1 << 18) / 1e6, abs=0.05)
    assert len(waited) == n_waits


def test_buffers_are_used_again_and_given_out_no_further():
    buffers = FrameBuffers(1)
    first = buffers.take(100)
    assert len(first) == 100
    first[:3] = b"abc"
    waiting = threading.Thread(target=lambda: second.append(buffers.take(3)))
    second = []
    waiting.start()
    waiting.join(0.05)
    assert second == []
    buffers.give_back(new_buffer(3))
    buffers.give_back(b"abc")
    buffers.give_back(first)
    waiting.join()
    assert second[0] == b"abc"


def test_a_forked_child_that_lets_go_disturbs_nobody():
    with channels() as (one, other):
        one.send(Word("before"))
        pid = os.fork()
        if pid == 0:
            one.abandon()
            other.abandon()
            os._exit(0)
        os.waitpid(pid, 0)
        assert other.receive(Word).text == "before"
        other.send(Word("after"))
        assert one.receive(Word).text == "after"


def test_closing_ends_the_connection_although_a_child_still_has_it():
    with channel_and_socket(patience=SHORT) as (channel, peer):
        read_fd, write_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            peer.close()
            os.close(write_fd)
            os.read(read_fd, 1)
            os._exit(0)
        os.close(read_fd)
        channel.close()
        assert peer.recv(1) == b""
        os.close(write_fd)
        os.waitpid(pid, 0)


def test_what_is_closed_is_lost():
    with channels() as (one, other):
        one.close()
        one.close()
        with pytest.raises(PeerLost, match="given up"):
            one.send(Word("x"))
        with pytest.raises(PeerLost, match="given up"):
            one.receive(Word)
        with pytest.raises(PeerLost, match="ended"):
            other.receive(Word)


def test_whether_something_came_can_be_asked_without_taking_it():
    with channels() as (one, other):
        assert not other.is_readable(0.0)
        one.send(Word("x"))
        assert other.is_readable(5.0)
        assert other.receive(Word).text == "x"
        assert not other.is_readable(0.0)
