"""Every fault that is listed can be had, every one that can be had is listed, no other is taken."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt import fault
from ckpt.errors import NotPermitted, UsageError
from ckpt.fault import Fault
from ckpt.kernel.arch import NR

SOURCES = [path.read_text() for path in Path(fault.__file__).parent.rglob("*.py")]


def named_by(pattern):
    return [name for text in SOURCES for name in re.findall(pattern, text)]


def test_each_point_is_reached_at_one_place():
    assert sorted(named_by(r'fault\.reach\("([^"]+)"\)')) == sorted(fault.POINTS)


def test_each_feature_can_be_switched_off():
    assert set(named_by(r'fault\.(?:number|is_off)\("([^"]+)"')) == set(fault.FEATURES)


def read(text):
    return Fault.read({fault.VARIABLE: text})


def test_nothing_is_planned_without_it():
    assert Fault.read({}) is None
    assert fault.number("kcmp", 312) == 312 == NR.kcmp
    assert not any(map(fault.is_off, fault.FEATURES))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("dump-forgotten=kill", "point 'dump-forgotten'"),
        ("dump-forgotten", "point 'dump-forgotten'"),
        ("without-hope", "feature 'hope'"),
        ("dump-frozen=sleep", "action 'sleep'"),
        ("dump-frozen", "action ''"),
        ("dump-frozen#x=kill", "'x'"),
    ],
)
def test_what_is_not_known_is_refused(text, word):
    with pytest.raises(UsageError, match=word):
        read(text)


def test_a_command_refuses_it_in_one_sentence(tmp_path):
    command = "import sys; from ckpt.cli.main import main; sys.exit(main())"
    for text in ("dump-forgotten=kill", "received:Nonsense=cut"):
        done = subprocess.run(
            [sys.executable, "-c", command, *(["migrate", "--pid", "1", "--to", "ssh://h"])],
            env=os.environ | {fault.VARIABLE: text},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("ckpt: CKPT_FAULT: there is no ")
        assert done.stderr.count("\n") == 1


def test_a_call_that_is_off_is_one_that_no_kernel_has():
    script = (
        "import errno\n"
        "from ckpt.kernel.arch import NR\n"
        "from ckpt.kernel.libc import syscall\n"
        "try:\n    syscall(NR.kcmp, 1, 1, 2, 0, 0)\n"
        "except OSError as error:\n    print(errno.errorcode[error.errno])\n"
    )
    environment = os.environ | {fault.VARIABLE: "without-kcmp"}
    told = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout == "ENOSYS\n"


def test_it_happens_at_its_time_and_once(tmp_path):
    planned = read(f"dump-frozen#2=note:{tmp_path / 'notes'}")
    for point in ("dump-frozen", "dump-thawed", "dump-frozen", "dump-thawed"):
        planned.reach(point, None)
    assert (tmp_path / "notes").read_text() == "dump-frozen\n"
    failing = read("dump-frozen=fail")
    with pytest.raises(NotPermitted, match="dump-frozen"):
        failing.reach("dump-frozen", None)
    failing.reach("dump-frozen", None)
