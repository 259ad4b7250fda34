"""`ckpt migrate --with-file`: files that the destination lacks travel with the tree."""

import os
import sys

import pytest

from integration.migrate.hosts import two_hosts
from integration.migrate.moving import Receiving, live

PROGRAM = """
import os, select, sys
kept = open("kept")
counts = os.open("counts", os.O_RDWR)
n = 0
print("ready", flush=True)
while True:
    # Hundreds of times a second, so that none of the two rounds finds it as the last one did.
    n += 1
    os.pwrite(counts, b"%20d" % n, 5)
    if select.select([sys.stdin], [], [], 0.002)[0]:
        if not sys.stdin.readline():
            break
        same = os.pread(counts, 20, 5) == b"%20d" % n == open("counts", "rb").read()[5:25]
        kept.seek(0)
        print("ok" if same and kept.read() == "kept here" else "wrong", flush=True)
"""


@pytest.fixture
def place(tmp_path):
    """A directory that is another one at each host."""
    with two_hosts() as hosts:
        made = tmp_path / "place"
        made.mkdir()
        for host in (hosts.a, hosts.b):
            host.must(["mount", "-t", "tmpfs", "ckpt", made])
        setup = "echo -n 'kept here' >kept; echo -n 'some more than 20 bytes in it' >counts;"
        setup += " chown 7:8 kept; chmod 640 kept; touch -d '2001-02-03 04:05:06.789' kept; >empty"
        hosts.a.must(["sh", "-c", f"cd {made}; {setup}"])
        work = hosts.a.start(
            [sys.executable, "-u", "-c", f"import os; os.chdir('{made}')\n{PROGRAM}"]
        )
        assert work.line() == "ready"
        yield hosts, made, work
        work.close()


def files(*paths):
    return [word for path in paths for word in ("--with-file", str(path))]


def listed(host, place):
    """Return names, owners, modes, sizes and times of what is there."""
    words = ["find", place, "-mindepth", "1", "-printf", "%f %U:%G %m %s %t\n"]
    return sorted(host.must(words).splitlines())


def refused(hosts, work, folder, *options):
    """Try to move it; return what was said against it."""
    with Receiving(hosts.b, folder / "token") as there:
        words = ["migrate", "--pid", str(work.pid), "--to", there.listens, *options]
        words += ["--token-file", str(folder / "token"), "--max-downtime", "60000"]
        failed = hosts.a.ckpt(*words)
        assert failed.returncode != 0
        there.wait()
    assert work.ask("still here?") == "ok"
    return failed.stderr


def test_files_travel_with_their_attributes_and_what_was_written_meanwhile(place, tmp_path):
    hosts, made, work = place
    assert "No such file or directory" in refused(hosts, work, tmp_path)
    before = listed(hosts.a, made)
    moving = files(made / "kept", made / "counts", made / "empty")
    moved = live(hosts, tmp_path, *moving)(work)
    assert moved.ask("there?") == "ok"
    moved.close()
    after = listed(hosts.b, made)
    assert [line.split()[:4] for line in after] == [line.split()[:4] for line in before]
    assert [line for line in after if "counts" not in line] == [
        line for line in before if "counts" not in line
    ]


def test_another_file_is_not_overwritten_and_an_equal_one_is_taken(place, tmp_path):
    hosts, made, work = place
    moving = files(made / "counts", made / "kept")
    hosts.b.must(["sh", "-c", f"cd {made}; echo -n 'kept mine' >kept"])
    before = listed(hosts.b, made)
    said = refused(hosts, work, tmp_path, *moving)
    assert f"{made / 'kept'}: was sent by the source (--with-file), and another file" in said
    assert listed(hosts.b, made) == before
    hosts.b.must(["sh", "-c", f"cd {made}; echo -n 'kept here' >kept; chmod 604 kept"])
    equal = listed(hosts.b, made)
    moved = live(hosts, tmp_path, *moving)(work)
    assert moved.ask("there?") == "ok"
    assert equal[0] in listed(hosts.b, made)
    moved.close()


def test_what_came_is_removed_if_the_tree_stays(place, tmp_path):
    hosts, made, work = place
    moving = files(made / "counts", made / "kept")
    said = refused(hosts, work, tmp_path, *moving, "--on-departure", "exit 3")
    assert "exit status 3" in said
    assert listed(hosts.b, made) == []


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_only_files_that_are_there_can_travel(name, place):
    hosts, made, work = place
    hosts.a.must(["mkdir", made / "folder"])
    words = ["migrate", "--pid", str(work.pid), "--to", "10.77.0.2:1", "--token-file", os.devnull]
    failed = hosts.a.ckpt(*words, *files(made / name))
    assert failed.returncode == 2
    assert work.ask("still here?") == "ok"
