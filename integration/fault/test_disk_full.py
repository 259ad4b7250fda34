"""The promise: a disk that is full at any write costs a generation, and nothing else.

An image directory lies on a small file system, on which there is ever more room: for no page, for
one, ..., for all; and for no file, for one, ..., for all. Each refusal must be the one of a full
disk and leave the target, the chain and the directory as they were.
"""

import os
import subprocess
from collections import Counter

import pytest

from ckpt import fault
from ckpt.engine.dump import DumpOptions, dump
from ckpt.errors import HostFull
from ckpt.image.chain import Chain
from ckpt.image.squash import squash
from ckpt.image.verify import verify
from integration.errors.refusals import content
from integration.fault.stepping import compare_newest, n_keepers
from integration.harness import Restored, become_subreaper
from integration.procview import lasting_differences, view_at_rest
from integration.trackers.truth import settle_on_one_cpu
from integration.workloads.driver import Program

become_subreaper()

EVERY = bool(os.environ.get("CKPT_KILLS"))
STEP = 1 if EVERY else 4
"""Pages: less than the records of the program take."""
PAGE = 4096
ENOUGH = 64 << 20
FULL = DumpOptions()
INCREMENTAL = DumpOptions(incremental=True)
COMPARED = DumpOptions(incremental=True, tracker="compare")


class Small:
    """A file system that has exactly as much room as a test wants."""

    def __init__(self, folder):
        self.folder = folder

    def leave_pages(self, n):
        status = os.statvfs(self.folder)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        # No size at all would be no limit.
        self._remount(f"size={max(used + n * PAGE, PAGE)}")

    def leave_files(self, n):
        status = os.statvfs(self.folder)
        self._remount(f"nr_inodes={status.f_files - status.f_ffree + n}")

    def leave_enough(self):
        self._remount(f"size={ENOUGH},nr_inodes=1000")

    def _remount(self, how):
        subprocess.run(["mount", "-o", f"remount,{how}", self.folder], check=True)


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    how = ["-t", "tmpfs", "-o", f"size={ENOUGH},nr_inodes=1000,mode=700", "tmpfs"]
    subprocess.run(["mount", *how, folder], check=True)
    yield Small(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


class Sweep:
    """Attempts at something, each with more room than the one before."""

    def __init__(self, small, notes, kept):
        self.small = small
        self.image = small.folder / "image"
        self._notes = notes
        self._kept = kept

    def until_done(self, attempt, leave, step=1):
        """Attempt it until there is room enough; return behind which points there was not."""
        ended = Counter()
        room = 0
        while (behind := self._try(attempt, leave, room)) is not None:
            self._kept.try_once()
            ended[behind] += 1
            room += step
        self.small.leave_enough()
        assert verify(Chain.open(self.image)) == []
        return ended

    def _try(self, attempt, leave, room):
        """Return the last point of an image that was reached; None: all was done."""
        leave(room)
        before = self._content()
        self._notes.write_text("start\n")
        fault.plan(f"any=note:{self._notes}")
        said = ""
        try:
            attempt()
        except HostFull as error:
            said = str(error)
        fault.forget()
        if not said:
            return None
        assert "No space left on device" in said
        assert self._content() == before, room
        reached = self._notes.read_text().split()
        return [point for point in reached if point in ("start", *fault.IMAGE)][-1]

    def _content(self):
        return content(self.image) if self.image.exists() else None


def test_a_disk_is_full_at_every_write_of_a_dump(small, tmp_path, promise):
    sweep = Sweep(
        small,
        tmp_path / "notes",
        promise("a dump whose disk has no page left leaves all as it was"),
    )
    image = sweep.image
    with Program("s_memory", cwd=tmp_path) as target:
        settle_on_one_cpu(target.pid)
        before = view_at_rest(target.pid)
        for options, step, n_writes in ((FULL, STEP, 100), (COMPARED, 1, 10)):
            assert target.ask("step write").startswith("stepped")
            ended = sweep.until_done(
                lambda: dump(target.pid, image, options),  # noqa: B023
                small.leave_pages,
                step,
            )
            # In the middle of pages, and behind all of them: in the manifest.
            assert ended["image-made"] >= n_writes // step
            assert ended["image-pages"] >= 1
            compare_newest(image, target.pid)
            assert target.ask("check") == "ok"
        kinds = [manifest.kind for manifest in map(Chain.open(image).manifest, (0, 1))]
        assert kinds == ["full", "delta"]
        assert lasting_differences(before, target.pid) == []
    with Restored(image) as back:
        assert back.ask("check") == "ok"


def test_a_disk_has_no_room_for_each_file_of_a_dump(small, tmp_path, promise):
    sweep = Sweep(
        small,
        tmp_path / "notes",
        promise("a dump whose disk has no file left leaves all as it was"),
    )
    image = sweep.image
    with Program("s_memory", cwd=tmp_path) as target:
        settle_on_one_cpu(target.pid)
        before = view_at_rest(target.pid)
        for options in (FULL, INCREMENTAL):
            assert target.ask("step write").startswith("stepped")
            ended = sweep.until_done(
                lambda: dump(target.pid, image, options),  # noqa: B023
                small.leave_files,
            )
            assert set(ended) == {"start", "image-made", "image-pages"}
            compare_newest(image, target.pid)
            assert n_keepers(target.pid) == 1
        # What the tracker had told the dumps that failed is lost: the next one is a delta again.
        assert dump(target.pid, image, INCREMENTAL).kind == "delta"
        assert lasting_differences(before, target.pid) == []
        assert target.ask("check") == "ok"


def test_a_disk_is_full_at_every_write_of_a_merge(small, tmp_path, promise):
    """The next delta goes on where the last one was, merged or not."""
    sweep = Sweep(
        small, tmp_path / "notes", promise("a merge whose disk is full leaves all as it was")
    )
    image = sweep.image
    with Program("s_memory", cwd=tmp_path) as target:
        settle_on_one_cpu(target.pid)
        for _ in range(3):
            assert target.ask("step write").startswith("stepped")
            dump(target.pid, image, INCREMENTAL)
        n_pages = sweep.until_done(
            lambda: squash(Chain.open(image), 1), small.leave_pages, STEP
        ).total()
        n_files = sweep.until_done(lambda: squash(Chain.open(image), 2), small.leave_files).total()
        assert n_pages >= 100 // STEP
        assert n_files >= 3
        assert dump(target.pid, image, INCREMENTAL).kind == "delta"
        compare_newest(image, target.pid)
    with Restored(image) as back:
        assert back.ask("check") == "ok"
