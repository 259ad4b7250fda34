"""nginx, a master and two workers, that serves a file: full, delta, killed, back.

Who asks is this test. Between two answers of one connection there is a checkpoint, a kill and a
restore, of which the asking side notices nothing.
"""

import http.client
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from integration.apps.app import App, reap_killed
from integration.apps.nginx_config import nginx_config
from integration.harness import Restored, become_subreaper, dump
from integration.workloads.driver import ANSWER_S, descendants

SERVED = os.urandom(300_000)
LARGE_BYTES = 64 << 20
STEADY_BYTES = 6 << 20
ASKED = "location = /worker { return 200 $pid; }"
become_subreaper()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Nginx(App):
    """An nginx that serves `SERVED`, with both of its workers there."""

    def __init__(self, cwd):
        self.port = free_port()
        (cwd / "root").mkdir()
        (cwd / "root" / "file").write_bytes(SERVED)
        (cwd / "root" / "steady").write_bytes(os.urandom(STEADY_BYTES))
        (cwd / "root" / "large").write_bytes(os.urandom(LARGE_BYTES))
        config = cwd / "nginx.conf"
        steady = f"location /steady/ {{ alias {cwd}/root/; limit_rate 2m; }}"
        config.write_text(nginx_config(cwd, f"127.0.0.1:{self.port}", ASKED, steady))
        super().__init__(["nginx", "-e", cwd / "error.log", "-c", config], cwd)
        give_up_s = time.monotonic() + ANSWER_S
        while len(descendants(self.pid)) < 2:
            assert time.monotonic() < give_up_s, (cwd / "error.log").read_text()
            assert self.process.poll() is None, (cwd / "error.log").read_text()


def connect(port):
    return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S))


def get(connection, path):
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 200
    return answer.read()


def check(port, workers):
    with connect(port) as connection:
        assert get(connection, "/file") == SERVED
        assert int(get(connection, "/worker")) in workers


def test_nginx_serves_again(tmp_path):
    image = tmp_path / "image"
    with Nginx(tmp_path) as nginx:
        workers = descendants(nginx.pid)
        check(nginx.port, workers)
        assert dump(nginx.pid, image)["kind"] == "full"
        check(nginx.port, workers)
        assert dump(nginx.pid, image, "--kill")["kind"] == "delta"
    reap_killed(workers)
    with Restored(image) as back:
        assert descendants(back.pid) == workers
        check(nginx.port, workers)
        # The master still minds its workers: new ones for a new configuration.
        os.kill(back.pid, signal.SIGHUP)
        give_up_s = time.monotonic() + ANSWER_S
        while len(now := descendants(back.pid)) != 2 or now & workers:
            assert time.monotonic() < give_up_s, (tmp_path / "error.log").read_text()
        check(nginx.port, now)
        os.kill(back.pid, signal.SIGQUIT)
        assert back.process.wait(ANSWER_S) == 0


def test_a_connection_that_is_kept_goes_on(tmp_path):
    image = tmp_path / "image"
    with Nginx(tmp_path) as nginx, connect(nginx.port) as kept:
        workers = descendants(nginx.pid)
        worker = get(kept, "/worker")
        ours = kept.sock
        dump(nginx.pid, image)
        assert get(kept, "/file") == SERVED
        dump(nginx.pid, image, "--kill")
        nginx.process.wait(ANSWER_S)
        reap_killed(workers)
        # Asked while nobody is there to answer.
        kept.request("GET", "/file")
        with Restored(image) as back:
            assert kept.getresponse().read() == SERVED
            assert get(kept, "/worker") == worker
            assert kept.sock is ours
            os.kill(back.pid, signal.SIGQUIT)
            assert back.process.wait(ANSWER_S) == 0


def begin(connection, path):
    """Ask for a file and return the answer, of which the head has come."""
    connection.request("GET", path)
    return connection.getresponse()


def test_downloads_in_progress_go_on(tmp_path):
    """One that is read little by little, and one that comes all the time, at a steady rate."""
    image = tmp_path / "image"
    large, steady = (tmp_path / "root" / name for name in ("large", "steady"))
    with (
        Nginx(tmp_path) as nginx,
        connect(nginx.port) as slow,
        connect(nginx.port) as busy,
        ThreadPoolExecutor() as pool,
    ):
        workers = descendants(nginx.pid)
        part = LARGE_BYTES // 4
        reading = begin(slow, "/large")
        got = reading.read(part)
        all_of_it = pool.submit(begin(busy, "/steady/steady").read)
        dump(nginx.pid, image)
        got += reading.read(part)
        assert dump(nginx.pid, image, "--kill")["kind"] == "delta"
        nginx.process.wait(ANSWER_S)
        reap_killed(workers)
        with Restored(image) as back:
            got += reading.read(part)
            assert dump(back.pid, image)["kind"] == "delta"
            got += reading.read()
            assert got == large.read_bytes()
            assert all_of_it.result(ANSWER_S) == steady.read_bytes()
            os.kill(back.pid, signal.SIGQUIT)
            assert back.process.wait(ANSWER_S) == 0
