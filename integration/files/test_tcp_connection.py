"""TCP connections by themselves: states, listeners beside them, what is refused.

The processes around them are the harness's; whole dumps are in `integration/states`.
"""

import os
import shutil
import socket
import struct
import subprocess

import attrs
import pytest

from ckpt.kernel.tcp_repair import (
    TCP_CLOSE,
    TCP_CLOSE_WAIT,
    TCP_ESTABLISHED,
    TCP_FIN_WAIT1,
    TCP_FIN_WAIT2,
    TCP_LAST_ACK,
    read_info,
    silence,
)
from ckpt.resources.base import RestoreOptions
from ckpt.resources.files.table import FILES
from integration.files.processes import brought_back, capture, look, opened_by, rebuilt
from integration.files.unix_sockets import lent

FAMILIES = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
CALLER, ACCEPTED = 4, 5
"""The numbers of the ends of `pair`; 3 is the listener's."""
every_family = pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])


def connections_of(record):
    return [d.record for d in record.descriptions if d.kind == "tcp connection"]


def pair(family=socket.AF_INET, *, keep_listener=False, reuse=0):
    """Return both ends of a connection: who called, who accepted; and the listener."""
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    listener.bind((FAMILIES[family], 0))
    listener.listen(5)
    caller = socket.create_connection(listener.getsockname()[:2])
    accepted, _ = listener.accept()
    if keep_listener:
        return caller, accepted, listener
    listener.close()
    return caller, accepted


def await_state(sock, state):
    while read_info(sock).state != state:
        pass


def same(now, was):
    """Drop what moves on by itself, or is made anew: time stamps, windows, the table's name."""
    if was.transmission is None:
        return attrs.evolve(now, local=was.local) == was
    kept = attrs.evolve(
        now.transmission,
        **{n: getattr(was.transmission, n) for n in ("clock", "window", "hold", "handshake")},
    )
    # bind to one address of IPv6 sets IPV6_V6ONLY, connect does not.
    numbers = now.numbers | {n: was.numbers[n] for n in ("IPV6_V6ONLY",) if n in was.numbers}
    return attrs.evolve(now, transmission=kept, numbers=numbers) == was


@every_family
def test_both_ends_come_back_with_what_was_under_way(family):
    def prepare():
        caller, accepted = pair(family)
        caller.send(b"to the one")
        accepted.send(b"to the other")
        return caller, accepted

    with brought_back(prepare) as (record, built):
        assert [one.received for one in connections_of(record)] == [b"to the other", b"to the one"]
        for now, was in zip(connections_of(built.capture()), connections_of(record), strict=True):
            assert same(now, was)
        assert built.read(CALLER, 100) == b"to the other"
        built.write(CALLER, b" and more")
        assert built.read(ACCEPTED, 100) == b"to the one and more"


@every_family
def test_a_half_closed_connection(family):
    def prepare():
        caller, accepted = pair(family)
        caller.send(b"the last")
        caller.shutdown(socket.SHUT_WR)
        await_state(caller, TCP_FIN_WAIT2)
        return caller, accepted

    with brought_back(prepare) as (record, built):
        assert [one.state for one in connections_of(record)] == [TCP_FIN_WAIT2, TCP_CLOSE_WAIT]
        assert built.read(ACCEPTED, 100) == b"the last"
        assert built.read(ACCEPTED, 100) == b""
        built.write(ACCEPTED, b"reply")
        assert built.read(CALLER, 100) == b"reply"


@every_family
def test_ended_connections_keep_their_queue_and_their_error(family):
    def prepare():
        reset, peer = pair(family)
        peer.send(b"before the reset")
        reset.recv(1, socket.MSG_PEEK)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        await_state(reset, TCP_CLOSE)
        return reset

    with brought_back(prepare) as (record, built):
        (ended,) = connections_of(record)
        assert (ended.state, ended.received, ended.has_error) == (
            TCP_CLOSE,
            b"before the reset",
            True,
        )
        assert built.read(CALLER, 100) == b"before the reset"
        with pytest.raises(ConnectionResetError):
            built.read(CALLER, 1)
        assert built.read(CALLER, 1) == b""


@pytest.mark.parametrize("reuse", [0, 1])
@pytest.mark.parametrize("first", ["listener", "connection"])
def test_a_listener_beside_its_connections(reuse, first):
    """Whichever of them is opened first has the port, and the other must get it, too."""

    def prepare():
        caller, accepted, listener = pair(keep_listener=True, reuse=reuse)
        # With data that nobody reads, the end of the process leaves no TIME_WAIT at the port.
        caller.send(b"x")
        accepted.send(b"x")
        if first == "connection":
            # It was made first, so it has the lowest number.
            at = listener.fileno()
            spare = listener.dup()
            os.dup2(accepted.fileno(), at)
            os.dup2(spare.fileno(), accepted.fileno())
            spare.close()
        return caller, accepted, listener

    with brought_back(prepare) as (record, built):
        assert {d.kind for d in record.descriptions} >= {"tcp", "tcp connection"}
        (listener,) = [d.record for d in record.descriptions if d.kind == "tcp"]
        assert listener.numbers["SO_REUSEADDR"] == reuse
        with socket.create_connection(("127.0.0.1", listener.port), timeout=5):
            pass
        assert built.warnings == []


def test_a_connection_that_lives_is_refused_but_with_tcp_close():
    with opened_by(pair) as pid:
        record = capture(pid)
        found = [str(finding) for finding in FILES.check_files(record, RestoreOptions())]
        closed = list(FILES.check_files(record, RestoreOptions(tcp_close=True)))
    assert len(found) == 2
    assert "cannot be had here (the address is in use: the connection lives" in found[0]
    assert "--tcp-close" in found[0]
    assert closed == []
    with rebuilt(record, pid, tcp_close=True) as built, pytest.raises(ConnectionResetError):
        built.read(CALLER, 1)


def test_an_address_that_this_host_does_not_have_is_named():
    with opened_by(pair) as pid:
        record = capture(pid)
    (one, *_) = (d for d in record.descriptions if d.kind == "tcp connection")
    moved = attrs.evolve(one.record, local=attrs.evolve(one.record.local, host="192.0.2.7"))
    other = tuple(attrs.evolve(d, record=moved) if d is one else d for d in record.descriptions)
    changed = attrs.evolve(record, descriptions=other)
    (found,) = [str(finding) for finding in FILES.check_files(changed, RestoreOptions())]
    assert "TCP 192.0.2.7" in found
    assert "cannot be had here (Cannot assign requested address)" in found


def test_a_connection_under_way_is_refused():
    def prepare():
        full = socket.socket()
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        first = socket.create_connection(full.getsockname())
        second = socket.socket()
        second.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.connect(full.getsockname())
        return full, first, second

    with opened_by(prepare) as pid:
        found = look(pid)
    assert any("that is being made" in line and "--tcp-close" in line for line in found)


def test_a_connection_that_somebody_else_has_too_is_refused():
    caller, accepted = pair()
    with caller, accepted, opened_by(fds={3: caller.fileno()}) as pid:
        (found,) = look(pid)
    assert f"that process {os.getpid()} has open too" in found


@pytest.mark.skipif(not shutil.which("nft"), reason="only nft keeps the peer from answering")
@pytest.mark.parametrize("state", [TCP_FIN_WAIT1, TCP_LAST_ACK, TCP_ESTABLISHED])
def test_what_the_peer_has_not_acknowledged_is_sent_again(state):
    table = "inet test_of_ckpt"

    def prepare():
        caller, accepted = pair()
        if state == TCP_LAST_ACK:
            accepted.shutdown(socket.SHUT_WR)
            await_state(caller, TCP_CLOSE_WAIT)
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = caller.getsockname()[1]
        rules = (
            f"add table {table}; add chain {table} c {{ type filter hook input priority 0; }};"
            f"add rule {table} c tcp sport {port} drop; add rule {table} c tcp dport {port}"
            " meta mark != 0x636b7074 drop"
        )
        subprocess.run(["nft", rules], check=True)
        caller.send(b"on the way")
        if state != TCP_ESTABLISHED:
            caller.shutdown(socket.SHUT_WR)
        return caller, accepted

    def stop_dropping():
        subprocess.run(["nft", f"delete table {table}"], check=True)

    try:
        with opened_by(prepare) as pid:
            record = capture(pid)
            # As a dump with `kill` does: what is unacknowledged would be sent until all give up.
            with lent(pid, CALLER, ACCEPTED) as ends:
                for one in ends:
                    silence(one.fileno())
    finally:
        stop_dropping()
    caller, _ = connections_of(record)
    assert (caller.state, caller.transmission.sent) == (state, b"on the way")
    with rebuilt(record, pid) as built:
        assert built.read(ACCEPTED, 100) == b"on the way"
        if state != TCP_ESTABLISHED:
            assert built.read(ACCEPTED, 100) == b""
