"""After any single failure of a migration exactly one copy of the tree runs, and only ever one.

`make cuts` tries every point; otherwise it is those around the hand-over.
"""

import pytest

from integration.migrate.cutting import EVERY

KEPT, MOVED = "a", "ab"
KILLED = {137, -9}
LOST = {54}

CUTS_AT_SOURCE = {
    KEPT: (
        "send:Offer received:Accepted received:Ready sent:Pages send:RoundEnds#2 sent:RoundEnds#2"
        " send:Tree sent:Tree departing departed sent:Departed send:State sent:State"
    ),
    MOVED: "received:Prepared send:Go sent:Go received:Running send:Done",
}
CUTS_AT_DESTINATION = {
    KEPT: (
        "received:Offer send:Accepted sent:Accepted send:Ready received:Pages send:RoundEnds#2"
        " received:Tree received:Departed received:State send:Prepared"
    ),
    MOVED: "sent:Prepared received:Go send:Running sent:Running received:Done",
}
KILLS_OF_SOURCE = {
    KEPT: (
        "sent:Offer received:Ready sent:Pages#2 received:RoundEnds#2 sent:Tree departing departed"
        " sent:Departed sent:State received:Prepared"
    ),
    MOVED: "doomed send:Go sent:Go received:Running sent:Done",
}
KILLS_OF_WORKER = {
    KEPT: (
        "received:Offer sent:Ready received:Pages#2 received:Tree received:Departed received:State"
        " built sent:Prepared received:Go"
    ),
    MOVED: "let-go send:Running sent:Running received:Done",
}
AROUND_GO = {
    *("send:State", "received:Prepared", "doomed", "send:Go", "sent:Go", "received:Running"),
    *("built", "sent:Prepared", "received:Go", "let-go"),
}
NOT_OF_MESSAGES = ("departing", "departed", "built", "finished", "let-go", "doomed")


def cases(points):
    return [
        pytest.param(point, where, id=point)
        for where, several in points.items()
        for point in several.split()
        if EVERY or point in AROUND_GO
    ]


def of_messages(points):
    return {
        where: " ".join(one for one in several.split() if one not in NOT_OF_MESSAGES)
        for where, several in points.items()
    }


def and_again(tree):
    """A second migration succeeds."""
    there = tree.hosts.other(tree.at)
    ended = tree.migrate()
    assert (ended.migrate, ended.receive) == (0, 0), ended
    assert tree.at is there
    tree.verify()


def holds(tree, where, ended):
    """It has run where it should have, once, and can be moved."""
    assert tree.hosts_so_far() == where, ended
    tree.verify()
    assert tree.hosts_so_far() == where, ended
    and_again(tree)


def test_nothing_happens(tree):
    and_again(tree)
    and_again(tree)
    assert tree.hosts_so_far() == "aba"


@pytest.mark.slow
@pytest.mark.parametrize(("point", "where"), cases(of_messages(CUTS_AT_SOURCE)))
def test_the_source_loses_the_connection(point, where, tree):
    ended = tree.migrate(source=f"{point}=cut")
    holds(tree, where, ended)
    assert ended.migrate in (LOST if where is KEPT else {0}), ended
    assert ended.receive in (LOST | {0} if where is KEPT else {0}), ended


@pytest.mark.slow
@pytest.mark.parametrize(("point", "where"), cases(of_messages(CUTS_AT_DESTINATION)))
def test_the_destination_loses_the_connection(point, where, tree):
    ended = tree.migrate(destination=f"{point}=cut")
    holds(tree, where, ended)
    assert ended.migrate in (LOST if where is KEPT else {0}), ended


@pytest.mark.slow
@pytest.mark.parametrize(("point", "where"), cases(KILLS_OF_SOURCE))
def test_the_source_is_killed(point, where, tree):
    ended = tree.migrate(source=f"{point}=kill")
    holds(tree, where, ended)
    assert ended.migrate in KILLED, ended


@pytest.mark.slow
@pytest.mark.parametrize(("point", "where"), cases(KILLS_OF_WORKER))
def test_the_worker_of_the_destination_is_killed(point, where, tree):
    ended = tree.migrate(destination=f"{point}=kill")
    holds(tree, where, ended)
    assert ended.migrate in (LOST | {56} if where is KEPT else {0}), ended


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupt", "terminate"] if EVERY else ["interrupt"])
@pytest.mark.parametrize(("point", "where"), cases(KILLS_OF_SOURCE))
def test_the_user_stops_the_source(how, point, where, tree):
    ended = tree.migrate(source=f"{point}={how}")
    holds(tree, where, ended)
    wanted = {130} if how == "interrupt" else {143, -15}
    assert ended.migrate in (wanted if where is KEPT else wanted | {0}), ended
