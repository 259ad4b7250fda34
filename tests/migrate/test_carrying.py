"""What a destination makes of files that a peer sends, whatever it says."""

import os

import attrs
import pytest

from ckpt.errors import FileChanged, MigrateError, UsageError
from ckpt.migrate.carrying import Carried, Carrier
from ckpt.migrate.messages import FileBegins, FilePart


def told(path, size, **others):
    word = FileBegins(
        path=str(path),
        size=size,
        mode=0o640,
        uid=os.getuid(),
        gid=os.getgid(),
        atime_ns=10**18,
        mtime_ns=10**18 + 1,
    )
    return attrs.evolve(word, **others)


def send(carried, word, *parts):
    carried.begin(word)
    for part in parts:
        carried.take(FilePart(part))


class Wire:
    """Stands for a channel: what is sent is taken by a `Carried` at once."""

    def __init__(self, carried):
        self.carried = carried
        self.n_files = 0

    def send(self, what):
        if isinstance(what, FileBegins):
            self.n_files += 1
            self.carried.begin(attrs.evolve(what, path=f"{what.path}.there"))
        else:
            self.carried.take(what)


def test_a_file_is_there_when_its_last_byte_has_come_and_gone_unless_kept(tmp_path):
    path = tmp_path / "file"
    with Carried("peer") as carried:
        carried.begin(told(path, 5))
        carried.take(FilePart(b"hel"))
        assert not path.exists()
        carried.take(FilePart(b"lo"))
        assert path.read_bytes() == b"hello"
        assert path.stat().st_mtime_ns == 10**18 + 1
        assert path.stat().st_mode & 0o7777 == 0o640
        # Once more: it has been written to there.
        carried.begin(told(path, 2))
        carried.take(FilePart(b"oh"))
        assert path.read_bytes() == b"oh"
        carried.begin(told(tmp_path / "half", 9))
        carried.take(FilePart(b"half"))
    assert os.listdir(tmp_path) == []
    with Carried("peer") as carried:
        carried.begin(told(path, 0))
        carried.keep()
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_that_is_there_is_touched(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "equal").write_bytes(b"same")
    names = sorted(os.listdir(tmp_path))
    for name in ("mine", "link", "folder", "absent/file"):
        with Carried("peer") as carried, pytest.raises(FileChanged):
            send(carried, told(tmp_path / name, 4), b"same")
    with Carried("peer") as carried:
        carried.begin(told(tmp_path / "equal", 4))
        carried.take(FilePart(b"same"))
        assert carried.paths == {str(tmp_path / "equal")}
    assert sorted(os.listdir(tmp_path)) == names
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "lie",
    [
        {"path": "relative"},
        {"path": "/tmp/../etc/file"},
        {"path": "/tmp/a\0b"},
        {"size": -1},
        {"size": 1 << 60},
        {"mode": 0o100644},
        {"uid": -1},
        {"gid": (1 << 32) - 1},
        {"mtime_ns": -1},
    ],
)
def test_a_file_that_cannot_be_is_not_begun(lie, tmp_path):
    with Carried("peer") as carried, pytest.raises(MigrateError):
        carried.begin(attrs.evolve(told(tmp_path / "file", 3), **lie))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("parts", [[b"more than said"], [b""], [b"all", b"more"]])
def test_parts_are_those_of_a_file(parts, tmp_path):
    with Carried("peer") as carried, pytest.raises(MigrateError):
        send(carried, told(tmp_path / "file", 3), *parts)
    assert os.listdir(tmp_path) == []


def test_two_files_do_not_come_at_once(tmp_path):
    with Carried("peer") as carried:
        carried.begin(told(tmp_path / "one", 3))
        with pytest.raises(MigrateError):
            carried.begin(told(tmp_path / "other", 3))


def test_only_what_has_changed_is_sent_again(tmp_path):
    one, other, big = (tmp_path / name for name in ("one", "other", "big"))
    one.write_bytes(b"one")
    other.write_bytes(b"")
    big.write_bytes(os.urandom((1 << 20) + 5))
    with Carried("peer") as carried:
        wire = Wire(carried)
        carrier = Carrier([str(one), str(other), str(big), str(one)])
        carrier.send(wire)
        assert wire.n_files == 3
        assert (tmp_path / "big.there").read_bytes() == big.read_bytes()
        one.write_bytes(b"longer")
        other.unlink()
        carrier.send(wire)
        assert wire.n_files == 4
        assert (tmp_path / "one.there").read_bytes() == b"longer"


def test_only_regular_files_are_carried(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "fifo"):
        with pytest.raises(UsageError):
            Carrier([str(path)])
