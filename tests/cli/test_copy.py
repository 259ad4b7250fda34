"""`ckpt copy` as a user calls it: exit codes, sentences, JSON. Stores are in integration/stores."""

import json
import shutil
import subprocess
import sys

from tests.image.bucket import files_of
from tests.plugins.tree import TOP

GOLDEN = TOP / "images" / "golden" / "format-1.0"


def test_from_directory_to_directory(ckpt, tmp_path):
    back = tmp_path / "back"
    code, out, err = ckpt("copy", "--at", 1, GOLDEN, f"file://{back}")
    assert (code, err) == (0, "")
    assert out.startswith(f"copied generation 0 to 1: file://{back} (0.0")
    code, out, _ = ckpt("copy", "--json", f"file://{GOLDEN}", back)
    assert code == 0
    said = json.loads(out)
    assert said == said | {"copied": [2], "replaced": [], "present": [0, 1], "bytes_kept": 0}
    assert b"generation 000002" in (back / "newest").read_bytes(), "older versions have none"
    (back / "newest").unlink()
    assert files_of(back) == files_of(GOLDEN)
    assert ckpt("copy", GOLDEN, back)[1] == f"nothing is new: {back} has 0 to 2\n"
    assert ckpt("verify", back)[:2] == (0, f"3 generations in {back}: all is well\n")


def test_what_makes_no_sense(ckpt, tmp_path):
    for args, code, phrase in (
        (("copy", "s3://one/job", "s3://two/job"), 2, "a directory in between"),
        (("copy", GOLDEN, "ftp://host/job"), 2, "no kind of storage"),
        (("copy", tmp_path, tmp_path / "back"), 30, "it is not an image directory"),
        (("copy", "--at", 9, GOLDEN, tmp_path / "back"), 34, "it has 0 to 2"),
        (("restore", "s3://bucket/job"), 36, "give --trust-image"),
        (("restore", "--lazy", "--trust-image", "s3://bucket/job"), 2, "--image-dir"),
        (("restore", "--image-dir", tmp_path / "back", GOLDEN), 2, "fetched from a URL"),
    ):
        said = ckpt(*args)
        assert said[:2] == (code, "")
        assert phrase in said[2]
    assert not (tmp_path / "back").exists()


def test_two_chains_are_not_mixed(ckpt, tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "other")
    header = tmp_path / "other" / "CKPT"
    header.write_text(header.read_text().replace("chain 0", "chain 1"))
    code, _, err = ckpt("copy", GOLDEN, tmp_path / "other")
    assert (code, "it holds chain 1" in err) == (33, True)


def test_nobody_but_those_who_name_a_url_load_what_speaks_to_stores():
    loads = "import ckpt.cli.restore, ckpt.cli.verify, ckpt.cli.copy, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "ckpt.image.objects" in loaded
    assert not {"fsspec", "s3fs", "asyncio"} & loaded
