"""The promise: what `ckpt run` has noted is there whole, or said to be damaged; never guessed."""

import json
import os

import attrs
import pytest

from ckpt.engine.job import NOTE_NAME, Job, Note, owned
from ckpt.errors import HostFull, ImageBusy, ImageCorrupt, ImageUnusable
from ckpt.process.tree import read_boot_id
from ckpt.units import GenerationNo, Pid

JOB = Job(
    command=("./job", "--name", "\udcff"),
    first=GenerationNo(3),
    boot_id="a boot",
    pid=4711,
    start_ticks=12,
    streams=("/var/log/job", "pipe:[1]"),
    ended=137,
    newest=GenerationNo(5),
)


def test_what_is_written_is_read(tmp_path):
    note = Note(tmp_path)
    assert note.read() is None
    note.write(JOB)
    assert note.read() == JOB
    assert [path.name for path in tmp_path.iterdir()] == [NOTE_NAME]
    assert (tmp_path / NOTE_NAME).stat().st_mode & 0o777 == 0o600
    note.write(attrs.evolve(JOB, ended=None))
    assert note.read() == attrs.evolve(JOB, ended=None)
    note.remove()
    assert note.read() is None


def test_a_note_of_an_older_version_is_read(tmp_path):
    note = Note(tmp_path)
    note.write(JOB)
    raw = json.loads((tmp_path / NOTE_NAME).read_text())
    del raw["newest"]
    (tmp_path / NOTE_NAME).write_text(json.dumps(raw))
    assert note.read() == attrs.evolve(JOB, newest=None)


DAMAGES = {
    "nothing": "",
    "no JSON": "{",
    "no object": "[]",
    "another version": {"version": 2},
    "no command": {"command": []},
    "a word that is none": {"command": [1]},
    "one stream": {"streams": ["a"]},
    "no number": {"pid": "x"},
    "a status that is none": {"ended": "x"},
    "a newest that is none": {"newest": "x"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_note_is_no_job(damage, tmp_path):
    note = Note(tmp_path)
    note.write(JOB)
    path = tmp_path / NOTE_NAME
    how = DAMAGES[damage]
    path.write_text(how if isinstance(how, str) else json.dumps(json.loads(path.read_text()) | how))
    with pytest.raises(ImageCorrupt, match="--again"):
        note.read()


def test_a_note_that_cannot_be_written_or_read(tmp_path):
    with pytest.raises(HostFull):
        Note(tmp_path / "gone").write(JOB)
    (tmp_path / NOTE_NAME).mkdir()
    with pytest.raises(ImageUnusable):
        Note(tmp_path).read()


def test_it_runs_only_as_the_very_process():
    ours = JOB.as_process(Pid(os.getpid()))
    assert ours.runs()
    assert not attrs.evolve(ours, start_ticks=ours.start_ticks - 1).runs()
    assert not attrs.evolve(ours, boot_id="another").runs()
    assert not attrs.evolve(ours, pid=0).runs()


def test_a_process_that_has_ended_does_not_run():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    ended = attrs.evolve(JOB, boot_id=read_boot_id()).as_process(Pid(pid))
    assert not ended.runs()
    os.waitpid(pid, 0)
    assert not ended.runs()


def test_a_directory_has_one_owner(tmp_path):
    with owned(tmp_path):
        pid = os.fork()
        if pid == 0:
            try:
                with owned(tmp_path):
                    os._exit(1)
            except ImageBusy:
                os._exit(0)
            finally:
                os._exit(2)
        assert os.waitpid(pid, 0)[1] == 0
    with owned(tmp_path):
        pass
