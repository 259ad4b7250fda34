import os

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel.capabilities import CapSets, capability_names, capget
from ckpt.kernel.procfs.status import read_status
from tests.kernel.children import ended, running


def test_sets_are_those_of_status():
    with running("say('ready'); wait()") as child:
        child.heard()
        for pid in (os.getpid(), child.pid):
            status = read_status(pid)
            assert capget(pid) == CapSets(
                status.cap_effective, status.cap_permitted, status.cap_inheritable
            )
    assert capget(0) == capget(os.getpid())


def test_names():
    assert capability_names(0) == frozenset()
    assert capability_names(1 << 21 | 1 << 40 | 1) == {"chown", "sys_admin", "checkpoint_restore"}
    assert capability_names(1 << 63) == {"cap_63"}


def test_gone():
    with ended() as pid:
        pass
    with pytest.raises(TargetGone):
        capget(pid)
