"""What one process alone cannot be brought back with is named before it is touched."""

import ctypes

import attrs

from ckpt.resources.clocks import CLOCKS, ClocksRecord
from ckpt.resources.credentials import CREDENTIALS
from ckpt.resources.identity import IDENTITY
from ckpt.resources.limits import LIMITS, LimitRecord
from ckpt.resources.threads import THREAD
from integration.freezer.targets import child
from integration.resources.embryos import FEATURES, capture, look

_CLONE_FILES, _CLONE_NEWNS = 0x400, 0x20000
libc = ctypes.CDLL(None, use_errno=True)


def nothing():
    pass


def succeed(result):
    if result:
        raise OSError(ctypes.get_errno(), "the child could not prepare itself")


def test_an_ordinary_process_is_not_refused():
    with child(nothing) as pid:
        assert look(IDENTITY, pid) == []
        assert look(THREAD, pid) == []


def test_another_mount_namespace_is_named():
    with child(lambda: succeed(libc.unshare(_CLONE_NEWNS))) as pid:
        (finding,) = look(IDENTITY, pid)
        assert "another mount namespace" in finding


def test_a_hard_limit_that_cannot_be_raised_is_named():
    features = attrs.evolve(FEATURES, capabilities=FEATURES.capabilities - {"sys_resource"})
    with child(nothing) as pid:
        record = capture(LIMITS, pid)
    assert list(LIMITS.check_host(record, features)) == []
    files = next(limit for limit in record.limits if limit.resource == 7)
    higher = LimitRecord(7, files.soft, files.hard + 1)
    record = attrs.evolve(record, limits=(higher,))
    (finding,) = LIMITS.check_host(record, features)
    assert "RLIMIT_NOFILE" in str(finding)
    with_capability = attrs.evolve(FEATURES, capabilities=frozenset({"sys_resource"}))
    assert list(LIMITS.check_host(record, with_capability)) == []


def test_capabilities_that_we_lack_are_named():
    with child(nothing) as pid:
        record = capture(CREDENTIALS, pid)
    assert list(CREDENTIALS.check_host(record, FEATURES)) == []
    beyond = attrs.evolve(record, permitted=record.permitted | 1 << 62)
    (finding,) = CREDENTIALS.check_host(beyond, FEATURES)
    assert "cap_62" in str(finding)


def test_a_host_without_time_namespaces_is_named():
    record = ClocksRecord(1, 1)
    assert list(CLOCKS.check_host(record, FEATURES)) == []
    (finding,) = CLOCKS.check_host(record, attrs.evolve(FEATURES, timens=False))
    assert "time namespace" in str(finding)
