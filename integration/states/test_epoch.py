"""The generation that a delta stands on must be the very one that the tracker was armed against."""

import json
import shutil

from ckpt.tracker.epoch import STATE_DIR
from integration.harness import Restored, become_subreaper, ckpt, dump
from integration.workloads.driver import Program

become_subreaper()


def test_a_generation_replaced_by_hand_is_not_built_on(tmp_path):
    image = tmp_path / "image"
    with Program("tracker_cases", "t_write", cwd=tmp_path) as first:
        dump(first.pid, image)
        dump(first.pid, image)
        shutil.rmtree(image / "gen-000001")
        # Else its number would not be given again.
        (image / "newest").unlink()
        with Program("tracker_cases", "t_write", cwd=tmp_path) as other:
            assert dump(other.pid, image)["generation"] == 1
        result = dump(first.pid, image)
        assert result["kind"] == "full"
        assert "generation 1 was replaced" in result["reason"]


def test_a_restored_process_goes_on_with_deltas_on_what_it_came_from(tmp_path):
    image = tmp_path / "image"
    with Program("tracker_cases", "t_write", cwd=tmp_path) as work:
        for _ in range(3):
            dump(work.pid, image)
            assert work.ask("step one").startswith("stepped")
    with Restored(image, "--at", "1") as work:
        result = dump(work.pid, image)
        assert (result["generation"], result["kind"]) == (3, "delta")
    with Restored(image, "--at", "3") as work:
        assert work.ask("check") == "ok"


def test_kill_ends_the_target_after_the_commit(tmp_path):
    image = tmp_path / "image"
    with Program("tracker_cases", "t_write", cwd=tmp_path) as work:
        result = dump(work.pid, image, "--kill")
        assert result["freeze_ms"] > 0
        assert work.process.wait(10) == -9
    with Restored(image) as work:
        assert work.ask("check") == "ok"


def test_what_ended_processes_left_goes_with_the_next_dump(tmp_path):
    with Program("tracker_cases", "t_write", cwd=tmp_path) as ended:
        dump(ended.pid, tmp_path / "ended")
        left = STATE_DIR / f"{ended.pid}.epoch"
        assert left.exists()
    with Program("tracker_cases", "t_write", cwd=tmp_path) as work:
        dump(work.pid, tmp_path / "image")
        assert not left.exists()
        assert (STATE_DIR / f"{work.pid}.epoch").exists()
        assert dump(work.pid, tmp_path / "image")["kind"] == "delta"


def test_show_tells_why_a_delta_became_full(tmp_path):
    image = tmp_path / "image"
    with Program("tracker_cases", "t_write", cwd=tmp_path) as work:
        dump(work.pid, image, incremental=False)
        dump(work.pid, tmp_path / "other", incremental=False)
        reason = dump(work.pid, image)["reason"]
        assert "another image directory" in reason
    assert f"\ngeneration 1 is full: {reason}\n" in ckpt("show", image).stdout
    shown = json.loads(ckpt("show", "--json", image).stdout)["generations"]
    assert [one["reason"] for one in shown] == ["", reason]
