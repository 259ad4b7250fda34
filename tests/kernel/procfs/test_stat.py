import os

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel.procfs.stat import parse_stat, read_stat, read_task_stat
from tests.kernel.children import ended, running
from tests.kernel.procfs.captured import text


def test_a_process():
    stat = parse_stat(text("stat_plain"))
    assert (stat.comm, stat.state, stat.exit_signal) == ("plain", "R", 17)
    assert (stat.ppid, stat.pgrp, stat.session) == (12415, 12415, 2481)
    assert (stat.tty_nr, stat.tpgid) == (0, -1)
    assert (stat.utime_ticks, stat.stime_ticks) == (2, 1)
    assert (stat.priority, stat.nice, stat.num_threads) == (20, 0, 1)
    assert stat.start_time_ticks == 292518
    assert (stat.vsize_bytes, stat.rss_pages) == (18194432, 3232)
    assert (stat.start_code, stat.end_code) == (4321280, 7148169)
    assert stat.start_stack == 140737294519296
    assert (stat.processor, stat.rt_priority, stat.policy) == (1, 0, 0)
    assert (stat.start_data, stat.end_data, stat.start_brk) == (9723336, 11027064, 815996928)
    assert (stat.arg_start, stat.arg_end) == (140737294522855, 140737294522888)
    assert (stat.env_start, stat.env_end) == (140737294522888, 140737294524391)
    assert stat.exit_code == 0


def test_a_name_that_looks_like_the_rest_of_the_line():
    nasty, plain = parse_stat(text("stat_nasty")), parse_stat(text("stat_plain"))
    assert os.fsencode(nasty.comm) == b") R 1 (a\nb\\c\xff"
    assert (nasty.pid, nasty.ppid, nasty.env_end) == (plain.pid, plain.ppid, plain.env_end)


def test_a_zombie():
    stat = parse_stat(text("stat_zombie"))
    assert (stat.state, stat.exit_code, stat.vsize_bytes) == ("Z", 3 << 8, 0)


def test_a_kernel_thread():
    stat = parse_stat(text("stat_kthread"))
    assert (stat.pid, stat.comm, stat.ppid, stat.start_code) == (2, "kthreadd", 0, 0)


@pytest.mark.parametrize("line", ["", "1 (x) S", "x (x) S" + " 0" * 49, "1 x S" + " 0" * 49])
def test_another_form_is_refused(line):
    with pytest.raises(ValueError, match="not a line"):
        parse_stat(line)


def test_a_live_process():
    code = """
        libc = ctypes.CDLL(None)
        libc.prctl(15, ctypes.c_char_p(b"a ) b"))
        os.nice(3)
        os.setsid()
        say(libc.sbrk(0) & 0xFFF)
        wait()
    """
    with running(code) as child:
        child.heard()
        stat = read_stat(child.pid)
        assert stat.comm == "a ) b"
        assert (stat.pid, stat.ppid) == (child.pid, os.getpid())
        assert (stat.pgrp, stat.session) == (child.pid, child.pid)
        assert stat.nice == os.getpriority(os.PRIO_PROCESS, child.pid) == os.nice(0) + 3
        assert stat.start_stack > stat.start_brk > 0
        own = read_task_stat(child.pid, child.pid)
        assert own.start_time_ticks == stat.start_time_ticks
        assert stat.start_time_ticks >= read_stat(os.getpid()).start_time_ticks


def test_gone():
    with ended() as pid:
        assert read_stat(pid).state == "Z"
    with pytest.raises(TargetGone):
        read_stat(pid)
    with pytest.raises(TargetGone):
        read_task_stat(os.getpid(), 1)
