import os
import stat

import pytest

from ckpt.errors import UsageError
from ckpt.migrate.pairing import Token, read_token, write_token

TOKEN = Token(secret=bytes(range(32)), fingerprint=bytes(range(100, 132)))


def test_a_token_is_one_line_and_comes_back():
    assert TOKEN.line() == (
        "ckpt1.AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
        ".ZGVmZ2hpamtsbW5vcHFyc3R1dnd4eXp7fH1-f4CBgoM"
    )
    assert Token.parse(f" {TOKEN.line()}\n") == TOKEN


def test_a_secret_is_new_each_time_and_shown_by_line_alone():
    one, other = Token.make(bytes(32)), Token.make(bytes(32))
    assert one.secret != other.secret
    assert repr(one.secret) not in repr(one)
    assert str(one) == repr(one)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ckpt1",
        TOKEN.line()[:-1],
        TOKEN.line() + "A",
        TOKEN.line().replace("ckpt1", "ckpt2"),
        TOKEN.line().replace("ckpt1.A", "ckpt1.+"),
        TOKEN.line() + "\n" + TOKEN.line(),
    ],
)
def test_anything_else_is_no_token_and_is_not_repeated(line):
    with pytest.raises(UsageError) as raised:
        Token.parse(line)
    assert "AAECAwQF" not in str(raised.value)


def test_a_file_is_for_its_owner_only_even_where_there_was_one(tmp_path):
    path = tmp_path / "token"
    path.write_text("old")
    path.chmod(0o644)
    before = os.umask(0)
    try:
        write_token(TOKEN, str(path))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_token(str(path)) == TOKEN
    assert [entry.name for entry in tmp_path.iterdir()] == ["token"]


def test_a_file_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "token"
    write_token(TOKEN, str(path))
    path.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        read_token(str(path))


def test_what_cannot_be_a_token_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="regular file"):
        write_token(TOKEN, str(tmp_path))
    with pytest.raises(UsageError, match="cannot write"):
        write_token(TOKEN, str(tmp_path / "missing" / "token"))
    with pytest.raises(UsageError, match="cannot read"):
        read_token(str(tmp_path / "missing"))
    (tmp_path / "binary").write_bytes(os.urandom(200))
    (tmp_path / "binary").chmod(0o600)
    with pytest.raises(UsageError, match="no token"):
        read_token(str(tmp_path / "binary"))


def test_a_link_is_not_followed_when_a_token_is_written(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / "token").symlink_to(tmp_path / "other")
    with pytest.raises(UsageError, match="regular file"):
        write_token(TOKEN, str(tmp_path / "token"))
    assert (tmp_path / "other").read_text() == "kept"
