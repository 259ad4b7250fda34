"""nginx, a master and two workers, in the middle of a download that takes its time."""

import hashlib
import math
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

from integration.apps.nginx_config import nginx_config
from integration.migrate.hosts import SERVICE, Hosts
from integration.migrate.moving import Move
from integration.workloads.driver import ANSWER_S

PORT = 8080
_CHUNK = 1 << 16


class Download(threading.Thread):
    """Reads an answer as far as it may; knows how far it is, and how long it waited at most."""

    def __init__(self, hosts: Hosts) -> None:
        super().__init__()
        with hosts.client.network():
            self._sock = socket.create_connection((SERVICE, PORT), ANSWER_S)
        self._digest = hashlib.sha256()
        self._moved_on = threading.Condition()
        self.n_bytes = 0
        self._allowed = 0.0
        self.longest_gap_s = 0.0
        self.ended = ""

    def run(self) -> None:
        try:
            self._read()
            self.ended = "whole"
        except OSError as error:
            self.ended = f"{type(error).__name__}: {error}"
        finally:
            self._sock.close()
            with self._moved_on:
                self._moved_on.notify_all()

    def _read(self) -> None:
        self._sock.sendall(b"GET /file HTTP/1.1\r\nHost: a\r\n\r\n")
        held = b""
        while b"\r\n\r\n" not in held:
            held += self._sock.recv(_CHUNK)
        head, _, body = held.partition(b"\r\n\r\n")
        found = re.search(rb"Content-Length: (\d+)", head)
        assert found, head
        left, last_s = int(found[1]), time.monotonic()
        while body:
            left -= len(body)
            self._digest.update(body)
            with self._moved_on:
                self.n_bytes += len(body)
                self._moved_on.notify_all()
                if self.n_bytes >= self._allowed:
                    self._moved_on.wait_for(lambda: self.n_bytes < self._allowed)
                    last_s = time.monotonic()
            body = self._sock.recv(_CHUNK) if left else b""
            now_s = time.monotonic()
            self.longest_gap_s, last_s = max(self.longest_gap_s, now_s - last_s), now_s
        if left:
            raise EOFError("the end came too early")

    def allow(self, n_bytes: float) -> None:
        """Let it read that much, in all; the rest waits with the server."""
        with self._moved_on:
            self._allowed = n_bytes
            self._moved_on.notify_all()

    def wait_until(self, n_bytes: int) -> None:
        """Wait until that much has come, in all."""
        with self._moved_on:
            came = self._moved_on.wait_for(lambda: self.n_bytes >= n_bytes or self.ended, ANSWER_S)
        assert came, f"no more than {self.n_bytes} bytes came"
        assert self.ended in ("", "whole"), self.ended

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def check(
    hosts: Hosts, move: Move, directory: Path, *, mib: int = 24, moves: int = 2
) -> dict[str, Any]:
    """Move it while it sends: the file arrives whole, by the one connection."""
    content = os.urandom(mib << 20)
    (directory / "root").mkdir()
    (directory / "root" / "file").write_bytes(content)
    config = directory / "nginx.conf"
    config.write_text(nginx_config(directory, str(PORT), f"limit_rate {mib // 12}m;"))
    work = hosts.a.start(["nginx", "-e", directory / "error.log", "-c", config], cwd=directory)
    _wait_until_it_listens(hosts)
    download = Download(hosts)
    download.start()
    try:
        for nth in range(moves):
            # However long the move takes: the file does not end before the next.
            download.allow(len(content) * (nth + 2) / (moves + 2))
            download.wait_until(len(content) * (nth + 1) // (moves + 2))
            assert not download.ended, "it was over before the move"
            work = move(work)
    finally:
        download.allow(math.inf)
        download.join(ANSWER_S)
    assert download.ended == "whole"
    assert download.digest == hashlib.sha256(content).hexdigest()
    work.kill(3)  # SIGQUIT: it ends by itself
    assert work.wait() == 0
    work.close()
    return {"longest_gap_ms": round(download.longest_gap_s * 1000, 2)}


def _wait_until_it_listens(hosts: Hosts) -> None:
    give_up_s = time.monotonic() + ANSWER_S
    while True:
        with hosts.client.network(), socket.socket() as sock:
            if sock.connect_ex((SERVICE, PORT)) == 0:
                return
        assert time.monotonic() < give_up_s, "nginx does not listen"
