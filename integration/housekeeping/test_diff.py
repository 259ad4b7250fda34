"""The promise: `ckpt diff` names what a process did between two checkpoints, and nothing else."""

import json

import pytest

from integration.harness import dump
from integration.housekeeping.processes import told, two_threads


def diff(image, *generations):
    code, out, err = told("diff", "--json", image, *generations)
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Before (0), after the changes (1, a delta), the same in full (2), with a child (3)."""
    folder = tmp_path_factory.mktemp("changed")
    image = folder / "image"
    with two_threads(folder / "mapped") as (pid, dialogue):
        dump(pid, image)
        assert dialogue.ask("c") == "done"
        dump(pid, image)
        dump(pid, image, incremental=False)
        assert dialogue.ask("f") == "done"
        dump(pid, image)
    return image, pid


FILES = ("mapped", "memfd:kept (deleted)", "zero (deleted)")


def short(row):
    return row["name"].rpartition("/")[2], row["access"]


def changed_pages(process):
    """Pages of the files that the program maps that changed, by mapping."""
    return {
        short(row): (row["changed_pages"], row["common_pages"])
        for row in process["mappings"]["changed"]
        if row["changed_pages"] and short(row)[0] in FILES
    }


@pytest.mark.parametrize("after", [1, 2])
def test_pages_are_counted_by_mapping_in_a_delta_and_in_a_full_one(changed, after):
    image, _ = changed
    (process,) = diff(image, 0, after)["processes"]
    pages = changed_pages(process)
    assert pages["mapped", "rw-p"] == (1, 4)
    assert pages["memfd:kept (deleted)", "rw-s"] == (1, 8)
    assert pages["zero (deleted)", "rw-s"] == (1, 4)
    anonymous = [
        row for row in process["mappings"]["changed"] if row["common_pages"] in range(300, 2000)
    ]
    assert sum(row["changed_pages"] for row in anonymous) >= 2
    assert sum(row["changed_pages"] for row in anonymous) < 10


def test_mappings_threads_and_files_that_came_and_went(changed):
    image, pid = changed
    (process,) = diff(image, 0, 1)["processes"]
    assert process["pid"] == pid
    assert ("mapped", "rw-s") in map(short, process["mappings"]["made"])
    gone = [short(row) for row in process["mappings"]["gone"] if row["name"]]
    assert gone == [("mapped", "rw-p")]
    protected = [row for row in process["mappings"]["changed"] if short(row) == ("mapped", "r--s")]
    assert [short(row["before"]) for row in protected] == [("mapped", "rw-s")]
    assert len(process["threads"]["come"]) == 1
    assert process["threads"]["gone"] == []
    files = process["files"]
    opened = {row["fd"]: (row["name"], row["access"]) for row in files["opened"]}
    assert opened == {5: ("/dev/zero", "r")}
    assert files["closed"] == []
    others = {
        row["after"]["fd"]: (row["before"]["name"], row["after"]["name"])
        for row in files["changed"]
    }
    assert others == {4: ("/memfd:kept", "/dev/null"), 2: ("/dev/null", "/dev/zero")}


def test_what_came_has_gone_the_other_way_round(changed):
    image, _ = changed
    (forward,), (back,) = (diff(image, *pair)["processes"] for pair in ((0, 1), (1, 0)))
    assert forward["threads"]["come"] == back["threads"]["gone"]
    assert forward["mappings"]["made"] == back["mappings"]["gone"]
    assert forward["files"]["opened"] == back["files"]["closed"]
    assert forward["changed_pages"] == back["changed_pages"] > 0


def test_nothing_differs_from_itself_and_little_from_the_same_in_full(changed):
    image, _ = changed
    (process,) = diff(image, 1, 1)["processes"]
    assert process["changed_pages"] == 0
    assert process["mappings"] == {"made": [], "gone": [], "changed": []}
    (process,) = diff(image, 1, 2)["processes"]
    assert changed_pages(process) == {}
    # The kernel writes beside the stack of each thread on which processor it runs (rseq(2)).
    assert process["changed_pages"] < 10
    assert process["mappings"]["made"] == process["mappings"]["gone"] == []
    assert process["files"] == {"opened": [], "closed": [], "changed": []}


def test_processes_come_and_go(changed):
    image, pid = changed
    difference = diff(image, 2, 3)
    (child,) = difference["come"]
    assert (child["parent"], difference["gone"]) == (pid, [])
    (again,) = diff(image, 3, 2)["gone"]
    assert again == child
    _, text, _ = told("diff", image, 2, 3)
    assert f"+ process {child['pid']} " in text


def test_for_people(changed):
    image, pid = changed
    lines = told("diff", image, 0, 1)[1].splitlines()
    assert lines[0].startswith(f"~ process {pid} ")
    begun = {line.strip().partition(" 7")[0] for line in lines}
    assert "  + fd 5r chardev /dev/zero" in lines
    assert {"- mapping", "+ mapping", "~ mapping"} <= begun
    assert sum("1 of 8 pages" in line for line in lines) == 1
    _, same, _ = told("diff", image, 1, 1)
    assert same.startswith(f"= process {pid} ")
    assert same.count("\n") == 1


def test_a_generation_that_is_not_there(changed):
    image, _ = changed
    code, _, err = told("diff", image, 0, 9)
    assert (code, err.count("\n")) == (34, 1)
