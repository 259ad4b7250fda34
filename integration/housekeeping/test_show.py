"""The promise: `ckpt show` tells of a process that is gone what /proc told while it ran."""

import json
import os
import re
from pathlib import Path

import pytest

from integration.harness import dump
from integration.housekeeping.processes import told, two_threads
from integration.workloads.driver import Program, descendants


def shown(image, *options):
    code, out, err = told("show", "--json", *options, image)
    assert (code, err) == (0, "")
    return json.loads(out)


def maps_of(pid):
    rows = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = re.findall(r"^(\w+)-(\w+) (\S+) (\w+) \S+ \d+ *(.*)$", "\n".join(rows), re.M)
    return [
        (int(start, 16), int(end, 16), access, int(offset, 16), name)
        for start, end, access, offset, name in found
        if name != "[vsyscall]"
    ]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """An image, and what /proc says of its process."""
    folder = tmp_path_factory.mktemp("shown")
    with two_threads(folder / "mapped") as (pid, _):
        seen = {
            "maps": maps_of(pid),
            "fds": {
                int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")
            },
            "threads": {
                int(task.name): (task / "comm").read_text().rstrip("\n")
                for task in Path(f"/proc/{pid}/task").iterdir()
            },
            "command": Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1],
            "cwd": os.readlink(f"/proc/{pid}/cwd"),
            "exe": os.readlink(f"/proc/{pid}/exe"),
        }
        dump(pid, folder / "image")
    return folder / "image", pid, seen


def test_a_process_as_proc_told_of_it(known):
    image, pid, seen = known
    (one,) = shown(image, "--at", "0")["processes"]
    assert (one["pid"], one["session"], one["group"]) == (pid, pid, pid)
    assert one["command"] == seen["command"]
    assert (one["directory"], one["executable"]) == (seen["cwd"], seen["exe"])
    assert {thread["tid"]: thread["name"] for thread in one["threads"]} == seen["threads"]
    assert one["virtual_bytes"] == sum(end - start for start, end, *_ in seen["maps"])


def test_mappings_as_in_proc(known):
    image, _, seen = known
    (one,) = shown(image, "--maps")["processes"]
    rows = [
        tuple(row[key] for key in ("start", "end", "access", "offset", "name"))
        for row in one["mappings"]
    ]
    assert rows == seen["maps"]


def test_pages_of_mappings_are_those_that_were_written(known):
    image, _, _ = known
    (one,) = shown(image, "--maps")["processes"]
    by_name = {}
    for row in one["mappings"]:
        pages = tuple(row[f"{what}_pages"] for what in ("stored", "zero", "file"))
        by_name.setdefault((row["name"].rpartition("/")[2], row["access"]), []).append(pages)
    assert sorted(by_name["mapped", "rw-p"]) == [(0, 0, 4), (1, 0, 3)]
    assert by_name["mapped", "rw-s"] == [(0, 0, 0)]
    assert by_name["memfd:kept (deleted)", "rw-s"] == [(1, 7, 0)]
    assert by_name["zero (deleted)", "rw-s"] == [(1, 3, 0)]
    assert any(stored >= 100 and zero >= 200 for stored, zero, _ in by_name["", "rw-p"])


def test_files_as_in_proc(known):
    image, _, seen = known
    (one,) = shown(image, "--files")["processes"]
    names = {row["fd"]: row["name"] for row in one["files"]}
    told_names = {fd: name.removesuffix(" (deleted)") for fd, name in seen["fds"].items()}
    assert names == told_names
    assert [row["access"] for row in one["files"]] == ["r", "w", "u", "u", "u"][: len(names)]


def test_for_people_the_tables_say_the_same(known):
    image, pid, seen = known
    code, out, _ = told("show", "--at", "0", "--maps", "--files", image)
    assert code == 0
    rows = out.splitlines()
    assert f"{seen['maps'][0][0]:x}-{seen['maps'][0][1]:x} r--p" in out
    assert any(re.match(rf" +{pid} +- +{pid} +{pid} +0 +R +2 ", row) for row in rows)
    assert any(re.match(r" +4u regular +0 +\d+  /memfd:kept$", row) for row in rows)
    assert sum(row.startswith(f"{pid} /") for row in rows) == 2


def test_a_tree_with_its_ended_ones_and_one_of_its_processes(tmp_path):
    image = tmp_path / "image"
    with Program("s_family", cwd=tmp_path) as work:
        pids = {work.pid} | descendants(work.pid)
        dump(work.pid, image)
    whole = shown(image, "--at", "0")
    shown_pids = {one["pid"] for one in (*whole["processes"], *whole["zombies"])}
    assert shown_pids == pids
    parents = {one["pid"]: one["parent"] for one in whole["processes"]}
    assert parents.pop(work.pid) == 0
    assert set(parents.values()) <= {one["pid"] for one in whole["processes"]}
    child = max(parents)
    (alone,) = shown(image, "--pid", str(child))["processes"]
    assert alone["pid"] == child
    _, text, _ = told("show", "--at", "0", image)
    assert text.count("<ended>") == len(whole["zombies"])


def test_what_is_not_there_is_refused(known):
    image, _, _ = known
    assert told("show", "--at", "9", image)[0] == 34
    code, _, err = told("show", "--pid", "1", image)
    assert (code, "has no process 1" in err) == (2, True)
