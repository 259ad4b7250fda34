"""Namespaces of a tree's own: made anew where they can be, named where they cannot."""

import os
import signal
import socket
import subprocess
import threading

import attrs
import pytest

from ckpt.errors import RestoreFailed
from ckpt.kernel import namespaces
from ckpt.resources.namespaces import NAMESPACES, NamespacesRecord, entered
from integration.freezer.targets import child
from integration.resources.confined import libc, succeed
from integration.resources.embryos import FEATURES, capture, embryo, look, restore

NAMES = ("uts", "ipc", "net")
NOTHING = NamespacesRecord((), b"", b"", loopback_up=False)


def ours():
    return [os.readlink(f"/proc/thread-self/ns/{name}") for name in NAMES]


@pytest.fixture(autouse=True)
def everything_stays_as_it_is():
    before = (ours(), socket.gethostname())
    yield
    assert (ours(), socket.gethostname()) == before


def unshare(*names):
    flags = 0
    for name in names:
        flags |= namespaces.BY_NAME[name]
    succeed(libc.unshare(flags))


def test_who_is_where_we_are_has_nothing_of_its_own():
    with child(lambda: None) as pid:
        assert look(NAMESPACES, pid) == []
        assert capture(NAMESPACES, pid) == NOTHING


def test_names_and_loopback_are_captured_and_made_anew():
    def prepare():
        unshare("uts", "net")
        socket.sethostname("elsewhere")
        namespaces.set_domainname(b"far.away")
        namespaces.set_loopback_up()

    with child(prepare) as pid:
        assert look(NAMESPACES, pid) == []
        record = capture(NAMESPACES, pid)
    assert record == NamespacesRecord(("uts", "net"), b"elsewhere", b"far.away", loopback_up=True)
    with entered(record):
        here = ours()
        assert socket.gethostname() == "elsewhere"
        assert namespaces.is_loopback_up()
        with embryo() as planted:
            assert [os.readlink(f"/proc/{planted.pid}/ns/{name}") for name in NAMES] == here
            assert restore(NAMESPACES, record, planted) == []


def test_a_process_that_was_not_planted_there_fails_the_restore():
    record = NamespacesRecord(("uts",), b"elsewhere", b"", loopback_up=False)
    with embryo() as planted, pytest.raises(RestoreFailed, match="not in its own"):
        restore(NAMESPACES, record, planted)


def test_a_failure_leaves_us_where_we_were():
    record = NamespacesRecord(("uts", "ipc", "net"), b"a" * 64, b"", loopback_up=True)
    with pytest.raises(ZeroDivisionError), entered(record):
        raise ZeroDivisionError


def test_another_interface_is_named():
    def prepare():
        unshare("net")
        command = ["ip", "link", "add", "name", "other0", "type", "bridge"]
        subprocess.run(command, check=True)

    with child(prepare) as pid:
        (finding,) = look(NAMESPACES, pid)
    assert "other interfaces than loopback (other0)" in finding


def test_another_address_is_named():
    def prepare():
        unshare("net")
        namespaces.set_loopback_up()
        subprocess.run(["ip", "addr", "add", "10.11.12.13/32", "dev", "lo"], check=True)

    with child(prepare) as pid:
        (finding,) = look(NAMESPACES, pid)
    assert "10.11.12.13" in finding


def test_a_thread_that_is_elsewhere_is_named():
    def prepare():
        moved = threading.Event()

        def live_apart():
            unshare("uts")
            moved.set()
            signal.pause()

        threading.Thread(target=live_apart, daemon=True).start()
        moved.wait()

    with child(prepare) as pid:
        (finding,) = look(NAMESPACES, pid)
    assert "another host name namespace than the root" in finding


def test_without_the_privilege_it_is_named():
    weak = attrs.evolve(FEATURES, capabilities=frozenset())
    record = attrs.evolve(NOTHING, own=("uts", "net"))
    (finding,) = NAMESPACES.check_host(record, weak)
    assert "host name, network" in str(finding)
    assert list(NAMESPACES.check_host(NOTHING, weak)) == []


@pytest.mark.parametrize("own", [("mnt",), ("uts", "pid")])
def test_a_namespace_that_cannot_be_made(own):
    with pytest.raises(ValueError, match="not known"):
        attrs.evolve(NOTHING, own=own)


def test_a_name_that_is_too_long():
    with pytest.raises(ValueError, match="too long"):
        attrs.evolve(NOTHING, own=("uts",), hostname=b"a" * 65)
