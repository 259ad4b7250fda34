"""A JVM whose threads compute and allocate without a pause, so that its collector always has work.

Checked by what it holds itself, and by a client whose connection is kept over everything. Each
collector keeps its heap in its own way: ZGC maps one memfd at three places.

A JVM notes how it does in /tmp/hsperfdata_USER/PID, and the next one that starts removes what is
there of those that have ended: without that file nobody can be restored who has mapped it.
"""

import socket

import pytest

from integration.apps.app import PROGRAMS, App, Costs, kind_of_further_dumps, offered_trackers
from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import ANSWER_S

OPTIONS = ["-Xmx48m", "-XX:+PerfDisableSharedMem"]
WAYS = [
    *[(tracker, "G1") for tracker in offered_trackers()],
    *[(offered_trackers()[0], collector) for collector in ("Serial", "Parallel", "Z")],
]
become_subreaper()


class Jvm(App):
    """A JVM whose threads are at work, and the port of its server."""

    def __init__(self, cwd, *options):
        super().__init__(["java", *options, PROGRAMS / "Working.java"], cwd)
        said = self.line().split()
        assert said[0] == "ready"
        self.port = int(said[1])


class Client:
    """Who asks the server by one connection, and compares."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), ANSWER_S)
        self.n_asked = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def ask(self):
        """Send bytes and return what must come for them."""
        self.n_asked += 1
        sent = f"question {self.n_asked}".encode()
        self.socket.sendall(sent)
        return bytes(byte + 1 for byte in sent)

    def hear(self, wanted):
        assert self.socket.recv(len(wanted), socket.MSG_WAITALL) == wanted

    def talk(self):
        self.hear(self.ask())


def counts(program):
    """Return how often each thread has done its step, after the number of collections."""
    verdict, *numbers = program.ask("check").split()
    assert verdict == "ok", numbers
    return [int(number) for number in numbers]


def check_all_go_on(program, before):
    """Check until everything, the collector too, is further than `before`; return how far."""
    while True:
        now = counts(program)
        assert all(left <= right for left, right in zip(before, now, strict=True))
        if all(left < right for left, right in zip(before, now, strict=True)):
            return now


@pytest.mark.parametrize(("tracker", "collector"), WAYS)
def test_all_threads_and_the_collector_go_on(tracker, collector, tmp_path, record_property):
    image = tmp_path / "image"
    costs = Costs(record_property, f"jvm, {collector}, {tracker}")
    further = kind_of_further_dumps(tracker)
    options = [*OPTIONS, f"-XX:+Use{collector}GC"]
    with Jvm(tmp_path, *options) as jvm, Client(jvm.port) as client:
        done = [check_all_go_on(jvm, counts(jvm))]
        for nth in range(3):
            client.talk()
            dumped = dump(jvm.pid, image, "--tracker", tracker)
            assert dumped["kind"] == (further if nth else "full"), dumped["reason"]
            costs.note(dumped)
            done.append(check_all_go_on(jvm, done[-1]))
        dump(jvm.pid, image, "--tracker", tracker, "--kill")
        jvm.process.wait(ANSWER_S)
        # Asked while nobody is there to answer.
        wanted = client.ask()
        with Restored(image) as back:
            costs.note_restore(back.said)
            client.hear(wanted)
            done.append(check_all_go_on(back, done[-1]))
            dumped = dump(back.pid, image, "--tracker", tracker)
            assert dumped["kind"] == further, dumped["reason"]
            client.talk()
            check_all_go_on(back, done[-1])
    with Restored(image, "--tcp-close", "--at", "1") as back:
        check_all_go_on(back, done[1])
        assert back.quit() == 0
