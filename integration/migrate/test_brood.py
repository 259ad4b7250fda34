"""Trees of several processes with memory of their own move while they run, and change."""

import pytest

from integration.harness import CKPT
from integration.migrate.hosts import HERE, last_json, leave_address, take_address
from integration.migrate.moving import Receiving, live
from integration.workloads.build import build_file

MIB = 1 << 20
SIZE = 32


def brood(hosts, rate):
    work = hosts.a.start([build_file(HERE / "brood.c"), str(SIZE), str(rate)])
    assert work.line() == "ready"
    return work


def say_how(said):
    print({key: said[key] for key in ("downtime_ms", "ahead_bytes", "late_bytes")})


@pytest.mark.slow
def test_children_that_write_all_the_time_move_there_and_back(hosts, tmp_path):
    work = brood(hosts, 10_000)
    for _ in range(2):
        pids = work.ask("pids")
        work = live(hosts, tmp_path)(work)
        assert work.ask("pids") == pids
        assert work.ask("check") == "ok"
        say_how(work.said)
        # What comes from files, and what is written while the last pages are sent.
        assert work.said["ahead_bytes"] > 3 * SIZE * MIB > 4 * work.said["late_bytes"]
    work.tell("quit")
    assert work.wait() == 0
    work.close()


CHANGES = ["replace", "orphan", "leave"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [*([one] for one in CHANGES), CHANGES], ids="-".join)
def test_a_tree_that_changes_while_it_moves(changes, hosts, tmp_path):
    work = brood(hosts, 1000)
    child = int(work.ask("pids").split()[0])
    there = Receiving(hosts.b, tmp_path / "token", "--on-arrival", " ".join(take_address()))
    words = ["migrate", "--pid", str(work.pid), "--to", there.listens, "--json"]
    words += ["--token-file", tmp_path / "token", "--max-downtime", "60000"]
    # So slow that all below happens while the first pages are sent.
    words += ["--bandwidth", "200M", "--on-departure", " ".join(leave_address())]
    complaints = tmp_path / "complaints"
    with complaints.open("w") as stderr:
        moving = hosts.a.start([*CKPT, *words], stderr=stderr)
    while child not in hosts.b.pids():
        assert moving.process.poll() is None
    for change in changes:
        assert work.ask(f"step {change}") == "stepped"
    pids = work.ask("pids")
    assert moving.wait() == 0, complaints.read_text()
    while '"warnings"' not in (line := moving.line()):
        pass
    moving.close()
    there.arrive(work.pid)
    say_how(last_json(line))
    work.wait()
    work.close()
    assert there.ask("pids") == pids
    assert there.ask("check") == "ok"
    back = live(hosts, tmp_path)(there)
    assert back.ask("check") == "ok"
    say_how(back.said)
    assert back.said["ahead_bytes"] > 3 * SIZE * MIB > 4 * back.said["late_bytes"]
    back.tell("quit")
    assert back.wait() == 0
    back.close()
