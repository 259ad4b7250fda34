"""The promise: a process comes back from object storage, checked, or is refused.

The store is an S3 server of ours (moto's), to which real requests go.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from ckpt.image.keys import PrivateKey, write_private_key
from integration.errors.refusals import children, nobody_left, refused
from integration.harness import CKPT, Restored, become_subreaper, ckpt, dump
from integration.stores.names import BUCKET, KEYS
from integration.workloads.driver import Program

URL = f"s3://{BUCKET}/job"
become_subreaper()


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """Begin the server; every ckpt of this module asks it, with these keys."""
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, **KEYS}
    top = Path(__file__).parents[2]
    command = [sys.executable, "-m", "integration.stores.server"]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command,
            cwd=top,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
        pytest.MonkeyPatch.context() as patched,
    ):
        where = process.stdout.readline().strip()
        assert where, log.read_text()
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": where}.items():
            patched.setenv(name, value)
        yield where
        process.stdin.close()
        process.wait(30)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Return where a restore from a URL puts what it fetches."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def copy(*args):
    done = ckpt("copy", "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ask(where, key, content=None):
    """Get an object, or put another in its place, behind the back of ckpt."""
    method = "GET" if content is None else "PUT"
    # Not signed, which this server does not mind.
    name = f"{KEYS['AWS_ACCESS_KEY_ID']}/20260101/us-east-1/s3/aws4_request"
    signed = {"Authorization": f"AWS4-HMAC-SHA256 Credential={name}, Signature=0"}
    request = urllib.request.Request(f"{where}/{BUCKET}/{key}", content, signed, method=method)
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def test_there_and_back(server, tmp_path, scratch):
    image = tmp_path / "image"
    with Program("writer", "--mib", "4", "--threads", "1", "--rate", "1000", cwd=tmp_path) as work:
        for _ in range(3):
            dump(work.pid, image)
        assert copy(image, URL)["copied"] == [0, 1, 2]
        assert work.ask("check") == "ok"
        dump(work.pid, image, "--kill")
    sent = copy(image, URL)
    assert (sent["copied"], sent["present"]) == ([3], [0, 1, 2])
    sent_files = [image / "newest", *(image / "gen-000003").iterdir()]
    assert sent["bytes_copied"] == sum(file.stat().st_size for file in sent_files)
    with Restored(URL, "--trust-image") as work:
        assert work.said["generation"] == 3
        assert work.ask("check") == "ok"
    assert list(scratch.iterdir()) == [], "what was fetched is gone"

    damaged = "job/gen-000003/pages-0"
    good = ask(server, damaged)
    ask(server, damaged, good[:99] + bytes([good[99] ^ 1]) + good[100:])
    with nobody_left():
        assert f"{URL}/gen-000003/pages-0 is damaged" in refused(
            31, "restore", "--trust-image", URL
        )
    assert list(scratch.iterdir()) == []
    found = ckpt("verify", URL)
    assert (found.returncode, found.stdout.count("wrong: generation 3")) == (31, 1)
    ask(server, damaged, good)

    again = tmp_path / "again"
    with Restored(URL, "--trust-image", "--at", "1", "--image-dir", again) as work:
        assert work.said["generation"] == 1
        assert work.ask("check") == "ok"
        assert dump(work.pid, again)["kind"] == "delta", "the chain goes on where it was kept"
        assert work.ask("check") == "ok"


def test_encrypted(tmp_path, scratch):
    image, key, url = tmp_path / "image", PrivateKey.generate(), f"{URL}-sealed"
    write_private_key(tmp_path / "key", key)
    with Program("s_registers", cwd=tmp_path) as work:
        dump(work.pid, image, "--encrypt-to", str(key.recipient))
        dump(work.pid, image, "--kill")
    assert copy(image, url)["copied"] == [0, 1]
    shutil.rmtree(image)
    with nobody_left():
        assert "give --identity" in refused(37, "restore", "--trust-image", url)
    with Restored(url, "--trust-image", "--identity", str(tmp_path / "key")) as work:
        assert work.ask("check") == "ok"
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("command", [("restore", "--trust-image", URL), ("copy", URL, "back")])
def test_interrupted_while_the_store_is_silent(tmp_path, scratch, monkeypatch, command):
    with socket.create_server(("127.0.0.1", 0)) as silent, nobody_left():
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with subprocess.Popen(
            [*CKPT, *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        ) as process:
            with silent.accept()[0]:
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 130
            assert process.stderr.read() == "ckpt: interrupted\n"
    assert list(scratch.iterdir()) == []
    assert list(tmp_path.iterdir()) == [scratch]


def test_what_a_killed_restore_left_goes_with_the_next(scratch):
    """One that still fetches keeps its own; so does another user."""
    other = scratch / "ckpt-restore-of-another"
    other.mkdir(0o700)
    os.chown(other, 65534, 65534)
    command = [*CKPT, "restore", "--trust-image", URL]
    with socket.create_server(("127.0.0.1", 0)) as silent, nobody_left():
        waits = {
            **os.environ,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        with (
            subprocess.Popen(command, env=waits, stderr=subprocess.PIPE, text=True) as killed,
            silent.accept()[0],
        ):
            (left,) = set(scratch.iterdir()) - {other}
            with (
                subprocess.Popen(command, env=waits, stderr=subprocess.PIPE, text=True) as fetches,
                silent.accept()[0],
            ):
                (used,) = set(scratch.iterdir()) - {other, left}
                (fetcher,) = children(killed.pid)
                killed.kill()
                assert killed.wait(60) == -signal.SIGKILL
                assert os.waitpid(fetcher, 0)[1] == signal.SIGKILL, "it goes with it"
                refused(34, "restore", "--trust-image", "--at", "9", URL)
                assert set(scratch.iterdir()) == {other, used}
                fetches.send_signal(signal.SIGINT)
                assert fetches.wait(60) == 130
                assert fetches.stderr.read() == "ckpt: interrupted\n"
    assert list(scratch.iterdir()) == [other]


def test_troubles_have_their_codes(tmp_path, monkeypatch):
    with nobody_left():
        assert "no generation 9; it has 0 to 3" in refused(
            34, "restore", "--trust-image", "--at", "9", URL
        )
        assert "there is no such bucket" in refused(
            30, "copy", "s3://elsewhere/job", tmp_path / "x"
        )
        for name in KEYS:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert "credentials" in refused(12, "copy", URL, tmp_path / "x")
    assert not (tmp_path / "x").exists()
