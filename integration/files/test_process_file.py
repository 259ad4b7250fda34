"""What belongs to a process and so must wait for it: pidfds, files of /proc/PID, namespaces."""

import ctypes
import os
import select
import struct
from pathlib import Path

import attrs
import pytest

from ckpt.errors import RestoreFailed
from ckpt.kernel.arch import NR
from ckpt.kernel.pidfd import PIDFD_THREAD, pidfd_open
from ckpt.kernel.procfs.fdinfo import read_fdinfo
from ckpt.process.remote import InOut, Out, call
from ckpt.resources.files.process_file import ProcessFileRecord
from integration.files.processes import brought_back, capture, look, opened_by, rebuilt

_CLONE_NEWUTS = 0x4000000


def link(built, fd):
    return os.readlink(f"/proc/{built.pid}/fd/{fd}")


def test_a_pidfd_of_the_process_itself():
    def prepare():
        os.pidfd_open(os.getpid())  # 3
        os.pidfd_open(os.getpid(), os.O_NONBLOCK)  # 4
        os.dup2(3, 30, inheritable=True)
        with select.epoll() as epoll:
            os.dup2(epoll.fileno(), 50)
            epoll.register(3, select.EPOLLIN)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        assert [d.record.pid for d in record.descriptions if d.kind == "pidfd"] == [built.pid] * 2
        for fd in (3, 4, 30):
            assert read_fdinfo(built.pid, fd).pidfd.pid == built.pid
        assert read_fdinfo(built.pid, 3).close_on_exec
        assert not read_fdinfo(built.pid, 30).close_on_exec
        assert read_fdinfo(built.pid, 4).flags & os.O_NONBLOCK
        (told,) = built.run([call(NR.epoll_wait, 50, Out(12), 1, 0)])
        assert told.value == 0
        assert sorted(map(int, os.listdir(f"/proc/{built.pid}/fd"))) == [0, 1, 2, 3, 4, 30, 50]


def test_a_pidfd_of_a_process_that_was_waited_for():
    def prepare():
        child = os.fork()
        if child == 0:
            os._exit(3)
        fd = os.pidfd_open(child)
        os.waitpid(child, 0)
        return fd

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        assert read_fdinfo(built.pid, 3).pidfd.pid == -1
        (polled,) = built.run(
            [call(NR.poll, InOut(struct.pack("<ihh", 3, select.POLLIN, 0)), 1, 0)]
        )
        assert struct.unpack("<ihh", polled.outs[0])[2] & select.POLLIN


def test_a_pidfd_of_somebody_else_is_refused():
    with opened_by() as other:
        with opened_by(lambda: pidfd_open(other)) as pid:
            (finding,) = look(pid)
        assert f"is a pidfd of process {other}, which does not belong to what is dumped" in finding


def test_a_pidfd_of_a_thread_is_refused():
    with opened_by(lambda: pidfd_open(os.getpid(), PIDFD_THREAD)) as pid:
        (finding,) = look(pid)
    assert "is a pidfd of a single thread" in finding


def test_files_of_the_process_itself():
    def prepare():
        os.open("/proc/self/limits", os.O_RDONLY | os.O_CLOEXEC)  # 3
        os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)  # 4
        os.open("/proc/thread-self/comm", os.O_RDWR)  # 5
        os.open("/proc/self/fd", os.O_PATH)  # 6
        os.dup2(3, 40, inheritable=False)
        os.read(3, 20)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        assert link(built, 3) == f"/proc/{built.pid}/limits"
        assert link(built, 4) == f"/proc/{built.pid}"
        assert link(built, 5) == f"/proc/{built.pid}/task/{built.pid}/comm"
        assert link(built, 6) == f"/proc/{built.pid}/fd"
        text = Path(f"/proc/{built.pid}/limits").read_text()
        # Both have one offset.
        assert built.read(40, 10).decode() == text[20:30]
        assert built.read(3, 10).decode() == text[30:40]
        assert built.write(5, b"renamed") == 7
        assert Path(f"/proc/{built.pid}/comm").read_text() == "renamed\n"


def test_memory_of_the_process_itself():
    def prepare():
        os.open("/proc/self/mem", os.O_RDWR)
        os.open("/proc/self/pagemap", os.O_RDONLY)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        base = built.embryo.arena.base
        (read,) = built.run([call(NR.pread64, 3, Out(8), 8, base)])
        assert read.value == 8


def test_namespaces_that_the_process_is_in():
    names = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"]

    def prepare():
        for name in names:
            os.open(f"/proc/self/ns/{name}", os.O_RDONLY)

    with brought_back(prepare) as (record, built):
        assert built.capture() == record
        for fd, name in enumerate(names, 3):
            assert os.path.samestat(
                os.stat(f"/proc/{built.pid}/fd/{fd}"), os.stat(f"/proc/{built.pid}/ns/{name}")
            )


def test_another_namespace_is_refused():
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare():
        ours = os.open("/proc/self/ns/uts", os.O_RDONLY)
        assert libc.unshare(_CLONE_NEWUTS) == 0
        other = os.open("/proc/self/ns/uts", os.O_RDONLY)
        assert libc.setns(ours, _CLONE_NEWUTS) == 0
        os.close(ours)
        return other

    with opened_by(prepare) as pid:
        (finding,) = look(pid)
    assert "is a uts namespace that no process of what is dumped is in" in finding


def test_files_of_others_are_refused():
    with opened_by() as other:

        def prepare():
            os.open(f"/proc/{other}/status", os.O_RDONLY)  # 3
            os.open("/proc/self/fdinfo/0", os.O_RDONLY)  # 4
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.open(f"/proc/{child}/status", os.O_RDONLY)  # 5
            os.waitpid(child, 0)

        with opened_by(prepare) as pid:
            found = [line.split("): ", 1)[1] for line in look(pid)]
    assert found[0].startswith(f"is a file of process {other} in /proc, which does not belong to")
    assert found[1:] == [
        "is a file of /proc that names a descriptor or a mapping, not supported yet",
        "is a file of /proc that belongs to a process that has ended",
    ]


def test_what_cannot_be_opened_fails_the_restore_by_name():
    with opened_by(lambda: os.open("/proc/self/status", os.O_RDONLY)) as pid:
        record = capture(pid)
    gone = ProcessFileRecord(f"/proc/{pid}/none", 0)
    changed = tuple(
        attrs.evolve(one, record=gone) if one.kind == "process_file" else one
        for one in record.descriptions
    )
    with (
        pytest.raises(RestoreFailed, match=rf"opening /proc/{pid}/none.*No such file"),
        rebuilt(attrs.evolve(record, descriptions=changed), pid),
    ):
        pass
