"""Cut or killed over ssh, too, exactly one copy of the tree runs, and only ever one."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from integration.harness import CKPT
from integration.migrate.cutting import EVERY
from integration.migrate.hosts import leave_address, take_address

PORT = 2222
STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in_ssh.py"))]
KEPT, MOVED = "a", "ab"
CASES = {
    "source sent:Go=cut": (MOVED, {0}),
    "source sent:Go=kill": (MOVED, {137, -9}),
    "destination received:Go=kill": (KEPT, {54, 56}),
    "source sent:State=cut": (KEPT, {54}),
    "destination received:Tree=cut": (KEPT, {54}),
    "destination sent:Prepared=cut": (MOVED, {0}),
}


class Sshd:
    """What runs commands on host `b` for who asks over the wire."""

    def __init__(self, tree):
        self.tree = tree
        self.server = tree.hosts.b.start([*STAND_IN, f"serve:{PORT}", "-"])
        assert self.server.line() == "serves"

    def migrate(self, source="", destination=""):
        tree = self.tree
        over = shlex.join([*STAND_IN, f"over:{tree.hosts.b.address}:{PORT}"])
        receive = shlex.join(["env", f"CKPT_FAULT={destination}", *CKPT])
        hooks = ["--on-arrival", shlex.join(take_address())]
        hooks += ["--on-return", shlex.join(leave_address())]
        there = shlex.join(["sh", "-c", f'exec {receive} "$@" {shlex.join(hooks)}', "sh"])
        words = ["migrate", "--pid", str(tree.pid), "--to", "ssh://b", "--remote-ckpt", there]
        words += ["--json", "--max-downtime", "60000"]
        words += ["--on-departure", shlex.join(leave_address())]
        words += ["--on-return", shlex.join(take_address())]
        said = tree.folder / "said"
        with said.open("w") as errors:
            variables = os.environ | {"CKPT_FAULT": source, "CKPT_SSH": over}
            migrating = tree.at.start([*CKPT, *words], env=variables, stderr=errors)
        status = migrating.wait()
        migrating.close()
        tree.settle(self.server.pid)
        return status, said.read_text()


@pytest.fixture
def sshd(tree):
    made = Sshd(tree)
    yield made
    made.server.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES if EVERY else [*CASES][:3])
def test_one_copy_runs_whatever_is_cut(case, sshd):
    side, _, fault = case.partition(" ")
    where, statuses = CASES[case]
    status, said = sshd.migrate(**{side: fault})
    assert sshd.tree.hosts_so_far() == where, said
    sshd.tree.verify()
    assert status in statuses, said
    if where == KEPT:
        assert sshd.migrate()[0] == 0
        sshd.tree.verify()
