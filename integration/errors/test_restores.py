"""The promise: a restore that would not bring back what was is refused before anything starts."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from ckpt.process.keeper import start_keeper, stop_keeper
from ckpt.units import Fd, Pid
from integration.errors.refusals import content, nobody_left, refused, unchanged
from integration.harness import CKPT, Restored, ckpt, dump
from integration.workloads.driver import Program

# -- numbers ---------------------------------------------------------------------------------------


def test_the_process_still_runs(work, tmp_path):
    image = tmp_path / "image"
    dump(work.pid, image)
    with unchanged(image):
        message = refused(41, "restore", image)
    assert message.startswith(f"pid {work.pid} is taken by s_registers-")
    assert message.endswith(": end it, or wait until it is reaped (or use --new-pids)")
    assert work.ask("check") == "ok"


def test_the_process_is_a_zombie(tmp_path):
    image = tmp_path / "image"
    with Program("s_registers", cwd=tmp_path) as program:
        dump(program.pid, image, "--kill")
        os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
        message = refused(41, "restore", image)
    assert message.startswith(f"pid {program.pid} is taken by s_registers-")
    assert f", which has ended: wait until its parent, process {os.getpid()}, reaps it" in message
    with Restored(image) as restored:
        assert restored.ask("check") == "ok"


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def with_next_pid(pid, start):
    """Start something that has this pid: the kernel counts up from what it is told.

    What is started next has another number than the threads of a dead process: it counts on from
    where it was.
    """
    for _ in range(50):
        before = LAST_PID.read_text()
        LAST_PID.write_text(str(pid - 1))
        process = start()
        LAST_PID.write_text(before)
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    raise AssertionError(f"nothing got pid {pid}")


@contextlib.contextmanager
def sleeping_as(pid):
    """Lend somebody else's process that has a certain pid; it must still live afterwards."""
    process = with_next_pid(pid, lambda: subprocess.Popen(["sleep", "1000"]))
    try:
        yield process
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_somebody_else_has_its_number(dead):
    image, pid = dead
    with sleeping_as(pid), unchanged(image):
        message = refused(41, "restore", image)
    assert message.startswith(f"pid {pid} is taken by sleep: end it, or wait until it is reaped")
    with Restored(image) as restored:
        assert restored.pid == pid
        assert restored.ask("check") == "ok"


def test_somebody_else_has_the_number_of_a_thread(tmp_path):
    image = tmp_path / "image"
    with Program("s_threads", cwd=tmp_path) as program:
        tids = sorted(int(task.name) for task in Path(f"/proc/{program.pid}/task").iterdir())
        dump(program.pid, image, "--kill")
    with sleeping_as(tids[-1]), unchanged(image):
        message = refused(41, "restore", image)
    assert message.startswith(f"pid {tids[-1]} is taken by sleep: ")


class SleepingThread:
    """A thread of ours that waits to be ended."""

    def __init__(self):
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ended.wait)
        self._thread.start()
        self.pid = self._thread.native_id

    def kill(self):
        self._ended.set()

    def wait(self):
        self._thread.join()


def test_a_thread_has_its_number(dead):
    """A list of /proc does not show it."""
    image, pid = dead
    thread = with_next_pid(pid, SleepingThread)
    try:
        with unchanged(image):
            message = refused(41, "restore", image)
    finally:
        thread.kill()
        thread.wait()
    assert message.startswith(f"pid {pid} is taken by ")
    assert f", a thread of process {os.getpid()}: end that process" in message


class Keeper:
    """What a dump of another process leaves running."""

    def __init__(self, target):
        with open(os.devnull) as held:
            self.identity = start_keeper(Pid(target), Fd(held.fileno()))
        self.pid = self.identity.pid

    def kill(self):
        stop_keeper(self.identity)

    def wait(self):
        """It was waited for."""


def test_a_keeper_has_its_number(dead, work):
    image, pid = dead
    keeper = with_next_pid(pid, lambda: Keeper(work.pid))
    try:
        with unchanged(image):
            message = refused(41, "restore", image)
    finally:
        keeper.kill()
    assert message == (
        f"pid {pid} is taken by the ckpt-keeper of process {work.pid}: end it, and the next"
        f" incremental dump of process {work.pid} is full (or use --new-pids)"
    )


def test_the_restore_itself_has_its_number(dead):
    image, pid = dead
    command = [*CKPT, "restore", str(image)]
    with unchanged(image):
        restore = with_next_pid(
            pid, lambda: subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        )
        said = restore.communicate()[1]
    assert restore.returncode == 41
    assert said == (
        f"ckpt: pid {pid} is taken by this ckpt itself: run it again, and it gets another number"
        " (or use --new-pids)\n"
    )


def test_a_zombie_of_somebody_else_has_its_number(dead):
    image, pid = dead
    zombie = with_next_pid(pid, lambda: subprocess.Popen(["true"]))
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with unchanged(image):
        message = refused(41, "restore", image)
    assert message == (
        f"pid {pid} is taken by true, which has ended: wait until its parent, process"
        f" {os.getpid()}, reaps it, or end that one (or use --new-pids)"
    )
    zombie.wait()


@pytest.mark.parametrize("own", ["session", "process group"])
def test_a_group_has_its_number(dead, own):
    """Nobody has the pid, but it is still in use: the kernel refuses it, whoever looks in /proc."""
    image, pid = dead
    more = {"start_new_session": True} if own == "session" else {"process_group": 0}
    leader = with_next_pid(
        pid,
        lambda: subprocess.Popen(
            ["sh", "-c", "read go; sleep 1000 >&2 & echo $!"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **more,
        ),
    )
    member = int(leader.communicate("go\n")[0])
    try:
        with unchanged(image):
            message = refused(41, "restore", image)
        assert re.fullmatch(
            rf"pid {pid} is taken by the process group of (sleep|sh) \({member}\):"
            r" end all processes in it \(or use --new-pids\)",
            message,
        )
    finally:
        os.kill(member, signal.SIGKILL)
        os.waitpid(member, 0)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dead_with_files(tmp_path_factory):
    """Processes that had files open (s_files) or mapped (s_memory), and are dead: image -> pid."""
    made = {}
    for name in ("s_files", "s_memory"):
        folder = tmp_path_factory.mktemp(name)
        with Program(name, cwd=folder) as program:
            dump(program.pid, folder / "image", "--kill")
            made[name] = folder, program.pid
    return made


@pytest.fixture
def scene(dead_with_files):
    """Lend a dead process's directory; every file in it is as it was afterwards."""
    spoiled = []

    def enter(name):
        folder, pid = dead_with_files[name]
        kept = folder.with_name(f"{folder.name}-kept")
        shutil.copytree(folder, kept, symlinks=True)
        spoiled.append((folder, kept))
        return folder, pid

    yield enter
    for folder, kept in spoiled:
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
        shutil.copytree(kept, folder, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(kept)


def findings(message):
    first, *lines = message.splitlines()
    assert first == "files of the process are not as they were:"
    return [line.strip() for line in lines]


def refused_restore(folder, pid, *options, code=42, **more):
    with nobody_left(pid), unchanged(folder):
        return refused(code, "restore", *options, folder / "image", **more)


def test_files_that_are_missing_are_all_named(scene):
    folder, pid = scene("s_files")
    gone = [folder / f"s_files-{pid} text", folder / f"s_files-{pid}.log"]
    for path in gone:
        path.unlink()
    lines = findings(refused_restore(folder, pid))
    for path in gone:
        assert any(
            line.startswith("fd ") and f"({path})" in line and "No such file" in line
            for line in lines
        )


def test_a_missing_file_cannot_be_allowed(scene):
    folder, pid = scene("s_files")
    path = folder / f"s_files-{pid}.log"
    path.unlink()
    message = refused_restore(folder, pid, "--allow-changed", path)
    assert all(str(path) in line for line in findings(message))


CHANGES = {
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "shorter": lambda path: os.truncate(path, 10_000),
    "touched": lambda path: os.utime(path, (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_is_only_read_was_changed(scene, change):
    folder, pid = scene("s_files")
    path = folder / f"s_files-{pid} text"
    status = path.stat()
    CHANGES[change](path)
    lines = findings(refused_restore(folder, pid))
    assert lines
    assert all(f"--allow-changed {path}" in line for line in lines)
    refused_restore(folder, pid, "--allow-changed", folder / "another")
    # The program would not find itself right with other content, but it is the user's word.
    with Restored(folder / "image", "--allow-changed", str(path)) as restored:
        assert restored.pid == pid
        if change == "touched":
            assert restored.ask("check") == "ok"
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_that_is_written_shrank_below_the_offset(scene):
    folder, pid = scene("s_files")
    path = folder / f"s_files-{pid}.grower"
    assert path.stat().st_size > 0
    path.write_bytes(b"")
    (line,) = findings(refused_restore(folder, pid))
    assert f"({path})" in line
    assert "has 0 bytes now, and the process is at byte" in line


def test_a_file_that_is_written_has_grown(scene):
    """A log goes on: accepted, and said."""
    folder, pid = scene("s_files")
    path = folder / f"s_files-{pid}.log"
    with path.open("ab") as file:
        file.write(b"one more line\n")
    with Restored(folder / "image") as restored:
        assert any(str(path) in warning for warning in restored.said["warnings"])


@pytest.mark.parametrize("change", ["shorter", "longer", "touched", "gone"])
def test_a_mapped_file_was_changed(scene, change):
    folder, pid = scene("s_memory")
    path = folder / f"s_memory-{pid}.relocated"
    if change == "gone":
        path.unlink()
    elif change == "touched":
        os.utime(path, (1, 1))
    else:
        os.truncate(path, 4096 if change == "shorter" else 1 << 20)
    (line,) = findings(refused_restore(folder, pid))
    assert line.startswith(f"mapped file {path}: ")
    if change == "gone":
        assert "does not exist any more" in line
        refused_restore(folder, pid, "--allow-changed", path)
    elif change == "shorter":
        # It may be allowed, but there is no place for what the process had changed behind the end.
        message = refused_restore(folder, pid, "--allow-changed", path, code=40)
        assert message.startswith("restore failed at filling memory: no page at 0x")
        assert message.endswith("everything it made was removed")
    else:
        with Restored(folder / "image", "--allow-changed", str(path)) as restored:
            assert restored.pid == pid


def test_a_shared_file_that_it_writes_itself_is_gone(scene):
    folder, pid = scene("s_memory")
    path = folder / f"s_memory-{pid}.shared"
    path.unlink()
    lines = findings(refused_restore(folder, pid))
    assert any(f"mapped file {path}: does not exist" in line for line in lines)


def test_a_shared_file_that_it_writes_itself_is_shorter(scene):
    """Its pages would be beyond the end: a process that touches them would die of SIGBUS."""
    folder, pid = scene("s_memory")
    path = folder / f"s_memory-{pid}.shared"
    os.truncate(path, 4096)
    lines = findings(refused_restore(folder, pid))
    assert any(f"mapped file {path}: " in line for line in lines)


@pytest.fixture
def own_program(tmp_path):
    """A process of a program that may be changed, and is dead."""
    image = tmp_path / "image"
    with Program("s_registers", cwd=tmp_path) as first:
        binary = os.readlink(f"/proc/{first.pid}/exe")
    program = tmp_path / "program"
    shutil.copy2(binary, program)
    with subprocess.Popen(
        [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        dump(process.pid, image, "--kill")
    return image, program, process.pid


def test_the_program_was_replaced(own_program):
    image, program, pid = own_program
    shutil.copy2("/bin/true", program)
    with nobody_left(pid), unchanged(image):
        lines = findings(refused(42, "restore", image))
    assert any(line.startswith(f"mapped file {program}: has ") for line in lines)


def test_the_program_is_gone(own_program):
    image, program, pid = own_program
    program.unlink()
    with nobody_left(pid), unchanged(image):
        lines = findings(refused(42, "restore", image))
        assert any(f"{program}: does not exist any more" in line for line in lines)
        refused(42, "restore", "--allow-changed", program, image)


def test_the_same_program_was_installed_again(own_program):
    """Another file with the same build-id is the same program."""
    image, program, _ = own_program
    again = program.with_name("again")
    shutil.copyfile(program, again)
    again.chmod(0o755)
    again.rename(program)
    with Restored(image) as restored:
        assert restored.ask("check") == "ok"


def test_its_working_directory_is_gone(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with Program("s_registers", cwd=folder) as program:
        dump(program.pid, tmp_path / "image", "--kill")
    folder.rmdir()
    with nobody_left(program.pid), unchanged(tmp_path):
        message = refused(42, "restore", tmp_path / "image")
    assert f"working directory {folder}: " in message


# -- streams ---------------------------------------------------------------------------------------


def test_a_standard_stream_is_closed(dead):
    image, pid = dead
    command = 'exec "$@" 0<&-'
    with nobody_left(pid), unchanged(image):
        done = subprocess.run(
            ["sh", "-c", command, "sh", *CKPT, "restore", str(image)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 42, done.stderr
    assert "standard input of this command is closed" in done.stderr
    assert "or --inherit 0=PATH" in done.stderr


@pytest.mark.parametrize(
    ("inherit", "code", "phrase"),
    [
        ("77=/dev/null", 2, "the process had no such descriptor open"),
        ("0=/none/at/all", 42, "/none/at/all, which shall stand for it, is not there"),
        ("1=/", 40, "opening /: Is a directory"),
    ],
)
def test_an_inherited_descriptor_that_cannot_be(dead, inherit, code, phrase):
    image, pid = dead
    with nobody_left(pid), unchanged(image):
        assert phrase in refused(code, "restore", "--inherit", inherit, image)


def test_nothing_of_all_this_changed_the_image(dead, image_of_the_dead):
    assert list(content(dead[0]).values()) == list(content(image_of_the_dead[0]).values())
    done = ckpt("restore", "--detach", dead[0])
    assert done.returncode == 0, done.stderr
    os.kill(int(done.stdout), signal.SIGKILL)
    os.waitpid(int(done.stdout), 0)
