"""Two processes that share files: what one does to them, the other sees."""

from pathlib import Path

import pytest

from integration.harness import ckpt
from integration.workloads.driver import Program

DAMAGES = ["offset", "flag", "pidfd", "ticks"]


def test_a_shared_file_of_a_process_is_named(tmp_path: Path) -> None:
    with Program("s_family", cwd=tmp_path) as work:
        done = ckpt("dump", "--pid", str(work.pid), tmp_path / "image")
        assert done.returncode == 21
        assert done.stderr.count("is shared with fd ") == 2
        assert work.ask("check") == "ok"


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_family_notices_each_damage(damage: str, tmp_path: Path) -> None:
    with Program("s_family", cwd=tmp_path) as work:
        assert work.ask("check") == "ok"
        assert work.ask(f"corrupt {damage}") == "corrupted"
        assert work.ask("check").startswith("FAIL ")
        assert work.quit() == 1
