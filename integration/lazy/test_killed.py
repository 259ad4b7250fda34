"""Whatever ends the server of pages, and when: the process has all its memory, or is no more."""

import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path
from subprocess import PIPE

import pytest

from integration.harness import CKPT, Restored, become_subreaper, ckpt, dump
from integration.lazy.behind import (
    GUARD,
    find_child,
    find_server,
    wait_for_end,
    wait_until_filled,
)
from integration.workloads.driver import Program

become_subreaper()
MIB = 256


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    directory = tmp_path_factory.mktemp("killed")
    with Program("heartbeat", "--mib", str(MIB), cwd=directory) as work:
        dump(work.pid, directory / "image")
    return directory / "image"


def ask_or_none(work: Restored, command: str) -> str | None:
    """Ask; None if the process ended before it answered."""
    try:
        return work.ask(command)
    except (EOFError, BrokenPipeError):
        return None


def kill_once(work: Restored, kill_after: int) -> bool:
    """Kill the server after some answers of the process; tell whether the server was there."""
    server = find_server(work.process.pid)
    for _ in range(kill_after):
        if ask_or_none(work, "gap") is None:
            return True
    if server is None:
        return False
    try:
        os.kill(server, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_server_leaves_no_process_without_memory(image):
    chance = random.Random(3)
    ends = {"complete": 0, "killed": 0}
    for _ in range(20):
        with Restored(image, "--lazy") as work:
            guard = find_child(work.process.pid, GUARD)
            kill_once(work, chance.choice([0, 0, 0, 1, 3, 10, 30]))
            if guard is not None:
                wait_for_end(guard)
            answer = ask_or_none(work, "check")
            if answer is not None:
                assert answer == "ok"
                ends["complete"] += 1
                continue
            assert work.process.wait(60) == 128 + signal.SIGKILL
            assert work.process.stderr is not None
            said = os.read(work.process.stderr.fileno(), 1 << 16).decode()
            assert f"process {work.pid} was killed: the server of its pages ended" in said
            assert "restore it again" in said
            ends["killed"] += 1
    assert ends["killed"], ends
    with Restored(image) as work:
        assert work.ask("check") == "ok"


def test_a_killed_guard_costs_nothing(image):
    with Restored(image, "--lazy") as work:
        guard = find_child(work.process.pid, GUARD)
        server = find_server(work.process.pid)
        if guard is not None:
            os.kill(guard, signal.SIGKILL)
        assert work.ask("check") == "ok"
        if server is not None:
            wait_for_end(server)
        assert work.ask("check") == "ok"


def test_a_killed_restorer_costs_nothing(image):
    with Restored(image, "--lazy") as work:
        guard = find_child(work.process.pid, GUARD)
        work.process.kill()
        if guard is not None:
            wait_for_end(guard)
        assert work.ask("check") == "ok"
    # It has become our child.
    os.waitpid(work.pid, 0)


def test_damage_that_is_found_late_ends_the_process(tmp_path):
    image = tmp_path / "image"
    with Program("heartbeat", "--mib", "8", cwd=tmp_path) as work:
        dump(work.pid, image)
    pages = max((image / "gen-000000").glob("pages-*"), key=lambda path: path.stat().st_size)
    size = pages.stat().st_size
    with pages.open("r+b") as file:
        file.seek(size // 2)
        byte = file.read(1)
        file.seek(size // 2)
        file.write(bytes([byte[0] ^ 1]))
    with Restored(image, "--lazy") as work:
        assert work.process.wait(60) == 128 + signal.SIGKILL
        assert work.process.stderr is not None
        said = os.read(work.process.stderr.fileno(), 1 << 16).decode()
        assert str(pages) in said
        assert "checksum" in said
        assert f"process {work.pid} was killed" in said


def test_nothing_of_ours_is_left_when_all_is_there(image):
    with Restored(image, "--lazy") as work:
        wait_until_filled(work.process.pid)
        assert find_server(work.process.pid) is None
        smaps = Path(f"/proc/{work.pid}/smaps").read_text(encoding="utf-8")
        assert not [line for line in smaps.splitlines() if " um" in line and "VmFlags" in line]
        assert not [
            name
            for name in os.listdir(f"/proc/{work.pid}/fd")
            if "userfaultfd" in os.readlink(f"/proc/{work.pid}/fd/{name}")
        ]
        assert work.ask("check") == "ok"


def test_a_dump_before_all_is_there_is_refused(image, tmp_path):
    for _ in range(10):
        with Restored(image, "--lazy") as work:
            server = find_server(work.process.pid)
            if server is None:
                continue
            try:
                os.kill(server, signal.SIGSTOP)
            except ProcessLookupError:
                continue
            refused = ckpt("dump", "--pid", str(work.pid), tmp_path / "image")
            os.kill(server, signal.SIGCONT)
            wait_until_filled(work.process.pid)
            dump(work.pid, tmp_path / "image")
        if refused.returncode:
            break
    assert refused.returncode == 21
    assert "wait until all of it is there" in refused.stderr
    assert not (tmp_path / "image" / "gen-000001").exists()
    with Restored(tmp_path / "image") as work:
        assert work.ask("check") == "ok"


def test_a_server_that_is_killed_before_the_process_runs(image):
    for _ in range(5):
        command = [*CKPT, "restore", "--lazy", "--detach", str(image)]
        with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE) as restorer:
            while (server := find_server(restorer.pid)) is None and restorer.poll() is None:
                pass
            guard = find_child(restorer.pid, GUARD)
            if server is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server, signal.SIGKILL)
            if guard is not None:
                wait_for_end(guard)
            status = restorer.wait(60)
            assert status in (0, 20)
            assert restorer.stdout is not None
            # Whoever was let go has become our child; its standard output was that of the command.
            said = os.read(restorer.stdout.fileno(), 64) if status == 0 else b""
        if status == 0:
            pid = int(said)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with Restored(image) as work:
        assert work.ask("check") == "ok"
