"""The promise: `ckpt report` shows what was written when, in a browser, and runs nobody's text."""

import json
import re
import subprocess

import pytest
from PIL import Image

from integration.harness import become_subreaper, ckpt, dump
from integration.trees.test_trees import Tree, python

become_subreaper()

N_PAGES = 640
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=x()>"
PROGRAM = f"""
import mmap
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
memory = mmap.mmap(-1, {N_PAGES} * 4096, flags=flags)
memory.write(b"x" * len(memory))
shared = os.memfd_create({EVIL!r})
os.write(shared, b"y" * 8 * 4096)
libc.prctl(15, b"<b>evil</b>")
def touch(first, n_pages):
    for page in range(first, first + n_pages):
        memory[page * 4096] = 1
child()
"""
# What is in the page that a program does to it, once it stands.
KEYS = """
const timeline = document.getElementById("timeline");
const press = key => timeline.dispatchEvent(new KeyboardEvent("keydown", {key}));
const said = document.getElementById("said");
for (const key of ["Home", "ArrowRight"]) press(key);
const found = () => said.textContent.includes("64 of 640 pages");
for (let n = 0; n < 200 && !found(); n += 1) press("ArrowDown");
press("Enter");
"""


def browse(page, folder, *options):
    """Open the page without a head; return what Chromium prints."""
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += [f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1400", *options]
    done = subprocess.run(
        [*words, page.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of a full generation and two deltas: one of 64 pages and some, one of 640."""
    folder = tmp_path_factory.mktemp("report")
    image = folder / "image"
    with Tree(python(PROGRAM), cwd=folder) as work:
        dump(work.pid, image)
        for first, n_pages in ((320, 64), (0, 640)):
            assert work.ask(f"touch({first}, {n_pages})") == "None"
            dump(work.pid, image)
    made = ckpt("report", "--json", image, "-o", folder / "report.html")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["generations"] == 3
    return folder / "report.html"


def facts_of(page):
    (text,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text())
    return json.loads(text)


def test_what_was_written_is_told_page_by_page(page):
    facts = facts_of(page)
    # Its child has the same memory, and writes nothing.
    mapped = [one for one in facts["rows"] if one["sizes"] == [[0, N_PAGES]]]
    (row,) = (one for one in mapped if one["owner"] == facts["processes"][0]["pid"])
    assert {index: written for index, (written, _) in row["written"].items()} == {
        "1": 64,
        "2": 640,
    }
    (_, bins) = row["written"]["1"]
    # A tenth from the middle on: 3.2 of 32 parts.
    assert bins == "0" * 16 + "9992" + "0" * 12
    assert [one["kind"] for one in facts["generations"]] == ["full", "delta", "delta"]
    assert [one["name"] for one in facts["processes"]][:1] == ["<b>evil</b>"]
    assert f"{EVIL} (memfd)" in [row["name"] for row in facts["rows"]]


def test_a_browser_draws_it_and_takes_names_for_text(page, tmp_path):
    dom = browse(page, tmp_path, "--dump-dom")
    assert "Checkpoints of &lt;b&gt;evil&lt;/b&gt; (pid " in dom
    assert "<b>evil" not in dom
    assert "<img" not in dom
    assert dom.count("<script") == 2
    assert "<title>ckpt report: " in dom
    assert dom.count('class="freeze"') == 3
    for level in ("h3", "h5", "full", "cell"):
        assert f'class="{level}"' in dom.split('id="plot"')[1], level


def test_it_asks_nobody_for_anything(page):
    text = page.read_text()
    assert set(re.findall(r"\w+://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"<(?:link|img|iframe|script src)", facts_removed(text)) == []
    assert "default-src 'none'" in text


def facts_removed(text):
    return re.sub(r'(<script type="application/json").*?</script>', r"\1>", text)


def test_keys_lead_to_the_details(page, tmp_path):
    """The policy of the page forbids any script but its own; so a copy without it is asked."""
    text = page.read_text().replace("Content-Security-Policy", "X")
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", f"<script>{KEYS}</script></body>"))
    dom = browse(copy, tmp_path, "--dump-dom")
    assert re.search(r'id="said"[^>]*>Generation 1, [^<]*: 64 of 640 pages written \(10 %', dom)
    assert "where in it, first page on top" in dom
    # With the policy nothing of that happens.
    copy.write_text(copy.read_text().replace('"X"', '"Content-Security-Policy"'))
    assert "where in it, first page on top<" not in browse(copy, tmp_path, "--dump-dom")


@pytest.mark.parametrize(
    ("options", "colours"),
    [
        ([], {"paper": (255, 255, 255), "ink": (27, 34, 40), "heat": (75, 152, 196)}),
        (
            ["--force-dark-mode"],
            {"paper": (26, 32, 38), "ink": (228, 233, 237), "heat": (53, 146, 194)},
        ),
    ],
    ids=["light", "dark"],
)
def test_it_can_be_read_by_day_and_by_night(page, tmp_path, options, colours):
    shot = tmp_path / "shot.png"
    browse(page, tmp_path, *options, f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = image.convert("RGB")
        assert pixels.size == (1200, 1400)
        counts = {colour: n for n, colour in pixels.getcolors(1 << 21)}
    # Most of it is paper; there is text; and one cell of a tenth, and more, is shaded.
    assert counts[colours["paper"]] > 600_000
    assert counts[colours["ink"]] > 500
    assert counts[colours["heat"]] > 500
