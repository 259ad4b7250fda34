"""`ckpt verify`, `squash` and `prune` as a user calls them: exit codes, sentences, JSON."""

import json
import shutil

import pytest

from ckpt.cli.output import list_numbers
from ckpt.image.chain import Chain
from ckpt.image.verify import verify
from tests.image.chain_model import add_generation, data, new_chain, parent, soft_page
from tests.plugins.tree import TOP

GOLDEN = TOP / "images" / "golden" / "format-1.0"


@pytest.fixture
def image(tmp_path):
    """Four generations, one each ten minutes."""
    made = new_chain(tmp_path / "image")
    add_generation(made, {"mm": [data(0, *map(soft_page, range(9)))]}, created_s=3000.0)
    for number in range(1, 4):
        runs = {"mm": [data(0, soft_page(number)), parent(1, 8)]}
        add_generation(made, runs, number - 1, created_s=3000.0 + 600 * number)
    return made.path


def test_a_good_chain(ckpt, image):
    said = f"4 generations in {image}: all is well\n"
    assert ckpt("verify", image) == (0, said, "")
    code, out, _ = ckpt("verify", "--json", image)
    assert code == 0
    assert json.loads(out) == {
        "chain": Chain.open(image).chain_id,
        "generations": [0, 1, 2, 3],
        "decoded": True,
        "findings": [],
    }


def test_everything_that_is_wrong_is_listed(ckpt, image):
    (image / "gen-000003" / "pages-0").unlink()
    pages = image / "gen-000001" / "pages-0"
    pages.write_bytes(pages.read_bytes()[:-1])
    (image / "gen-000002" / "pages-7").write_bytes(b"")
    code, out, err = ckpt("verify", image)
    assert (code, err) == (31, "")
    lines = out.splitlines()
    assert [line[: len("wrong: generation N")] for line in lines] == [
        f"wrong: generation {number}" for number in (1, 2, 3)
    ]
    assert "its manifest does not know of its file pages-7" in lines[1]
    code, out, _ = ckpt("verify", "--json", image)
    assert code == 31
    assert [one["generation"] for one in json.loads(out)["findings"]] == [
        "generation 1",
        "generation 2",
        "generation 3",
    ]


def test_a_newest_that_is_gone(ckpt, image, tmp_path):
    """Who restores or copies must say that an older one will do; who only looks is told."""
    shutil.rmtree(image / "gen-000003")
    gone = (
        f"{image}/gen-000003/manifest: it was the newest generation, and is gone: put it back, or"
        f" take the newest that is left with --at 2 (if it was removed on purpose, remove"
        f" {image}/newest, too)"
    )
    assert ckpt("verify", image) == (31, f"wrong: newest generation: {gone}\n", "")
    back = tmp_path / "back"
    for line in (["restore", image], ["copy", image, back], ["prune", "--keep-last", 1, image]):
        assert ckpt(*line) == (33, "", f"ckpt: {gone}\n")
    assert ckpt("copy", "--at", 2, image, back)[0] == 0
    code, out, err = ckpt("show", image)
    assert (code, err) == (0, f"ckpt: {gone}\n")
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["0", "1", "2"]
    code, _, err = ckpt("report", image, "-o", tmp_path / "report.html")
    assert (code, err) == (0, f"ckpt: {gone}\n")


def test_verify_of_what_is_no_image(ckpt, tmp_path):
    code, out, err = ckpt("verify", tmp_path)
    assert (code, out) == (30, "")
    assert "it is not an image directory" in err


def test_verify_writes_nothing(ckpt, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(GOLDEN, copy)
    before = sorted(copy.rglob("*"))
    assert ckpt("verify", copy)[0] == 0
    assert sorted(copy.rglob("*")) == before, "not even a lock file is made"


def test_squash(ckpt, image):
    code, out, err = ckpt("squash", "--to", 2, image)
    assert (code, err) == (0, "")
    assert out.startswith(f"generation 2 in {image} is full now (")
    assert out.endswith("; removed 0 to 1\n")
    assert ckpt("squash", "--to", 2, image)[1] == f"generation 2 in {image} is full already\n"
    code, out, _ = ckpt("squash", "--json", image)
    result = json.loads(out)
    assert (code, result["generation"], result["removed"], result["kept"]) == (0, 3, [2], [])
    assert verify(Chain.open(image)) == []


def test_squash_to_what_is_not_there(ckpt, image):
    code, out, err = ckpt("squash", "--to", 9, image)
    assert (code, out) == (34, "")
    assert "has no generation 9; it has 0 to 3" in err


def test_prune_says_first_what_it_would_do(ckpt, image):
    args = ("prune", "--keep-last", 1, "--keep-every", "1h", image)
    code, out, err = ckpt(*args, "--dry-run")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "would be kept 0, 3",
        "would be removed 1 to 2",
        "generation 3 would be a delta on 0",
    ]
    assert Chain.open(image).generations() == [0, 1, 2, 3]
    assert ckpt(*args)[1].splitlines()[:3] == [
        "kept 0, 3",
        "removed 1 to 2",
        "generation 3 is now a delta on 0",
    ]
    assert Chain.open(image).generations() == [0, 3]
    assert verify(Chain.open(image)) == []
    assert ckpt(*args)[1] == "kept 0, 3; there is nothing to remove\n"


def test_prune_for_programs(ckpt, image):
    dry = json.loads(ckpt("prune", "--json", "--dry-run", "--keep-last", 2, image)[1])
    done = json.loads(ckpt("prune", "--json", "--keep-last", 2, image)[1])
    assert (dry["dry_run"], done["dry_run"]) == (True, False)
    assert (dry["bytes_after"], done["bytes_before"]) == (None, dry["bytes_before"])
    assert done["bytes_after"] < done["bytes_before"]
    for result in (dry, done):
        assert (result["kept"], result["removed"]) == ([2, 3], [0, 1])
        assert result["merged"] == [{"generation": 2, "parent": None}]


def test_prune_wants_a_rule(ckpt, image):
    code, out, err = ckpt("prune", image)
    assert (code, out) == (2, "")
    assert "say what to keep: --keep-last, --keep-every, or both" in err
    assert Chain.open(image).generations() == [0, 1, 2, 3]


def test_numbers_for_people():
    assert list_numbers([]) == ""
    assert list_numbers([7, 1, 2, 3, 9, 10]) == "1 to 3, 7, 9 to 10"
