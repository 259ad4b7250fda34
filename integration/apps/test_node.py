"""node: an HTTP server with timers, a pool and a worker thread, and a client that stays connected.

The server judges itself; the client judges its answers: before, between and after checkpoints, one
that it asked for while nobody was there, and one that a timer held back in the middle.
"""

import hashlib
import http.client
import json
import os
from contextlib import closing

import pytest

from integration.apps.app import PROGRAMS, App, Costs, kind_of_further_dumps, offered_trackers
from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import ANSWER_S

SENT = os.urandom(200_000)
NAP_MS = 700
become_subreaper()


class Node(App):
    """A node that listens, and its port."""

    def __init__(self, cwd):
        super().__init__(["node", PROGRAMS / "serving.js"], cwd)
        said = self.line().split()
        assert said[0] == "ready"
        self.port = int(said[1])


def connect(port):
    return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S))


def read(connection):
    answer = connection.getresponse()
    assert answer.status == 200
    return json.loads(answer.read())


def get(connection, path):
    connection.request("GET", path)
    return read(connection)


def check_all_go_on(connection, before):
    """Check until everything has been done more often than in `before`; return how often."""
    while True:
        now = get(connection, "/check")
        assert now.pop("wrong") == []
        assert all(before[name] <= now[name] for name in now)
        if all(before[name] < now[name] for name in now):
            return now


def check_client(connection, nth):
    """Talk for a while; the connection has been asked for its count `nth - 1` times before."""
    assert get(connection, "/count")["connection"] == nth
    connection.request("POST", "/echo", SENT)
    assert read(connection)["sha256"] == hashlib.sha256(SENT).hexdigest()
    assert get(connection, "/sleep/10")["ms"] >= 9


@pytest.mark.parametrize("tracker", offered_trackers())
def test_a_server_and_its_client_go_on(tracker, tmp_path, record_property):
    image = tmp_path / "image"
    costs = Costs(record_property, f"node, {tracker}")
    further = kind_of_further_dumps(tracker)
    with Node(tmp_path) as node, connect(node.port) as kept, connect(node.port) as waiting:
        done = [get(kept, "/check")]
        for nth in range(3):
            done.append(check_all_go_on(kept, done[-1]))
            check_client(kept, nth + 1)
            dumped = dump(node.pid, image, "--tracker", tracker)
            assert dumped["kind"] == (further if nth else "full"), dumped["reason"]
            costs.note(dumped)
        done.append(check_all_go_on(kept, done[-1]))
        waiting.request("GET", f"/sleep/{NAP_MS}")
        ours = kept.sock, waiting.sock
        dump(node.pid, image, "--tracker", tracker, "--kill")
        node.process.wait(ANSWER_S)
        # Asked while nobody is there to answer.
        kept.request("GET", "/count")
        with Restored(image) as back:
            costs.note_restore(back.said)
            assert read(kept)["connection"] == 4
            assert read(waiting)["ms"] >= NAP_MS - 1
            check_all_go_on(kept, done[-1])
            check_client(kept, 5)
            dumped = dump(back.pid, image, "--tracker", tracker)
            assert dumped["kind"] == further, dumped["reason"]
            check_all_go_on(kept, done[-1])
            assert (kept.sock, waiting.sock) == ours
            with connect(node.port) as new:
                check_client(new, 1)
    with Restored(image, "--tcp-close", "--at", "1") as back:
        with connect(node.port) as new:
            check_all_go_on(new, done[1])
            check_client(new, 1)
            assert get(new, "/end") == {}
        assert back.process.wait(ANSWER_S) == 0
