"""Who is signalled when a descriptor becomes ready."""

import fcntl
import os
import signal
import struct
import threading

import pytest

from ckpt.kernel.procfs.status import read_status
from ckpt.resources.base import Target, Tree
from ckpt.resources.files.owners import FILE_OWNERS, O_ASYNC
from ckpt.units import Pid
from integration.files.processes import FEATURES, capture, look, opened_by, rebuilt

F_SETOWN_EX = 15
TID, PID, PGRP = 0, 1, 2


def alarm(fd, kind, pid, sig=0, flags=O_ASYNC):
    fcntl.fcntl(fd, F_SETOWN_EX, struct.pack("ii", kind, pid))
    if sig:
        fcntl.fcntl(fd, fcntl.F_SETSIG, sig)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | flags)


@pytest.mark.parametrize("kind", [TID, PID])
def test_an_owner_is_alarmed_as_before(kind):
    sig = signal.SIGRTMIN + 3

    def prepare():
        signal.signal(sig, signal.SIG_IGN)
        os.pipe()
        alarm(3, kind, os.getpid(), sig, O_ASYNC | os.O_NONBLOCK)

    with opened_by(prepare) as pid:
        record, owners = capture(pid), capture(pid, FILE_OWNERS)
    assert [(o.fd, o.kind, o.pid, o.signal) for o in owners.owners] == [(3, kind, pid, sig)]
    with rebuilt(record, pid) as built:
        assert not built.capture(FILE_OWNERS).owners
        built.restore(FILE_OWNERS, owners)
        assert built.capture(FILE_OWNERS) == owners
        assert built.capture().descriptions[1].flags & (O_ASYNC | os.O_NONBLOCK)
        built.write(4, b"x")
        status = read_status(pid)
    pending = status.pending | status.shared_pending
    assert pending >> (sig - 1) & 1


def test_an_owner_without_o_async_and_a_signal_without_owner():
    def prepare():
        os.pipe()
        alarm(3, PID, os.getpid(), flags=0)
        fcntl.fcntl(4, fcntl.F_SETSIG, 40)
        os.pipe()

    with opened_by(prepare) as pid:
        record, owners = capture(pid), capture(pid, FILE_OWNERS)
    assert [owner.fd for owner in owners.owners] == [3, 4]
    with rebuilt(record, pid) as built:
        built.restore(FILE_OWNERS, owners)
        assert built.capture(FILE_OWNERS) == owners


def test_an_owner_that_is_gone_is_left_out_with_a_warning():
    def prepare():
        os.pipe()
        started = threading.Barrier(2)
        thread = threading.Thread(target=lambda: (started.wait(), threading.Event().wait()))
        thread.daemon = True
        thread.start()
        alarm(3, TID, thread.native_id)
        started.wait()

    with opened_by(prepare) as pid:
        record, owners = capture(pid), capture(pid, FILE_OWNERS)
    (owner,) = owners.owners
    assert owner.pid not in (0, pid)
    with rebuilt(record, pid) as built:
        built.restore(FILE_OWNERS, owners)
        gone = f"fd 3 signalled {owner.pid}, which does not exist: nobody now"
        assert built.warnings == [gone]
        assert built.capture(FILE_OWNERS).owners[0].asynchronous


def test_an_owner_outside_is_refused():
    def prepare():
        os.pipe()
        alarm(3, PID, os.getppid(), flags=0)

    with opened_by(prepare) as pid:
        assert look(pid, FILE_OWNERS) == [
            f"fd 3: signals process {os.getpid()} when it is ready (F_SETOWN)"
        ]


def test_an_owner_that_is_another_process_of_the_tree_is_not_refused():
    def prepare():
        os.pipe()
        alarm(3, PID, os.getppid(), flags=0)
        alarm(4, PGRP, os.getpgid(os.getppid()), flags=0)

    with opened_by(prepare) as pid:
        tree = Tree((Pid(os.getpid()), pid))
        assert list(FILE_OWNERS.look(Target(pid, FEATURES, tree=tree))) == []
