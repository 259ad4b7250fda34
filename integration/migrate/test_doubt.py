"""What is left of a hand-over when more than one side is gone, and who may decide then."""

import signal

import pytest

from integration.migrate.cutting import Gate, children_of, kill, receivers, until
from integration.migrate.hosts import leave_address

POINTS = ("received:Pages", "received:Tree", "sent:Prepared", "received:Go", "finished", "let-go")


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1], ids=["listener", "heir"])
@pytest.mark.parametrize("point", POINTS)
def test_who_only_watches_is_killed(who, point, tree, tmp_path):
    gate = Gate(tmp_path / "gate")

    def meanwhile(_migrating, receiving):
        gate.wait()
        kill(tree.hosts.b, receivers(tree.hosts.b, receiving)[who])
        gate.open()

    ended = tree.migrate(destination=f"{point}=wait:{gate.path}", meanwhile=meanwhile)
    assert ended.migrate == 0, ended
    assert tree.hosts_so_far() == "ab"
    tree.verify()
    assert tree.migrate().migrate == 0
    tree.verify()


WITNESSED = ("departing", "received:Prepared", "doomed", "sent:Go", "received:Running")


@pytest.mark.slow
@pytest.mark.parametrize("point", WITNESSED)
def test_the_witness_is_killed(point, tree, tmp_path):
    gate = Gate(tmp_path / "gate")

    def meanwhile(migrating, _receiving):
        gate.wait()
        kill(tree.hosts.a, children_of(tree.hosts.a, migrating.pid)[-1])
        gate.open()

    ended = tree.migrate(source=f"{point}=wait:{gate.path}", meanwhile=meanwhile)
    assert ended.migrate == 0, ended
    assert tree.hosts_so_far() == "ab"
    tree.verify()


def test_the_user_ends_the_doubt(tree, tmp_path):
    """All of the receiver is gone when it was told Go: nobody says what became of the tree."""
    gate = Gate(tmp_path / "gate")
    said = tmp_path / "said"

    def meanwhile(migrating, receiving):
        gate.wait()
        # The listener first: it would say that there is no such session.
        for pid in receivers(tree.hosts.b, receiving):
            kill(tree.hosts.b, pid)
        tree.hosts.b.must(leave_address())
        until(lambda: "Ctrl-C" in said.read_text(), "it does not say what to do")
        n_steps = len(tree.log.read_text().splitlines())
        kill(tree.hosts.a, migrating.pid, signal.SIGINT)
        migrating.wait()
        until(lambda: len(tree.log.read_text().splitlines()) > n_steps, "it stands still")

    ended = tree.migrate(destination=f"received:Go=wait:{gate.path}", meanwhile=meanwhile)
    assert ended.migrate == 56
    assert "the tree goes on here: as you have decided" in ended.said
    assert tree.hosts_so_far() == "a"
    tree.hosts.b.must(["find", "/dev/shm", "-mindepth", "1", "-delete"])
    tree.verify()


def test_the_address_comes_back_when_an_arrival_fails(tree):
    """The command there takes the address before it fails."""
    tree.after_arrival = "; exit 3"
    ended = tree.migrate()
    assert ended.migrate == 55
    assert "--on-arrival failed: it ended with exit status 3; nothing was restored" in ended.said
    tree.after_arrival = ""
    assert tree.hosts_so_far() == "a"
    tree.verify()
    assert tree.migrate().migrate == 0
    tree.verify()
