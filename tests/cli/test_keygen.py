"""`ckpt keygen`: what it prints is the recipient of the key that it wrote, and nothing secret."""

import json

from ckpt.cli.main import cli, run
from ckpt.image.keys import read_private_keys


def test_it_writes_a_key_and_prints_its_recipient(tmp_path, capsys):
    path = tmp_path / "key"
    assert run(cli, ["keygen", str(path)]) == 0
    (key,) = read_private_keys(path)
    assert capsys.readouterr().out == f"{key.recipient}\n"
    assert run(cli, ["keygen", "--recipient", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"file": str(path), "recipients": [str(key.recipient)]}


def test_a_key_that_is_there_is_kept(tmp_path, capsys):
    path = tmp_path / "key"
    assert run(cli, ["keygen", str(path)]) == 0
    before = path.read_bytes()
    assert run(cli, ["keygen", str(path)]) == 2
    assert "File exists" in capsys.readouterr().err
    assert path.read_bytes() == before
