"""The destination has no room: the tree goes on at the source, and moves when there is room."""

import contextlib
import os
from pathlib import Path

import pytest

from ckpt.kernel.procfs.cgroups import Membership, directory_of, parse_hierarchies
from integration.harness import CKPT
from integration.migrate.cutting import EVERY, Gate, counted
from integration.migrate.hosts import HERE
from integration.migrate.moving import Receiving, live
from integration.workloads.build import build_file

MIB = 1 << 20
LIMITS = {"pids": ("pids.max", "pids.max"), "memory": ("memory.limit_in_bytes", "memory.max")}
"""The file of each controller in version 1 and in version 2."""
TAKE = """
exec 3<&0
echo $(($1 - 1)) >/proc/sys/kernel/ns_last_pid
sh -c 'echo $$; read end' <&3 &
wait
"""


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(lasting_hosts, tmp_path_factory):
    """One through all of it, of 48 MiB that cannot be compressed."""
    with counted(lasting_hosts, tmp_path_factory.mktemp("tree"), mib=48) as made:
        yield made


@contextlib.contextmanager
def limited(controller, value):
    """Make a control group with a limit; yield the words that run a command in it."""
    hierarchies = parse_hierarchies(Path("/proc/self/mountinfo").read_text(encoding="ascii"))
    of_one, of_two = LIMITS[controller]
    top = directory_of(Membership(controller, "/", deleted=False), hierarchies)
    name = of_one
    if top is None:
        top, name = directory_of(Membership("", "/", deleted=False), hierarchies), of_two
        (Path(top) / "cgroup.subtree_control").write_text(f"+{controller}")
    group = Path(top) / f"ckpt-shortage-{os.getpid()}"
    group.mkdir()
    try:
        (group / name).write_text(str(value))
        yield "sh", "-c", f'echo 0 >{group}/cgroup.procs; exec "$@"', "sh"
    finally:
        group.rmdir()


def stays(tree, ended):
    assert tree.hosts_so_far() == "a", ended
    tree.verify()


@pytest.mark.parametrize(
    ("n_pids", "said", "code"),
    [
        (1, "it ended the connection in the TLS handshake", 50),
        (2, "refuses: this host is full (Resource temporarily unavailable)", 55),
        (3, "refuses: no process or thread can be made", 55),
        (4, "(Resource temporarily unavailable); everything it made was removed", 55),
    ],
)
def test_no_process_can_be_made(n_pids, said, code, tree):
    """The listener is one, the heir another, the worker a third."""
    with limited("pids", n_pids) as before:
        ended = tree.migrate(before=before, ends_alone=code != 50)
    stays(tree, ended)
    assert (ended.migrate, said in ended.said) == (code, True), ended
    assert "Traceback" not in ended.heard, ended


def test_no_memory_is_left(tree):
    """Less than the tree has: the kernel kills whoever asks for more."""
    with limited("memory", 60 * MIB) as before:
        ended = tree.migrate(before=before)
    stays(tree, ended)
    assert ended.migrate in (54, 55), ended


@pytest.mark.parametrize("point", ["received:Pages#3", "built"] if EVERY else ["built"])
def test_python_has_no_memory_left(point, tree):
    ended = tree.migrate(destination=f"{point}=starve")
    stays(tree, ended)
    assert (ended.migrate, ended.receive) == (55, 13), ended
    assert "no memory is left" in ended.said


@pytest.mark.parametrize("point", ["sent:Prepared", "received:Go"] if EVERY else ["received:Go"])
def test_there_is_no_room_when_it_was_prepared(point, tree):
    """Too late for a refusal: whether the tree runs there is found out."""
    ended = tree.migrate(destination=f"{point}=starve")
    stays(tree, ended)
    assert (ended.migrate, ended.receive) == (56, 70), ended


@pytest.mark.parametrize("kibibytes", [16, 40_960] if EVERY else [40_960])
def test_the_image_directory_is_full(kibibytes, tree, tmp_path):
    there = tree.hosts.b
    there.must(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "small", tmp_path])
    try:
        ended = tree.migrate(more=("--image-dir", str(tmp_path / "image")))
    finally:
        there.must(["umount", tmp_path])
    stays(tree, ended)
    assert (ended.migrate, ended.receive) == (55, 13), ended
    assert "No space left on device" in ended.said


def test_it_runs_there_before_there_is_no_room(tree):
    """And after all that has failed."""
    ended = tree.migrate(destination="let-go=starve")
    assert ended.migrate == 0, ended
    assert tree.hosts_so_far() == "ab", ended
    tree.verify()


def test_a_pid_is_taken_in_between(hosts, tmp_path):
    """A child is born after the destination has checked itself, and has the number of another."""
    gate = Gate(tmp_path / "gate")
    work = hosts.a.start([build_file(HERE / "brood.c"), "1", "100"])
    assert work.line() == "ready"
    there = Receiving(hosts.b, tmp_path / "token")
    words = ["migrate", "--pid", str(work.pid), "--to", there.listens]
    words += ["--token-file", tmp_path / "token", "--max-downtime", "60000"]
    complaints = tmp_path / "complaints"
    with complaints.open("w") as stderr:
        fault = os.environ | {"CKPT_FAULT": f"received:Ready=wait:{gate.path}"}
        moving = hosts.a.start([*CKPT, *words], env=fault, stderr=stderr)
    gate.wait()
    before = work.ask("pids").split()
    assert work.ask("step replace") == "stepped"
    (born,) = set(work.ask("pids").split()) - set(before)
    taken = hosts.b.start(["sh", "-c", TAKE, "sh", born])
    assert taken.line() == born
    gate.open()
    assert moving.wait() == 55
    said = complaints.read_text()
    assert f"pid {born} is taken by sh" in said, said
    moving.close()
    there.wait()
    there.close()
    assert work.ask("check") == "ok"
    taken.tell("end")
    taken.close()
    work = live(hosts, tmp_path)(work)
    assert work.ask("check") == "ok"
    work.close()
