"""redis-server with all its keys: full, three deltas, SIGKILL, back at the newest and at an older.

What must be equal is redis's own digest of all keys and values; and clients stay connected.
"""

import contextlib
import socket
import subprocess
from pathlib import Path

import pytest

from integration.apps.app import App, Costs, is_running, kind_of_further_dumps, offered_trackers
from integration.apps.resp import Redis
from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import ANSWER_S

MANY, FEWER = 1_000_000, 50_000
VALUE_BYTES = "64"
CHANGED = 2_000
N_BUSY, N_REQUESTS = 50, 300_000
become_subreaper()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Server(App):
    """A redis-server that listens and has its keys."""

    def __init__(self, cwd: Path, n_keys: int) -> None:
        self.port = free_port()
        options = f"--port {self.port} --daemonize no --bind 127.0.0.1"
        command = ["redis-server", *options.split(), "--enable-debug-command", "local"]
        super().__init__([*command, "--save", ""], cwd)
        while "Ready to accept connections" not in self.line():
            pass
        with Redis(self.port) as client:
            assert client.ask("DEBUG", "POPULATE", str(n_keys), "key", VALUE_BYTES) == "OK"
            assert client.ask("DBSIZE") == n_keys


def change(port: int, nth: int, n_keys: int) -> None:
    """Do some of everything to the data; each round differs."""
    step = n_keys // CHANGED
    keys = [f"key:{number * step + nth}" for number in range(CHANGED)]
    with Redis(port) as client:
        client.ask_all(["SET", key, f"{nth} {key}"] for key in keys[: CHANGED // 2])
        client.ask_all(["DEL", key] for key in keys[CHANGED // 2 :])
        client.ask_all(["RPUSH", "list", f"{nth}:{at}"] for at in range(CHANGED))
        client.ask_all(
            ["HSET", f"hash:{at % 7}", f"{nth}:{at}", key] for at, key in enumerate(keys)
        )
        client.ask_all(["ZADD", "sorted", str(at * nth), key] for at, key in enumerate(keys))
        client.ask("INCR", "rounds")


def digest(port: int) -> str:
    with Redis(port) as client:
        found = client.ask("DEBUG", "DIGEST")
    assert isinstance(found, str)
    assert set(found) != {"0"}, "redis holds nothing"
    return found


@pytest.mark.parametrize(
    ("tracker", "n_keys"),
    [(name, FEWER if nth else MANY) for nth, name in enumerate(offered_trackers())],
)
def test_redis_comes_back(tracker, n_keys, tmp_path, record_property):
    image = tmp_path / "image"
    further = kind_of_further_dumps(tracker)
    costs = Costs(record_property, f"redis, {n_keys} keys, {tracker}")
    with Server(tmp_path, n_keys) as server:
        port = server.port
        digests = [digest(port)]
        costs.note(dump(server.pid, image, "--tracker", tracker))
        for nth in range(1, 4):
            change(port, nth, n_keys)
            digests.append(digest(port))
            dumped = dump(server.pid, image, "--tracker", tracker)
            assert (dumped["generation"], dumped["kind"]) == (nth, further), dumped["reason"]
            costs.note(dumped)
        assert len(set(digests)) == 4, "some round has changed nothing"
        assert digest(port) == digests[3], "the dumps have changed the living"
    assert not is_running(server.pid)

    with Restored(image) as back:
        costs.note_restore(back.said)
        assert back.pid == server.pid
        assert digest(port) == digests[3]
        change(port, 4, n_keys)
        digests.append(digest(port))
        dumped = dump(back.pid, image, "--tracker", tracker)
        assert (dumped["generation"], dumped["kind"]) == (4, further), dumped["reason"]
        costs.note(dumped)
    for generation in (4, 1):
        with Restored(image, "--at", str(generation)) as back:
            costs.note_restore(back.said)
            assert digest(port) == digests[generation]
            with Redis(port) as client:
                assert client.ask("GET", "rounds") == str(generation)
                assert client.ask("PING") == "PONG"


def test_a_client_stays_connected(tmp_path):
    """It goes on where it was, in the middle of one connection, when the server is back."""
    image = tmp_path / "image"
    with Server(tmp_path, 10) as server:
        client = Redis(server.port)
        assert client.ask("SET", "a", "b") == "OK"
        dump(server.pid, image)
        assert client.ask("GET", "a") == "b"
        dump(server.pid, image, "--kill")
    with Restored(image), client:
        assert client.ask("GET", "a") == "b"
        assert client.ask("INCR", "n") == 1


@contextlib.contextmanager
def benchmark(port):
    """Run 50 connections that are never idle; yield when all are at work.

    It ends with an error as soon as one of them is reset or closed.
    """
    command = f"redis-benchmark -p {port} -c {N_BUSY} -n {N_REQUESTS} -t incr -q"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command.split(), **quiet) as running:
        try:
            with Redis(port) as client:
                while client.ask("GET", "counter:__rand_int__") is None:
                    assert running.poll() is None
                while "connected_clients:51" not in client.ask("INFO", "clients"):
                    assert running.poll() is None
            yield running
        finally:
            running.kill()


def counted(port):
    with Redis(port) as client:
        return int(client.ask("GET", "counter:__rand_int__"))


def test_fifty_busy_clients_notice_nothing(tmp_path):
    image = tmp_path / "image"
    with Server(tmp_path, 10) as server:
        dump(server.pid, image)
        with benchmark(server.port) as running:
            assert dump(server.pid, image, "--kill")["kind"] == "delta"
            assert running.poll() is None
            server.process.wait(ANSWER_S)
            with Restored(image) as back:
                assert running.wait(ANSWER_S) == 0
                # Not one request is lost or done twice.
                assert counted(server.port) == N_REQUESTS
                with benchmark(server.port) as again:
                    assert dump(back.pid, image)["kind"] == "delta"
                    assert again.poll() is None
                    assert again.wait(ANSWER_S) == 0
                assert counted(server.port) == 2 * N_REQUESTS
