"""What the user declares to lead outside the tree, and what a restore puts there."""

import os
import socket

import pytest

from ckpt.resources.base import RestoreOptions
from ckpt.resources.files.table import FILES
from integration.files.processes import capture, look, opened_by, rebuilt
from integration.files.test_external import pipes, terminal


def name_of(fd):
    return os.readlink(f"/proc/self/fd/{fd}")


def problems(record, **external):
    options = RestoreOptions(external=external)
    return [str(finding) for finding in FILES.check_files(record, options)]


def test_a_pipe_at_any_number_with_its_duplicates():
    with pipes(2) as ((_, writer), (other_reader, other_writer)):
        key = name_of(writer)
        with opened_by(lambda: os.dup2(10, 40), fds={10: writer}) as pid:
            (refused,) = look(pid)
            record = capture(pid, external=[key])
        assert refused == (
            f"fd 10 ({key}): is a pipe whose other end is in another process (dump it with"
            f" --external '{key}', and restore it with --inherit '{key}=FD')"
        )
        assert record.external_keys == [key]
        with rebuilt(record, pid, external={key: other_writer}) as built:
            built.write(10, b"ten ")
            built.write(40, b"forty")
            assert built.warnings == []
        assert os.read(other_reader, 100) == b"ten forty"


def test_both_ends_of_one_pipe_get_the_one_that_fits():
    with pipes(3) as ((reader, writer), (new_reader, feeder), (drain, new_writer)):
        key = name_of(writer)
        with opened_by(fds={5: reader, 6: writer}) as pid:
            (refused, _) = look(pid)
            record = capture(pid, external=["auto"])
        assert f"is a pipe that process {os.getpid()} has open too" in refused
        with rebuilt(record, pid, external={key: (new_writer, new_reader)}) as built:
            os.write(feeder, b"in")
            assert built.read(5, 10) == b"in"
            built.write(6, b"out")
        assert os.read(drain, 10) == b"out"


@pytest.mark.parametrize("spelling", ["socket", "unix", "auto"])
def test_a_unix_socket(spelling):
    ours, theirs = socket.socketpair()
    new, far = socket.socketpair()
    with ours, theirs, new, far:
        key = name_of(theirs.fileno())
        declared = "auto" if spelling == "auto" else key.replace("socket", spelling)
        with opened_by(fds={7: theirs.fileno()}) as pid:
            record = capture(pid, external=[declared])
        given = key if spelling == "auto" else declared
        with rebuilt(record, pid, external={given: new.fileno()}) as built:
            built.write(7, b"question")
            assert far.recv(100) == b"question"
            far.send(b"answer")
            assert built.read(7, 100) == b"answer"
            assert built.warnings == []


def test_a_terminal():
    with terminal() as (_, old), terminal() as (master, new):
        key = name_of(old)
        with opened_by(fds={5: old}) as pid:
            record = capture(pid, external=["auto"])
        with rebuilt(record, pid, external={key: new}) as built:
            built.write(5, b"shown")
        assert os.read(master, 100) == b"shown"


def test_a_file_that_the_restore_shall_replace(tmp_path):
    log, other = tmp_path / "log", tmp_path / "other"
    other.write_text("before ")

    def prepare():
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 9)

    with opened_by(prepare) as pid:
        record = capture(pid, external=[str(log)])
    log.unlink()
    with rebuilt(record, pid, external={str(log): str(other)}) as built:
        built.write(9, b"and after")
    assert other.read_text() == "before and after"


def test_a_standard_stream_that_is_declared_is_asked_for():
    with pipes(2) as ((_, old), (reader, writer)):
        key = name_of(old)
        with opened_by(fds={1: old, 10: old}) as pid:
            declared, plain = capture(pid, external=[key]), capture(pid)
        (asked,) = problems(declared)
        assert asked == (
            f"fd 1 ({key}): led outside the tree, and nothing stands for it (--inherit"
            f" '{key}=FD', a descriptor of this command, or '{key}=PATH')"
        )
        # What was not declared may be given by its name all the same.
        for record in (declared, plain):
            with rebuilt(record, pid, external={key: writer}) as built:
                built.write(1, b"1")
                built.write(10, b"0")
                assert built.warnings == []
            assert os.read(reader, 10) == b"10"


def test_the_number_serves_as_well_as_the_name(tmp_path):
    target = tmp_path / "out"
    with pipes(2) as ((_, old), (reader, writer)):
        with opened_by(fds={10: old}) as pid:
            record = capture(pid, external=["auto"])
        for chosen in (str(target), writer):
            with rebuilt(record, pid, inherit={10: chosen}) as built:
                built.write(10, b"by number")
        assert os.read(reader, 100) == target.read_bytes() == b"by number"


def test_all_that_is_missing_or_does_not_fit_is_named_together(tmp_path):
    with pipes(5) as ends:
        old = [end[1] for end in ends]
        keys = [name_of(fd) for fd in old]
        with opened_by(fds=dict(enumerate(old, start=10))) as pid:
            record = capture(pid, external=["auto"])
        closed = os.dup(0)
        os.close(closed)
        given = (None, ends[1][0], closed, str(tmp_path / "no" / "file"), str(tmp_path / "file"))
        found = problems(record, **{k: one for k, one in zip(keys, given, strict=True) if one})
    assert [line.split("): ")[1].split(" (")[0] for line in found] == [
        "led outside the tree, and nothing stands for it",
        f"descriptor {ends[1][0]} of this command, which shall stand for it, cannot be written",
        f"descriptor {closed} of this command, which shall stand for it, is not open",
        f"{tmp_path}/no/file, which shall stand for it, is not there",
    ]


def test_one_end_of_a_pair_inside_the_tree_cannot_be_declared_alone():
    def prepare():
        return [os.dup2(end.detach(), 5 + nth) for nth, end in enumerate(socket.socketpair())]

    with opened_by(prepare) as pid:
        first, second = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (5, 6))
        (found,) = look(pid, external=[first])
        assert look(pid, external=[first, second]) == []
    assert found.endswith(
        f"({second}): is a unix socket connected to {first}, which is declared external alone"
        f" (give --external '{second}' too)"
    )


def test_auto_takes_nothing_that_has_another_problem():
    with terminal() as (master, slave), opened_by(fds={5: master, 6: slave}) as pid:
        found = look(pid, external=["auto"])
        by_name = look(pid, external=["/dev/pts/ptmx", "/dev/ptmx"])
    assert len(found) == len(by_name) == 2


def test_non_blocking_mode_is_kept_and_not_forced_upon_our_caller():
    with pipes(2) as ((old, _), (new, _)):
        os.set_blocking(old, False)
        key = name_of(old)
        with opened_by(fds={5: old}) as pid:
            record = capture(pid, external=[key])
        with rebuilt(record, pid, external={key: new}) as built:
            with pytest.raises(BlockingIOError):
                built.read(5, 10)
            assert os.get_blocking(new)


def test_what_was_a_socket_and_is_none_is_said(tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        key = name_of(theirs.fileno())
        with opened_by(fds={7: theirs.fileno()}) as pid:
            record = capture(pid, external=[key])
    with rebuilt(record, pid, external={key: str(tmp_path / "file")}) as built:
        assert built.warnings == [f"fd 7 was {key}, and what is there now is no socket"]
