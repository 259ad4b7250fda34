"""redis answers before its keys are there, forks to save them, and has every one of them."""

import shutil

import pytest

from integration.apps.resp import Redis
from integration.apps.test_redis import Server, change, digest
from integration.harness import Restored, become_subreaper, dump
from integration.lazy.behind import wait_until_filled

N_KEYS = 300_000
become_subreaper()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")
def test_redis_answers_and_saves_before_its_memory_is_there(tmp_path):
    image = tmp_path / "image"
    with Server(tmp_path, N_KEYS) as server:
        port = server.port
        dump(server.pid, image)
        change(port, 1, N_KEYS)
        expected = digest(port)
        dump(server.pid, image)
    with Restored(image, "--lazy") as back:
        with Redis(port) as client:
            # A child of redis writes all keys to a file, from the memory that it was forked with.
            assert client.ask("BGSAVE") == "Background saving started"
        change(port, 2, N_KEYS)
        changed = digest(port)
        wait_until_filled(back.process.pid)
        assert digest(port) == changed
        with Redis(port) as client:
            while "rdb_bgsave_in_progress:1" in client.ask("INFO", "persistence"):
                pass
            assert "rdb_last_bgsave_status:ok" in client.ask("INFO", "persistence")
            assert client.ask("DEBUG", "RELOAD", "NOSAVE") == "OK"
        assert digest(port) == expected
