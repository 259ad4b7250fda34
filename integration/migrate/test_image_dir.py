"""`ckpt receive --image-dir`: what arrives is kept as a chain, which goes on there."""

import json
import os

import pytest

from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.image.keys import PrivateKey, write_private_key
from ckpt.image.verify import verify
from integration.harness import CKPT
from integration.migrate.hosts import last_json
from integration.migrate.moving import Receiving, restore
from integration.workloads.build import build


def migrate(work, there, folder):
    words = ["migrate", "--pid", str(work.pid), "--to", there.listens, "--json"]
    return work.host.ckpt(*words, "--token-file", folder / "token", "--max-downtime", "60000")


def dump(host, pid, image, *options):
    words = ["dump", "--pid", str(pid), "--incremental", "--json", *options, image]
    return last_json(host.must([*CKPT, *words]))


@pytest.mark.parametrize("program", [["writer"], ["s_unix_tree"], ["s_shared_tree"]])
def test_what_has_arrived_is_a_chain_that_goes_on(program, hosts, tmp_path):
    image = tmp_path / "image"
    work = hosts.a.start([build(program[0]), *program[1:]], cwd=tmp_path)
    assert work.line() == "ready"
    with Receiving(hosts.b, tmp_path / "token", "--image-dir", str(image)) as there:
        moved = migrate(work, there, tmp_path)
        assert moved.returncode == 0, moved.stderr
        there.arrive(work.pid)
        assert not [said for said in there.said["warnings"] if "will be full" in said]
        shown = json.loads(hosts.b.must([*CKPT, "show", "--json", image]))
        assert [one["kind"] for one in shown["generations"]] == ["full"]
        assert there.ask("check").startswith("ok")
        delta = dump(hosts.b, work.pid, image, "--kill")
        assert (delta["generation"], delta["kind"]) == (1, "delta")
        assert there.wait() == 128 + 9
    work.wait()
    work.close()
    # As it arrived, and as it was then.
    for options in (["--at", "0"], []):
        back = restore(hosts.b, image, work.pid, *options)
        assert back.ask("check").startswith("ok")
        back.close()


def test_a_chain_that_is_there_is_not_overwritten(hosts, tmp_path):
    image = tmp_path / "image"
    work = hosts.a.start(["cat"])
    dump(hosts.a, work.pid, image)
    before = sorted(os.walk(image))
    with Receiving(hosts.b, tmp_path / "token", "--image-dir", str(image)) as there:
        refused = migrate(work, there, tmp_path)
        assert refused.returncode == 55
        assert "has generations already, and what arrives begins a chain" in refused.stderr
        assert there.wait() == 30
    assert sorted(os.walk(image)) == before
    assert work.ask("still here") == "still here"
    work.close()


def test_what_has_arrived_may_be_encrypted(hosts, tmp_path):
    image, key = tmp_path / "image", PrivateKey.generate()
    write_private_key(tmp_path / "key", key)
    how = ("--image-dir", str(image), "--encrypt-to", str(key.recipient))
    work = hosts.a.start([build("s_unix_tree")], cwd=tmp_path)
    assert work.line() == "ready"
    with Receiving(hosts.b, tmp_path / "token", *how) as there:
        moved = migrate(work, there, tmp_path)
        assert moved.returncode == 0, moved.stderr
        there.arrive(work.pid)
        assert there.ask("check").startswith("ok")
        delta = dump(hosts.b, work.pid, image, "--kill")
        assert (delta["generation"], delta["kind"]) == (1, "delta"), "it takes no key"
        assert there.wait() == 128 + 9
    work.wait()
    work.close()
    assert verify(Chain.open(image, Access(private=(key,)))) == []
    folder = str(tmp_path).encode()
    assert not [path for path in image.rglob("*") if path.is_file() and folder in path.read_bytes()]
    for options in (["--at", "0"], []):
        back = restore(hosts.b, image, work.pid, "--identity", tmp_path / "key", *options)
        assert back.ask("check").startswith("ok")
        back.close()
