"""The page that `ckpt report` writes is one file, whole, and takes whatever it shows for text."""

import base64
import hashlib
import json
import re
import shutil

import pytest

from ckpt.cli.main import cli, run
from tests.plugins.tree import TOP

GOLDEN = TOP / "images" / "golden" / "format-1.0"
EVIL = "<!--<script>{{facts}}&amp;\u2028"


@pytest.fixture
def page(tmp_path, capsys):
    chain, page = tmp_path / EVIL, tmp_path / "page.html"
    shutil.copytree(GOLDEN, chain)
    assert run(cli, ["report", str(chain), "-o", str(page)]) == 0
    assert capsys.readouterr().out.startswith("3 generations are shown in ")
    return page.read_text()


def test_all_placeholders_are_filled_once_and_markup_is_text(page):
    start, end = '<script type="application/json" id="facts">', "</script>"
    head, _, rest = page.partition(start)
    text, _, tail = rest.partition(end)
    assert json.loads(text)["directory"].endswith(EVIL)
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert "&lt;!--&lt;script&gt;{{facts}}&amp;amp;\u2028</title>" in head
    assert "{{" not in tail


def test_the_policy_allows_the_script_and_the_style_that_are_there(page):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_what_was_there_is_replaced_and_nothing_is_left_beside_it(tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("old")
    assert run(cli, ["report", "--json", "--last", "2", str(GOLDEN), "-o", str(page)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "output": str(page),
        "generations": 2,
        "page_bytes": page.stat().st_size,
    }
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("place", [".", "none/page.html"])
def test_a_place_where_no_page_can_be(place, tmp_path, capsys):
    assert run(cli, ["report", str(GOLDEN), "-o", str(tmp_path / place)]) == 2
    assert capsys.readouterr().err.startswith("ckpt: --output: ")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_chain_leaves_the_old_page(tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("old")
    broken = TOP / "images" / "broken" / "bit-flip-in-manifest"
    assert run(cli, ["report", str(broken), "-o", str(page)]) == 31
    assert "is damaged" in capsys.readouterr().err
    assert page.read_text() == "old"
