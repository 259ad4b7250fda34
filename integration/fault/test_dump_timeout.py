"""The promise: a dump that takes longer than it may has not been, whatever it was at.

The target is unharmed and goes on, the chain is as it was, nothing of ours is left, and what was
noted of written pages is not believed: the next dump is right.
"""

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from ckpt.engine.dump import DumpOptions, dump
from ckpt.errors import DumpTimeout
from ckpt.image.chain import Chain
from ckpt.image.format import MANIFEST_NAME, page_file_name
from ckpt.image.store import Store
from ckpt.image.verify import verify
from integration.fault.holding import held_disk
from integration.harness import CKPT, Restored
from integration.harness import dump as command_dump
from integration.live.moments import Moment, at
from integration.live.sweeping import Sweeper
from integration.run.supervised import OFTEN, Supervised, line
from integration.workloads.driver import ANSWER_S, Program

SHORT_S = 0.2
THROUGH_TWIN = DumpOptions(tracker="full", max_freeze_ms=0, timeout_s=SHORT_S)
IN_ROUNDS = DumpOptions(incremental=True, max_freeze_ms=0, timeout_s=SHORT_S)
WHOLE = DumpOptions(incremental=True)
MOMENTS = [
    # While a twin is seized our code is in the target, and no alarm is heard: see `uninterrupted`.
    *((moment, 1, IN_ROUNDS) for moment in Moment if moment is not Moment.SEIZING),
    # The last one is asked while the target stands still.
    (Moment.COLLECTING, 2, IN_ROUNDS),
    (Moment.STORING, 1, THROUGH_TWIN),
    (Moment.COMMITTING, 1, THROUGH_TWIN),
]
N_AT_RANDOM = 12


def never():
    """Wait for what does not come."""
    assert not threading.Event().wait(ANSWER_S)


def names_in(image):
    return sorted(os.listdir(image))


def test_it_ends_wherever_the_dump_is(tmp_path):
    image = tmp_path / "image"
    alarm = signal.getsignal(signal.SIGALRM)
    with Sweeper("--mib", "8", cwd=tmp_path) as target:
        dump(target.pid, image, WHOLE)
        for n_before, (moment, turn, options) in enumerate(MOMENTS):
            links, _ = target.outside()
            names, threads = names_in(image), threading.active_count()
            n_ours = len(os.listdir("/proc/self/fd"))
            with at(moment, turn, never) as calls, pytest.raises(DumpTimeout) as caught:
                dump(target.pid, image, options)
            assert calls[0] <= turn
            assert f"after {SHORT_S:g} s" in caught.value.message()
            assert names_in(image) == names, moment
            assert threading.active_count() == threads
            assert len(os.listdir("/proc/self/fd")) == n_ours, moment
            assert target.outside()[0] == links, moment
            target.expect_unharmed()
            assert target.clones() == []
            assert target.ask("check") == "ok", moment
            assert target.ask("step") == "stepped"
            # What the lost one has asked of the tracker is gone: nothing may be taken as unchanged.
            made = dump(target.pid, image, WHOLE)
            assert made.generation == n_before + 1
        assert signal.getsignal(signal.SIGALRM) is alarm
    assert verify(Chain.open(image)) == []
    with Restored(image) as back:
        assert back.ask("check") == "ok"


def test_a_chain_that_was_made_for_it_is_gone_again(tmp_path):
    image = tmp_path / "image"
    with Sweeper("--mib", "8", cwd=tmp_path) as target:
        with at(Moment.COMMITTING, 1, never), pytest.raises(DumpTimeout):
            dump(target.pid, image, IN_ROUNDS)
        assert not image.exists()
        target.expect_unharmed()


def test_one_that_is_committed_does_not_fail_any_more(tmp_path, monkeypatch):
    """The alarm comes when only the rename is left."""
    rename = Store.rename
    n_rung = []

    def ring_first(self, name, new_name):
        n_rung.append(new_name)
        signal.raise_signal(signal.SIGALRM)
        rename(self, name, new_name)
        signal.raise_signal(signal.SIGALRM)

    image = tmp_path / "image"
    with Sweeper("--mib", "8", cwd=tmp_path) as target:
        dump(target.pid, image, WHOLE)
        monkeypatch.setattr(Store, "rename", ring_first)
        limited = DumpOptions(incremental=True, timeout_s=ANSWER_S)
        assert dump(target.pid, image, limited).generation == 1
        monkeypatch.undo()
        assert n_rung == ["gen-000001", "newest"]
        assert str(dump(target.pid, image, WHOLE).kind) == "delta"


def dump_in_child(pid, image, timeout_s):
    """Dump in a fork of ours; return its exit code, as that of the command."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            dump(pid, image, DumpOptions(incremental=True, timeout_s=timeout_s))
            code = 0
        except DumpTimeout as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_at_any_instant_it_is_there_or_it_is_not(tmp_path):
    image = tmp_path / "image"
    with Program("writer", "--mib", "16", "--rate", "1000", cwd=tmp_path) as target:
        usual_s = dump(target.pid, image, WHOLE).wall_ms / 1000
        codes = []
        for nth in range(N_AT_RANDOM):
            codes.append(dump_in_child(target.pid, image, usual_s * (nth + 0.5) / N_AT_RANDOM))
            assert Chain.open(image).generations() == list(range(codes.count(0) + 1))
            assert target.ask("check") == "ok", nth
        dump(target.pid, image, WHOLE)
    assert set(codes) <= {0, DumpTimeout.exit_code}
    assert DumpTimeout.exit_code in codes
    assert verify(Chain.open(image)) == []
    with Restored(image) as back:
        assert back.ask("check") == "ok"
    print(f"{N_AT_RANDOM} dumps with a time limit: {codes.count(0)} in time, 0 targets lost")


@contextlib.contextmanager
def dumping(pid, image, *options):
    command = [*CKPT, "dump", "--pid", str(pid), "--timeout", "1s", *options, str(image)]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet, stderr=subprocess.PIPE, text=True) as process:
        end = os.pidfd_open(process.pid)
        try:
            yield process, end
        finally:
            os.close(end)
            process.kill()


@pytest.mark.parametrize(
    ("name", "options"), [(page_file_name(0), ()), (MANIFEST_NAME, ("--kill",))]
)
def test_a_disk_that_does_not_answer_is_given_up_too(name, options, tmp_path):
    """No signal that we handle ends such a call: ckpt ends as a whole, and by that the freeze.

    A thread writes the pages, the manifest is written by the one that has stopped the target.
    """
    with (
        held_disk(tmp_path / "disk") as disk,
        Program("writer", "--mib", "4", "--threads", "1", "--rate", "500", cwd=tmp_path) as target,
    ):
        image = disk.path / "image"
        command_dump(target.pid, image)
        disk.hold(name)
        with dumping(target.pid, image, "--incremental", *options) as (process, end):
            assert disk.await_held(end), "nothing more was opened"
            code = process.wait(ANSWER_S)
            assert process.stderr is not None
            said = process.stderr.read()
        assert code == DumpTimeout.exit_code
        assert "and goes on: something does not answer" in said
        assert target.ask("check") == "ok"
        disk.let_go()
        assert command_dump(target.pid, image)["generation"] == 1
        assert [name for name in names_in(image) if name.startswith(".")] == []
        assert verify(Chain.open(image)) == []


def test_a_target_that_cannot_be_stopped_is_given_up(tmp_path):
    """It waits for a disk itself: the freeze would wait for ten seconds."""
    with held_disk(tmp_path / "disk") as disk:
        file = disk.path / "file"
        file.write_text("content")
        disk.hold("file")
        reading = subprocess.Popen(
            ["cat", file], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        reader = os.pidfd_open(reading.pid)
        with reading, dumping(reading.pid, tmp_path / "image") as (process, _):
            assert disk.await_held(reader)
            code = process.wait(ANSWER_S)
            assert process.stderr is not None
            said = process.stderr.read()
            assert (code, "nothing was added" in said) == (DumpTimeout.exit_code, True), said
            disk.let_go()
            assert reading.communicate(timeout=ANSWER_S)[0] == "content"
            assert reading.returncode == 0
        os.close(reader)
    assert not Path(tmp_path / "image").exists()


def test_a_protected_command_gets_its_checkpoint_when_there_is_one_to_be_had(tmp_path):
    writer = line("writer", "--mib", "4", "--threads", "1", "--rate", "500")
    with held_disk(tmp_path / "disk") as disk:
        image = disk.path / "image"
        options = (*OFTEN, "--timeout", "1s")
        with Supervised(writer, image, *options, cwd=tmp_path) as work:
            assert work.answer() == "ready"
            first = work.event("checkpoint")
            disk.hold("*")
            end = os.pidfd_open(work.process.pid)
            assert disk.await_held(end)
            os.close(end)
            failed = work.event("checkpoint-failed")
            assert failed["error"]["code"] == DumpTimeout.code
            disk.let_go()
            assert work.event("checkpoint")["generation"] > first["generation"]
            assert work.ask("check") == "ok"
