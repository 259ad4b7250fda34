"""A chain of a real process is squashed and pruned: it comes back as before, and deltas go on."""

import hashlib
import json
import os
import select
import shutil
import signal
import zlib

import pytest

from ckpt.errors import ImageBusy
from ckpt.image.chain import Chain
from ckpt.image.reader import PageReader
from ckpt.image.squash import squash
from ckpt.kernel.libc import PAGE_SIZE
from integration.harness import Restored, become_subreaper, ckpt, dump
from integration.lazy.behind import find_server, wait_until_filled
from integration.workloads.driver import Program

become_subreaper()


def digests_of(image):
    """Return, by generation, what all of its memory reads as, and where it is."""
    chain = Chain.open(image)
    found = {}
    for number in chain.generations():
        reader = PageReader(chain, number)
        whole = hashlib.blake2b()
        for space in sorted(reader.manifest.spaces):
            whole.update(repr((space, spans_of(reader.resolve(space)))).encode())
            pages = {}
            for raw, pieces in reader.iter_data(space):
                for address, offset, len_bytes in pieces:
                    for at in range(0, len_bytes, PAGE_SIZE):
                        page = raw[offset + at : offset + at + PAGE_SIZE]
                        pages[address + at] = zlib.crc32(page)
            whole.update(repr(sorted(pages.items())).encode())
        found[number] = whole.hexdigest()
    return found


def spans_of(runs):
    """Return which pages are of which fate, however they are cut into runs."""
    spans = []
    for run in runs:
        end = run.start + run.n_pages * PAGE_SIZE
        if spans and spans[-1][1:] == [run.start, run.fate]:
            spans[-1][1] = end
        else:
            spans.append([run.start, end, run.fate])
    return spans


def keep(*args):
    done = ckpt(*args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_chain_of_a_writer_is_pruned_and_squashed_while_it_writes(tmp_path):
    image = tmp_path / "image"
    with Program("writer", "--mib", "16", "--rate", "2000", cwd=tmp_path) as work:
        for _ in range(4):
            dump(work.pid, image)
        assert keep("prune", "--keep-last", "2", image)["removed"] == [0, 1]
        assert dump(work.pid, image)["kind"] == "delta"
        assert keep("squash", image)["removed"] == [2, 3]
        result = dump(work.pid, image)
        assert (result["generation"], result["kind"]) == (5, "delta"), result["reason"]
        dump(work.pid, image)
        before = digests_of(image)
        assert sorted(before) == [4, 5, 6]
        shutil.copytree(image, tmp_path / "copy")
        assert keep("prune", "--keep-last", "2", image)["merged"] == [
            {"generation": 5, "parent": None}
        ]
        assert keep("squash", image)["removed"] == [5]
        assert digests_of(image) == {6: before[6]}
        assert keep("verify", image)["findings"] == []
        assert work.ask("check") == "ok"
    with Restored(image) as work:
        assert work.ask("check") == "ok"
        result = dump(work.pid, image)
        assert (result["generation"], result["kind"]) == (7, "delta"), result["reason"]
    assert keep("squash", "--to", "5", tmp_path / "copy")["removed"] == [4]
    assert digests_of(tmp_path / "copy") == {5: before[5], 6: before[6]}
    with Restored(tmp_path / "copy", "--at", "5") as work:
        assert work.ask("check") == "ok"
        assert dump(work.pid, tmp_path / "copy")["kind"] == "delta"


def test_a_tree_comes_back_from_a_squashed_chain(tmp_path):
    image = tmp_path / "image"
    with Program("s_shared_tree", cwd=tmp_path) as work:
        for _ in range(3):
            dump(work.pid, image)
        before = digests_of(image)
        keep("squash", image)
        assert digests_of(image) == {2: before[2]}
        # Of a tree, each process goes by an epoch of its own.
        assert dump(work.pid, image)["kind"] == "delta"
        assert work.ask("check") == "ok"
    with Restored(image) as work:
        assert work.ask("check") == "ok"


def test_a_chain_is_not_removed_under_a_process_whose_memory_still_comes(tmp_path):
    image = tmp_path / "image"
    with Program("heartbeat", "--mib", "96", cwd=tmp_path) as work:
        dump(work.pid, image)
        dump(work.pid, image)
    for _ in range(10):
        with Restored(image, "--lazy") as work:
            server = find_server(work.process.pid)
            if server is None:  # it was done before we came
                continue
            os.kill(server, signal.SIGSTOP)
            done = ckpt("squash", image)
            os.kill(server, signal.SIGCONT)
            assert done.returncode == ImageBusy.exit_code, done.stderr
            wait_until_filled(work.process.pid)
            assert work.ask("check") == "ok"
            break
    else:
        pytest.fail("the server was done each time before we came")
    squash(Chain.open(image))
    assert Chain.open(image).generations() == [1]


def test_who_inherits_a_reader_is_one(tmp_path):
    image = tmp_path / "image"
    with Program("s_signals", cwd=tmp_path) as work:
        dump(work.pid, image)
    chain = Chain.open(image)
    end_read, end_write = os.pipe()
    with chain.in_use():
        child = os.fork()
        if child == 0:
            os.close(end_write)
            select.select([end_read], [], [])
            os._exit(0)
    try:
        with pytest.raises(ImageBusy):
            squash(Chain.open(image))
    finally:
        os.close(end_read)
        os.close(end_write)
        os.waitpid(child, 0)
    assert squash(Chain.open(image)).merged == ()
