"""What a tree has in a network namespace of its own does not clash with what the host has."""

import socket
import sys

import pytest

from integration.apps.app import App
from integration.errors.refusals import refused
from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import ANSWER_S

PROGRAM = """
import socket, sys
port, path = int(sys.argv[1]), sys.argv[2]
listener = socket.create_server(("0.0.0.0", port))
abstract = socket.socket(socket.AF_UNIX)
abstract.bind(chr(0) + path)
named = socket.socket(socket.AF_UNIX)
named.bind(path)
for one in (abstract, named):
    one.listen()
print("ready", flush=True)
for line in sys.stdin:
    names = listener.getsockname()[1], abstract.getsockname()[1:].decode(), named.getsockname()
    print(names == (port, path, path), flush=True)
"""
become_subreaper()


@pytest.fixture
def dead(tmp_path):
    """Lend the image of a program that has ended, its port and the path of its socket."""
    with socket.create_server(("0.0.0.0", 0)) as probe:
        port = probe.getsockname()[1]
    image, path = tmp_path / "image", tmp_path / "socket"
    command = ["unshare", "--net", sys.executable, "-c", PROGRAM, str(port), str(path)]
    with App(command, tmp_path) as work:
        assert work.line() == "ready"
        dump(work.pid, image, "--kill")
        work.process.wait(ANSWER_S)
    return image, port, path


def test_a_port_and_an_abstract_name_of_the_host_are_no_hindrance(dead):
    image, port, path = dead
    ours = socket.create_server(("0.0.0.0", port))
    abstract = socket.socket(socket.AF_UNIX)
    with ours, abstract:
        abstract.bind(f"\0{path}")
        with Restored(image) as work:
            assert work.ask("names") == "True"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_file_that_a_socket_of_the_host_has_is(kind, dead):
    image, _, path = dead
    path.unlink()
    with socket.socket(socket.AF_UNIX, kind) as ours:
        ours.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            ours.listen()
            ours.setblocking(False)
        assert "where another process listens now" in refused(42, "restore", image)
        # It was not even called.
        with pytest.raises(BlockingIOError):
            ours.accept() if kind != socket.SOCK_DGRAM else ours.recv(1, socket.MSG_DONTWAIT)
    with Restored(image) as work:
        assert work.ask("names") == "True"
