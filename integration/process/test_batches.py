"""The promise: a batch does all that was asked, in order, and the target is what it was before."""

import ctypes
import errno
import os
import signal
import struct

import pytest

from ckpt.errors import TargetError
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import Prctl
from ckpt.process.arena import ARENA_SIZE, arena, choose_end_mark
from ckpt.process.freezer import freeze
from ckpt.process.remote import In, InOut, Out, call
from ckpt.units import Pid
from integration.errors.refusals import untouched
from integration.freezer.targets import child
from integration.harness import dump
from integration.procview import view
from integration.workloads.driver import Program

_NOBODY = 65534
_CLOCK_MONOTONIC = 1


def run(pid, calls, options=ptrace.Option.NONE):
    """Run a batch on every thread of a process; return the replies of each."""
    with (
        freeze(Pid(pid), options) as frozen,
        arena(Pid(pid), frozen.tgid, frozen.leader) as lent,
    ):
        return {tid: lent.run(task, calls) for tid, task in frozen.tasks.items()}


@pytest.fixture
def program(tmp_path):
    with Program("s_registers", cwd=tmp_path) as running:
        with untouched(running.pid):
            yield running
        assert running.ask("check") == "ok"


def test_five_hundred_calls(program):
    names = [f"{number:03}".encode() for number in range(100)]
    calls = []
    for name in names:
        calls += [
            call(NR.gettid),
            call(NR.prctl, Prctl.SET_NAME, In(name)),
            call(NR.prctl, Prctl.GET_NAME, Out(16)),
            call(NR.clock_gettime, _CLOCK_MONOTONIC, Out(16)),
            call(NR.prctl, Prctl.GET_NAME, InOut(b"x" * 32)),
        ]
    # Its own name again, or the next look at the process would tell.
    own = {tid: status["Name"].encode() for tid, status in view(program.pid)["threads"].items()}
    with (
        freeze(Pid(program.pid), ptrace.Option.NONE) as frozen,
        arena(Pid(program.pid), frozen.tgid, frozen.leader) as lent,
    ):
        assert len(frozen.tasks) > 1
        for tid, task in frozen.tasks.items():
            replies = lent.run(task, [*calls, call(NR.prctl, Prctl.SET_NAME, In(own[tid]))])
            assert all(reply.ok for reply in replies)
            assert [reply.asked for reply in replies[:-1]] == calls
            assert {reply.value for reply in replies[:-1:5]} == {tid}
            assert [reply.outs for reply in replies[2:-1:5]] == [
                (name.ljust(16, b"\0"),) for name in names
            ]
            times = [struct.unpack("<2q", reply.outs[0]) for reply in replies[3:-1:5]]
            assert times == sorted(times)
            # What a call does not fill stays what it was.
            assert [reply.outs for reply in replies[4:-1:5]] == [
                (name.ljust(16, b"\0") + b"x" * 16,) for name in names
            ]


def test_a_batch_that_does_not_fit_at_once(program):
    """Three times the arena: it is run in parts, and nobody notices."""
    size = 40_000
    calls = [call(NR.getrandom, Out(size), size, 0)] * (3 * ARENA_SIZE // size)
    for replies in run(program.pid, calls).values():
        assert [reply.value for reply in replies] == [size] * len(calls)
        assert len({reply.outs for reply in replies}) == len(calls)


def test_one_call_that_never_fits(program):
    with pytest.raises(ValueError, match="the arena has"):
        run(program.pid, [call(NR.getrandom, Out(ARENA_SIZE), ARENA_SIZE, 0)])


@pytest.mark.parametrize("place", [0, 10, 20])
def test_a_call_that_fails_does_not_end_the_batch(program, place):
    calls = [call(NR.gettid)] * 20
    calls.insert(place, call(NR.close, 1 << 20))
    for tid, replies in run(program.pid, calls).items():
        failed = replies.pop(place)
        assert (failed.ok, failed.error) == (False, errno.EBADF)
        assert "EBADF" in str(failed)
        assert [reply.value for reply in replies] == [tid] * 20


def test_a_pointer_to_nowhere_is_an_error_like_any_other(program):
    calls = [call(NR.gettid), call(NR.uname, 8), call(NR.gettid)]
    for tid, (before, failed, after) in run(program.pid, calls).items():
        assert failed.error == errno.EFAULT
        assert (before.value, after.value) == (tid, tid)


def test_a_dump_leaves_mappings_and_descriptors(program, tmp_path):
    """Also the next one, which finds its tracker armed; see `program`."""
    for kind in ("full", "delta", "delta"):
        assert dump(program.pid, tmp_path / "image")["kind"] == kind


# -- targets that are not easy to ask --------------------------------------------------------------


def handle_every_harmless_signal():
    for sig in (signal.SIGWINCH, signal.SIGURG, signal.SIGCHLD):
        signal.signal(sig, lambda *_: os._exit(1))


def test_a_process_that_handles_every_signal_that_could_end_a_batch():
    """Then it goes call by call, with the same answers."""
    calls = [
        call(NR.gettid),
        call(NR.close, 1 << 20),
        call(NR.clock_gettime, _CLOCK_MONOTONIC, Out(16)),
        call(NR.getcwd, InOut(b"x" * 4096), 4096),
    ] * 5
    with child(handle_every_harmless_signal) as pid, untouched(pid):
        with freeze(Pid(pid), ptrace.Option.NONE) as frozen:
            assert choose_end_mark(frozen.leader) is None
        (replies,) = run(pid, calls).values()
        assert [reply.value for reply in replies[::4]] == [pid] * 5
        assert [reply.error for reply in replies[1::4]] == [errno.EBADF] * 5
        times = [struct.unpack("<2q", reply.outs[0]) for reply in replies[2::4]]
        assert times == sorted(times)
        assert times[0] > (0, 0)
        here = os.fsencode(os.getcwd()) + b"\0"
        assert all(reply.outs[0].startswith(here) for reply in replies[3::4])


_LOAD_NUMBER, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_KILL_PROCESS, _ALLOW = 0x8000_0000, 0x7FFF_0000
_FORBIDDEN = (NR.mmap, NR.munmap, NR.gettid, NR.tgkill)
_SECCOMP_MODE_FILTER = 2


def forbid_what_we_do():
    """Install a seccomp filter that kills whoever makes one of our calls."""
    lines = [(_LOAD_NUMBER, 0, 0, 0)]
    for left, number in zip(range(len(_FORBIDDEN), 0, -1), _FORBIDDEN, strict=True):
        lines.append((_JUMP_IF_EQUAL, left, 0, number))
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _KILL_PROCESS)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(
        struct.pack("<H6xQ", len(lines), ctypes.addressof(code)), 16
    )
    prctl = ctypes.CDLL(None).prctl
    assert prctl(Prctl.SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert prctl(Prctl.SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0) == 0


def test_a_process_whose_filter_forbids_what_we_do():
    calls = [call(NR.gettid)] * 10
    with child(forbid_what_we_do) as pid:
        with untouched(pid):
            (replies,) = run(pid, calls, ptrace.Option.SUSPEND_SECCOMP).values()
            assert [reply.value for reply in replies] == [pid] * 10
        # Without that option the filter bites: it was there all the time.
        with pytest.raises(TargetError):
            run(pid, calls)
        assert os.waitpid(pid, 0)[1] & 0x7F == signal.SIGSYS


def test_a_process_of_another_user():
    def become_nobody():
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)

    with child(become_nobody) as pid, untouched(pid):
        (replies,) = run(pid, [call(NR.geteuid)] * 500).values()
        assert {reply.value for reply in replies} == {_NOBODY}
