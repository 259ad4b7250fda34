"""Keys that would be lost are named; the keyrings that everybody has are not."""

import pytest

from ckpt.errors import UnsupportedState
from ckpt.kernel.arch import NR
from ckpt.kernel.libc import readable_address, syscall
from ckpt.resources.keyrings import KEYRINGS, KeyringsRecord
from ckpt.resources.labels import LABEL, LabelRecord
from integration.freezer.targets import child
from integration.resources.embryos import FEATURES, capture, look

_GET_KEYRING_ID, _JOIN_SESSION = 0, 1
_THREAD, _PROCESS, _SESSION = -1, -2, -3


def add_key(kind, description, keyring):
    kind, description = kind + b"\0", description + b"\0"
    payload = b"secret" if kind == b"user\0" else b""
    syscall(
        NR.add_key,
        readable_address(kind)[0],
        readable_address(description)[0],
        readable_address(payload)[0] if payload else 0,
        len(payload),
        keyring & 0xFFFF_FFFF,
    )


def make(which):
    syscall(NR.keyctl, _GET_KEYRING_ID, which & 0xFFFF_FFFF, 1)


def join_a_session():
    syscall(NR.keyctl, _JOIN_SESSION, 0)


def refusal(prepare):
    with child(prepare) as pid, pytest.raises(UnsupportedState) as caught:
        capture(KEYRINGS, pid)
    return str(caught.value)


def test_who_has_no_keys_is_not_refused():
    with child(lambda: None) as pid:
        assert capture(KEYRINGS, pid) == KeyringsRecord()


def test_a_keyring_of_a_thread_is_named():
    assert "thread" in refusal(lambda: make(_THREAD))


def test_a_keyring_of_a_process_is_named():
    assert "has a keyring of its own" in refusal(lambda: make(_PROCESS))


def test_a_session_with_a_key_is_named():
    def prepare():
        join_a_session()
        add_key(b"user", b"ticket", _SESSION)

    assert "ticket" in refusal(prepare)


def test_a_session_without_keys_is_not_refused():
    def prepare():
        join_a_session()
        add_key(b"user", b"invocation_id", _SESSION)
        add_key(b"keyring", b"more", _SESSION)

    with child(prepare) as pid:
        assert capture(KEYRINGS, pid) == KeyringsRecord()


def test_a_label_that_we_have_not_is_named():
    with child(lambda: None) as pid:
        assert look(LABEL, pid) == []
        record = capture(LABEL, pid)
    assert list(LABEL.check_host(record, FEATURES)) == []
    (finding,) = LABEL.check_host(LabelRecord("system_u:system_r:nobody_t:s0"), FEATURES)
    assert "nobody_t" in str(finding)
