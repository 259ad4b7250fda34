"""Whatever happens to the files of a chain is told before anything is started.

Random damage, one at a time, to a chain with full generations, deltas, a branch, and a generation
that took others in: `verify` must name it, and whoever reads on gets what was written or an
`ImageError`. Some hundred times here; `CKPT_DAMAGES=10000` for more (`make damage`).
"""

import os
import random
import shutil
from collections import Counter

import pytest

from ckpt.errors import ImageError
from ckpt.image.chain import Chain
from ckpt.image.squash import fold
from ckpt.image.verify import verify, verify_for
from ckpt.image.writer import WriterOptions
from tests.image.chain_model import (
    PAGE,
    add_generation,
    data,
    file,
    hard_page,
    new_chain,
    pages_by_frames,
    parent,
    replay,
    soft_page,
    zero,
)

N_DAMAGES = int(os.environ.get("CKPT_DAMAGES", "300"))
READ_EVERY = 4
"""Reading all that is left takes longer than checking all."""
SEED = int(os.environ.get("CKPT_DAMAGE_SEED", "1"))
HISTORY = [
    (None, {"mm-1": [data(0, *map(hard_page, range(5)), *map(soft_page, range(9))), zero(14, 2)]}),
    (0, {"mm-1": [parent(0, 2), data(2, soft_page(102), hard_page(103)), parent(4, 12)]}),
    (1, {"mm-1": [data(0, soft_page(200)), parent(1, 15), file(20, 1)], "mm-2": [zero(0, 3)]}),
    (1, {"mm-1": [parent(0, 8), data(8, hard_page(308)), parent(9, 7)]}),
    (2, {"mm-1": [parent(0, 16), file(20, 1)], "mm-2": [data(0, soft_page(400)), parent(1, 2)]}),
    (None, {"mm-1": [data(0, hard_page(500), soft_page(501)), zero(2, 1)]}),
    (5, {"mm-1": [data(0, hard_page(600)), parent(1, 2)]}),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Generation 4 has become full; 6 has a record of some size."""
    made = new_chain(tmp_path_factory.mktemp("damage") / "chain")
    for number, (above, spaces) in enumerate(HISTORY):
        add_generation(
            made,
            spaces,
            above,
            options=WriterOptions(threads=1, page_file_bytes=6 * PAGE),
            after_run=lambda writer: writer.flush(),
            created_s=1000.0 + number,
            records={"processes": [{"pid": number, "bytes": bytes(range(256)) * 2}]},
            host={"pid": 1, "hostname": "here"},
        )
    with made.lock():
        fold(made, 4, None)
    (made.path / "lock").unlink()
    assert verify(Chain.open(made.path)) == []
    return made.path


def files_of(path):
    return sorted(entry for entry in path.rglob("*") if entry.is_file())


def generations_of(path):
    return sorted(entry for entry in path.iterdir() if entry.is_dir())


def flip(draw, path):
    """One bit, anywhere."""
    target = draw.choice(files_of(path))
    content = bytearray(target.read_bytes())
    bit = draw.randrange(len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    target.write_bytes(content)
    # The minor version is one of those that may come; another one is no damage.
    is_minor = target.name == "CKPT" and bit // 8 == len("ckpt image 1.")
    return is_minor and chr(content[bit // 8]).isdigit()


def cut(draw, path):
    target = draw.choice(files_of(path))
    os.truncate(target, draw.randrange(target.stat().st_size))


def lengthen(draw, path):
    target = draw.choice([one for one in files_of(path) if one.name != "CKPT"])
    with target.open("ab") as opened:
        opened.write(draw.randbytes(draw.randrange(1, 40)))


def blank(draw, path):
    """A range that reads as zeros, as after a power cut on some file systems."""
    target = draw.choice(files_of(path))
    content = bytearray(target.read_bytes())
    start = draw.randrange(len(content))
    end = draw.randrange(start, len(content)) + 1
    harmless = not any(content[start:end])
    content[start:end] = bytes(end - start)
    target.write_bytes(content)
    return harmless


def swap(draw, path):
    one, other = draw.sample(files_of(path), 2)
    harmless = one.read_bytes() == other.read_bytes()
    between = path / "between"
    one.rename(between)
    other.rename(one)
    between.rename(other)
    return harmless


def swap_generations(draw, path):
    one, other = draw.sample(generations_of(path), 2)
    between = path / "between"
    one.rename(between)
    other.rename(one)
    between.rename(other)


def lose(draw, path):
    target = draw.choice(files_of(path))
    target.unlink()
    # A chain of an older version has none.
    return target.name == "newest"


def lose_ancestor(draw, path):
    """One that others need: any other might have been pruned."""
    needed = {above for number, (above, _) in enumerate(HISTORY) if number != 4} - {None}
    shutil.rmtree(path / f"gen-{draw.choice(sorted(needed)):06d}")


def lose_newest(draw, path):
    """Nothing is based on it, and it has a note of its own; so have several of them, and all."""
    for one in generations_of(path)[-draw.randrange(1, len(HISTORY) + 1) :]:
        shutil.rmtree(one)


def copy_over(draw, path):
    one, other = draw.sample(files_of(path), 2)
    harmless = one.read_bytes() == other.read_bytes()
    shutil.copyfile(one, other)
    return harmless


def copy_generation(draw, path):
    shutil.copytree(draw.choice(generations_of(path)), path / f"gen-{draw.randrange(7, 999):06d}")


def copy_beside(draw, path):
    """A page file too many."""
    target = draw.choice([one for one in files_of(path) if one.name.startswith("pages-")])
    n_files = sum(one.name.startswith("pages-") for one in target.parent.iterdir())
    shutil.copyfile(target, target.parent / f"pages-{n_files + draw.randrange(3)}")


def link_elsewhere(draw, path):
    """A link in the place of a file leads anywhere, and is not followed."""
    target = draw.choice(files_of(path))
    target.rename(path / "elsewhere")
    target.symlink_to(path / "elsewhere")


WAYS = [
    flip,
    flip,
    flip,
    flip,
    cut,
    lengthen,
    blank,
    swap,
    swap_generations,
    lose,
    lose_ancestor,
    lose_newest,
    copy_over,
    copy_generation,
    copy_beside,
    link_elsewhere,
]


def is_told(path):
    """Return whether a check of the whole chain says that something is wrong."""
    try:
        return bool(verify(Chain.open(path), threads=1))
    except ImageError:
        return True


def read_what_is_left(path):
    """Read every generation as a restore does; what is read must be what was written."""
    try:
        chain = Chain.open(path)
        numbers = chain.generations()
    except ImageError:
        return
    for number in numbers:
        try:
            reader = verify_for(chain, number, threads=1)
            found = {space: pages_by_frames(reader, space) for space in reader.manifest.spaces}
        except ImageError:
            continue
        assert found == replay(HISTORY, number)


def test_damage_is_told_before_anything_is_started(good, tmp_path):
    done = Counter()
    for n in range(N_DAMAGES):
        draw = random.Random(f"{SEED}-{n}")
        path = tmp_path / "damaged"
        shutil.copytree(good, path)
        way = WAYS[n % len(WAYS)]
        harmless = way(draw, path)
        assert is_told(path) != bool(harmless), f"number {n} of seed {SEED} ({way.__name__})"
        if n % READ_EVERY == 0:
            read_what_is_left(path)
        shutil.rmtree(path)
        done[way.__name__, bool(harmless)] += 1
    assert sum(count for (_, harmless), count in done.items() if harmless) < N_DAMAGES / 20
