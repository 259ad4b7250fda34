import os
import threading

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel.procfs.files import decode, list_tids, read_bytes
from ckpt.kernel.procfs.status import (
    parse_signal_masks,
    parse_status,
    read_status,
    read_task_status,
    unescape_name,
)
from ckpt.units import Pid
from tests.kernel.children import ended, running
from tests.kernel.procfs.captured import text

ALL_BUT_SYS_RESOURCE = 0x1FFFEFFFFFF


def test_a_process():
    status = parse_status(text("status"))
    assert (status.name, status.state, status.umask) == ("python3", "R", 0o022)
    assert status.tgid == status.pid
    assert status.uids == status.gids == (0, 0, 0, 0)
    assert status.groups == ()
    assert status.ns_pid == status.ns_tgid == (status.pid,)
    assert len(status.ns_pgid) == len(status.ns_sid) == 1
    assert not status.is_kernel_thread
    assert status.vm_rss_bytes % 1024 == 0
    assert 0 < status.vm_rss_bytes < status.vm_size_bytes
    assert status.vm_locked_bytes == 8 * 1024
    assert (status.pending, status.shared_pending, status.blocked) == (0, 0, 0)
    assert status.ignored == 1 << 12 | 1 << 24  # SIGPIPE, SIGXFSZ
    assert status.caught == 1 << 1  # SIGINT
    assert status.cap_effective == status.cap_permitted == ALL_BUT_SYS_RESOURCE
    assert status.cap_ambient == status.cap_inheritable == 0
    assert (status.no_new_privs, status.seccomp_mode, status.n_seccomp_filters) == (False, 0, 0)
    assert status.thp_enabled
    assert status.cpus_allowed == "0-1"


def test_a_name_of_any_bytes():
    status = parse_status(text("status_nasty"))
    assert os.fsencode(status.name) == b") R 1 (a\nb\\c\xff"
    assert status.n_queued_signals == 5


def test_a_zombie_has_neither_memory_nor_umask():
    status = parse_status(text("status_zombie"))
    assert (status.state, status.umask, status.vm_size_bytes) == ("Z", None, 0)
    assert not status.is_kernel_thread


def test_a_kernel_thread_is_told_by_new_and_by_old_kernels():
    captured = text("status_kthread")
    assert parse_status(captured).is_kernel_thread
    assert parse_status(captured.replace("Kthread:\t1\n", "")).is_kernel_thread
    zombie = text("status_zombie").replace("Kthread:\t0\n", "")
    assert not parse_status(zombie).is_kernel_thread


def test_many_groups_and_namespaces():
    changed = (
        text("status")
        .replace("Groups:\t ", "Groups:\t4 24 4294967294 ")
        .replace("NSpid:\t", "NSpid:\t77\t")
        .replace("Uid:\t0\t0\t0\t0", "Uid:\t1\t2\t3\t4294967295")
    )
    status = parse_status(changed)
    assert status.groups == (4, 24, 4294967294)
    assert status.ns_pid == (77, status.pid)
    assert status.uids == (1, 2, 3, 4294967295)


def test_a_field_that_every_kernel_has_must_be_there():
    with pytest.raises(ValueError, match="no field 'CapPrm'"):
        parse_status(text("status").replace("CapPrm", "CapNew"))


@pytest.mark.parametrize(
    ("escaped", "name"),
    [("plain", "plain"), ("a\\nb", "a\nb"), ("a\\\\nb", "a\\nb"), ("\\\\\\n", "\\\n"), ("", "")],
)
def test_escapes_in_names(escaped, name):
    assert unescape_name(escaped) == name


NAMED = """
    libc = ctypes.CDLL(None)
    libc.prctl(15, ctypes.c_char_p(b"x) \\n\\\\\\xff"))
    import signal
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGRTMAX])
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.pthread_kill(threading.get_ident(), signal.SIGRTMAX)
    say("ready")
    wait()
"""


def test_a_live_process():
    with running(NAMED) as child:
        child.heard()
        status = read_status(child.pid)
        assert os.fsencode(status.name) == b"x) \n\\\xff"
        assert status.ppid == os.getpid()
        assert status.blocked == 1 << 9 | 1 << 63
        assert (status.pending, status.shared_pending) == (1 << 63, 1 << 9)
        assert status.caught & 1 << 9
        assert status.ignored & 1 << 11
        assert status.uids == (*os.getresuid(), os.geteuid())
        assert status.tracer_pid == 0


def test_a_thread_of_ours():
    started, finish = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), finish.wait()))
    thread.start()
    started.wait()
    try:
        me, tid = os.getpid(), thread.native_id
        assert {me, tid} <= set(list_tids(me))
        status = read_task_status(me, tid)
        assert (status.pid, status.tgid) == (tid, me)
        assert read_status(tid).tgid == me
        assert status.n_threads >= 2
    finally:
        finish.set()
        thread.join()
    with pytest.raises(TargetGone):
        read_task_status(me, 1)


def test_a_zombie_still_has_a_status():
    with ended() as pid:
        assert read_status(pid).state == "Z"
    with pytest.raises(TargetGone) as caught:
        read_status(pid)
    assert caught.value.pid == pid


def test_the_signal_masks_alone_are_those_of_the_whole():
    raw = read_bytes(Pid(os.getpid()), "status")
    masks, whole = parse_signal_masks(raw), parse_status(decode(raw))
    for name in ("pending", "shared_pending", "blocked", "ignored", "caught"):
        assert getattr(masks, name) == getattr(whole, name), name
    assert masks.ignored  # SIGPIPE, by Python: so it is not nothing that was compared


def test_no_signal_masks_are_no_status():
    with pytest.raises(ValueError, match="signal masks"):
        parse_signal_masks(b"Name:\tx\n")
