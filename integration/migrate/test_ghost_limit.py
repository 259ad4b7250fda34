"""`ckpt migrate --ghost-limit`: how much of a deleted file moves along is the user's to say."""

import sys

from integration.migrate.hosts import two_hosts
from integration.migrate.moving import Receiving, live

SIZE_BYTES = 3 << 20
PROGRAM = f"""
import os, tempfile
kept = tempfile.TemporaryFile(dir="/tmp")
content = os.urandom({SIZE_BYTES})
kept.write(content); kept.flush()
print("ready", flush=True)
while input():
    kept.seek(0)
    print("ok" if kept.read() == content else "wrong", flush=True)
"""


def test_a_deleted_file_over_the_limit_moves_when_it_is_raised(tmp_path):
    token = tmp_path / "token"
    with two_hosts() as hosts:
        work = hosts.a.start([sys.executable, "-u", "-c", PROGRAM])
        assert work.line() == "ready"
        with Receiving(hosts.b, token) as there:
            to = ["--to", there.listens, "--token-file", token]
            refused = hosts.a.ckpt("migrate", "--pid", str(work.pid), *to)
            there.wait()
        assert refused.returncode == 21
        assert f"--ghost-limit {SIZE_BYTES}" in refused.stderr
        assert work.ask("still here?") == "ok"
        moved = live(hosts, tmp_path, "--ghost-limit", str(SIZE_BYTES))(work)
        assert moved.ask("there?") == "ok"
        moved.close()
