"""A connection to somebody who is not in the tree: that one loses no byte, and sees no reset.

The peer is this test. With --kill the network is held from the freeze to the end of the restore.
"""

import contextlib
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.harness import CKPT, Restored, become_subreaper, ckpt, dump
from integration.workloads.driver import Program

become_subreaper()
needs_nft = pytest.mark.skipif(not shutil.which("nft"), reason="only nft lists tables")
_WORD = 0xFFFF_FFFF_FFFF_FFFF


def mix64(x: int) -> int:
    """The same as in workload.h."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _WORD
    return x ^ x >> 31


def stream(start: int, n_bytes: int) -> bytes:
    """Return part of what either side of `call` sends."""
    first, last = start >> 3, (start + n_bytes + 7) >> 3
    words = b"".join(struct.pack("<Q", mix64(place)) for place in range(first, last))
    return words[start & 7 :][:n_bytes]


def read_exactly(sock: socket.socket, n_bytes: int) -> bytes:
    parts = []
    while n_bytes:
        part = sock.recv(n_bytes)
        assert part, "the end of the stream came too early"
        parts.append(part)
        n_bytes -= len(part)
    return b"".join(parts)


@contextlib.contextmanager
def called(tmp_path: Path) -> Iterator[tuple[Program, socket.socket]]:
    """Start the workload and let it call us; yield it, and our end."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Program("s_tcp", cwd=tmp_path) as work,
    ):
        assert work.ask(f"call {listener.getsockname()[1]}") == "called"
        ours, _ = listener.accept()
        ours.settimeout(20)
        with ours:
            yield work, ours


def our_tables() -> list[str]:
    listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if "ckpt_" in line]


@needs_nft
def test_a_killed_and_restored_connection_goes_on(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with called(tmp_path) as (work, ours):
        ours.sendall(stream(0, 10_000))
        said = int(work.ask("say 3000000").split()[1])
        before = read_exactly(ours, 5_000)
        dump(work.pid, image, "--kill")
        work.process.wait()
        assert len(our_tables()) == 1
        # More than fits: most of it waits on our side, and is sent again and again.
        ours.setblocking(False)
        more = ours.send(stream(10_000, 4_000_000))
        ours.settimeout(20)
        with Restored(image) as again:
            assert our_tables() == []
            assert again.ask(f"hear {10_000 + more}") == "heard"
            assert before + read_exactly(ours, said - 5_000) == stream(0, said)
            assert again.ask("say 100") == "said 100"
            assert read_exactly(ours, 100) == stream(said, 100)
            assert again.ask("check") == "ok"
            ours.shutdown(socket.SHUT_WR)
            assert again.ask("end") == "end"


@needs_nft
def test_a_dump_that_does_not_kill_leaves_no_table_and_the_connection_works(tmp_path: Path) -> None:
    with called(tmp_path) as (work, ours):
        sent = 0
        for _ in range(3):
            ours.sendall(stream(sent, 1_000))
            sent += 1_000
            assert work.ask("say 1000") == "said 1000"
            dump(work.pid, tmp_path / "image")
            assert our_tables() == []
        assert work.ask("hear 3000") == "heard"
        assert read_exactly(ours, 3_000) == stream(0, 3_000)
        assert work.ask("check") == "ok"


@needs_nft
def test_a_restore_that_fails_leaves_the_network_held_for_the_next(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with called(tmp_path) as (work, ours):
        dump(work.pid, image, "--kill")
        work.process.wait()
        ours.sendall(stream(0, 1_000))
        failed = ckpt("restore", "--inherit", "77=/dev/null", "--detach", image)
        assert failed.returncode == 2
        assert len(our_tables()) == 1
        with Restored(image) as again:
            assert again.ask("hear 1000") == "heard"
        assert our_tables() == []


@needs_nft
@pytest.mark.parametrize("when", ["dump", "restore"])
def test_with_tcp_close_connections_come_back_closed(tmp_path: Path, when: str) -> None:
    image = tmp_path / "image"
    close = {when: ["--tcp-close"]}
    with called(tmp_path) as (work, ours):
        dump(work.pid, image, "--kill", *close.get("dump", []))
        work.process.wait()
        assert len(our_tables()) == (when == "restore")
        with Restored(image, *close.get("restore", [])) as again:
            assert again.ask("end") == "Connection reset by peer"
            assert our_tables() == []
        if when == "dump":
            with contextlib.suppress(ConnectionResetError):
                assert ours.recv(1) == b""


@needs_nft
def test_a_dump_that_is_killed_leaves_no_table(tmp_path: Path) -> None:
    """The table of a dump belongs to its process."""
    with called(tmp_path) as (work, ours):
        command = [*CKPT, "dump", "--pid", str(work.pid), str(tmp_path / "image")]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        dumping = subprocess.Popen(command, **quiet)
        deadline = time.monotonic() + 20
        while not our_tables() and dumping.poll() is None and time.monotonic() < deadline:
            pass
        dumping.kill()
        dumping.wait()
        assert our_tables() == []
        assert work.ask("say 10") == "said 10"
        assert read_exactly(ours, 10) == stream(0, 10)


def test_urgent_data_is_refused(tmp_path: Path) -> None:
    with called(tmp_path) as (work, ours):
        ours.send(b"!", socket.MSG_OOB)
        refused = ckpt("dump", "--pid", str(work.pid), tmp_path / "image")
        assert refused.returncode == 21
        assert "with urgent data that was not read" in refused.stderr
        assert work.ask("say 10") == "said 10"
