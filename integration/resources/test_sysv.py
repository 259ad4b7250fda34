"""System V IPC: segments that a process has attached, and all of a namespace of its own."""

import contextlib

import attrs
import pytest

from ckpt.errors import RestoreFailed
from ckpt.kernel import sysvipc
from ckpt.kernel.sysvipc import Permissions
from ckpt.resources.base import Opening, RestoreOptions
from ckpt.resources.namespaces import NAMESPACES, entered
from ckpt.resources.sysv import SYSV
from ckpt.resources.sysv_rebuild import check_host, prepare
from ckpt.resources.sysv_record import SegmentRecord, SysvRecord
from integration.errors.refusals import refused
from integration.freezer.targets import child
from integration.harness import Restored, become_subreaper, dump
from integration.resources.confined import libc, succeed
from integration.resources.embryos import FEATURES, capture, look
from integration.workloads.driver import Program

become_subreaper()
_CLONE_NEWIPC = 0x0800_0000


def segments():
    return {one.id: one for one in sysvipc.read_sysvipc("shm")}


def made_by(pid):
    """Return the segments that a process has made; others on this machine make some, too."""
    return {number for number, one in segments().items() if one.fields["cpid"] == pid}


@contextlib.contextmanager
def left_behind(work):
    """Lend the one segment that a workload, which has ended, has left; removed at the end."""
    (left,) = made_by(work.pid)
    try:
        yield left
    finally:
        if left in segments() and segments()[left].fields["nattch"] == 0:
            sysvipc.remove_segment(left)


def test_a_segment_that_the_process_left_behind_is_taken_over(tmp_path):
    image = tmp_path / "image"
    with Program("s_sysv", "keep", cwd=tmp_path) as work:
        dump(work.pid, image)
        assert work.ask("step write") == "stepped"
        assert dump(work.pid, image)["kind"] == "delta"
        assert work.ask("check") == "ok"
    with left_behind(work) as left:
        with Restored(image, "--at", "0") as back:
            assert back.ask("check") == "ok"
            assert segments()[left].fields["nattch"] == 2
        assert segments()[left].fields["nattch"] == 0


def test_a_key_that_somebody_else_has_is_named(tmp_path):
    image = tmp_path / "image"
    with Program("s_sysv", "keep", cwd=tmp_path) as work:
        dump(work.pid, image)
    with left_behind(work) as left:
        key = segments()[left].permissions.key
        sysvipc.remove_segment(left)
        other = sysvipc.shmget(key, 4096, sysvipc.IPC_CREAT | sysvipc.IPC_EXCL | 0o600)
        try:
            message = refused(43, "restore", image)
            assert f"shared memory segment {left}" in message
        finally:
            sysvipc.remove_segment(other)


def test_a_failed_restore_removes_what_it_made(tmp_path):
    image = tmp_path / "image"
    with Program("s_sysv", cwd=tmp_path) as work:
        made = made_by(work.pid)
        assert made
        dump(work.pid, image)
    # It is there, so that nobody complains before the segments are made, and cannot be written.
    assert "Is a directory" in refused(40, "restore", "--inherit", f"1={tmp_path}", image)
    assert not made & segments().keys()


def test_a_namespace_of_its_own_comes_back():
    """What is in it is read from outside and made anew in another one."""

    def prepare_objects():
        succeed(libc.unshare(_CLONE_NEWIPC))
        segment = sysvipc.shmget(0x77, 10_000, sysvipc.IPC_CREAT | 0o640)
        at = sysvipc.shmat(segment)
        sysvipc.write_attached(at, 5000, b"hello")
        sysvipc.shmdt(at)
        number = sysvipc.semget(0x78, 2, sysvipc.IPC_CREAT | 0o600)
        sysvipc.set_semaphores(number, (3, 4), Permissions(0x78, 1000, 1001, 0o660))
        queue = sysvipc.msgget(0, sysvipc.IPC_CREAT | 0o600)
        for kind in (2, 1, 2):
            sysvipc.send_message(queue, kind, b"x" * kind * 100)
        sysvipc.send_message(queue, 7, b"")

    with child(prepare_objects) as pid:
        record = capture(SYSV, pid)
        spaces = capture(NAMESPACES, pid)
        assert look(SYSV, pid) == []
        assert capture(SYSV, pid) == record, "a capture has changed something"
    assert spaces.own == ("ipc",)
    assert [message.kind for message in record.queues[0].messages] == [2, 1, 2, 7]
    assert record.semaphores[0].values == (3, 4)
    assert record.segments[0].size_bytes == 10_000
    assert dict(record.settings)["shmmni"]
    with entered(spaces):
        opening = Opening(RestoreOptions(), contextlib.ExitStack())
        assert prepare(record, opening) == {}
        for finish in (*opening.at_last, *opening.at_end):
            finish()
        with child(lambda: None) as pid:
            # It is where we are, so that what is not attached is not its.
            assert capture(SYSV, pid).segments == ()
        assert sysvipc.read_semaphores(record.semaphores[0].id, 2) == (3, 4)
        again = [sysvipc.copy_message(record.queues[0].id, index, 4096) for index in range(5)]
        assert again == [*((one.kind, one.text) for one in record.queues[0].messages), None]
        at = sysvipc.shmat(record.segments[0].id)
        with open("/proc/self/mem", "rb") as memory:
            memory.seek(at + 5000)
            assert memory.read(6) == b"hello\0"
        sysvipc.shmdt(at)


def test_too_much_data_is_named():
    def attach_much():
        number = sysvipc.shmget(0, 17 << 20, sysvipc.IPC_CREAT | 0o600)
        at = sysvipc.shmat(number)
        sysvipc.remove_segment(number)
        sysvipc.write_attached(at, 0, b"x" * (17 << 20))

    with child(attach_much) as pid:
        (finding,) = look(SYSV, pid)
    assert "17 MiB of data" in finding


SEGMENT = SegmentRecord(5, Permissions(0, 0, 0, 0o600), 0, 8192, ())


def test_an_id_in_use_is_named_and_refused():
    number = sysvipc.shmget(0, 4096, sysvipc.IPC_CREAT | 0o600)
    at = sysvipc.shmat(number)
    try:
        wanted = attrs.evolve(SEGMENT, id=number)
        record = SysvRecord((), (wanted,), (), (), ())
        (finding,) = check_host(record, FEATURES)
        assert "somebody uses a segment of this id" in str(finding)
        with pytest.raises(RestoreFailed, match="in use"):
            prepare(record, Opening(RestoreOptions(), contextlib.ExitStack()))
        assert number in segments()
    finally:
        sysvipc.shmdt(at)
        with contextlib.suppress(OSError):
            sysvipc.remove_segment(number)
