"""A process that can be dumped, and images of processes that are gone."""

import shutil

import pytest

from integration.harness import become_subreaper, dump
from integration.workloads.driver import Program


@pytest.fixture(scope="package", autouse=True)
def _orphans_are_ours():
    become_subreaper()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A process in the best of health; after each test it is asked whether it still is."""
    with Program("s_registers", cwd=tmp_path_factory.mktemp("work")) as program:
        yield program
        assert program.ask("check") == "ok"


@pytest.fixture(scope="module")
def image_of_the_dead(tmp_path_factory):
    """A chain of a full generation and a delta; nobody has the pid any more."""
    image = tmp_path_factory.mktemp("images") / "image"
    with Program("s_registers", cwd=image.parent) as program:
        dump(program.pid, image)
        assert program.ask("step") == "stepped"
        made = dump(program.pid, image)
        assert made["kind"] == "delta", made["reason"]
        pid = program.pid
    return image, pid


@pytest.fixture
def dead(image_of_the_dead, tmp_path):
    """A copy of that chain, to be spoiled, and the pid of its process."""
    image, pid = image_of_the_dead
    copy = tmp_path / "image"
    shutil.copytree(image, copy, symlinks=True)
    return copy, pid
