"""The promise: no record of System V IPC makes a restore do what no capture has seen."""

import attrs
import pytest

from ckpt.kernel.sysvipc import Permissions
from ckpt.resources.sysv_record import (
    AttachmentRecord,
    DataRecord,
    MessageRecord,
    QueueRecord,
    SegmentRecord,
    SemaphoresRecord,
    SysvRecord,
)

OWNER = Permissions(0, 0, 0, 0o600)
SEGMENT = SegmentRecord(5, OWNER, 0, 8192, ())


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (DataRecord(8000, 200, b""), "behind its end"),
        (DataRecord(-1, 10, b""), "before it"),
        (DataRecord(5, 0, b""), "before it"),
    ],
)
def test_data_that_cannot_be(data, problem):
    with pytest.raises(ValueError, match=problem):
        attrs.evolve(SEGMENT, data=(data,))


def test_more_data_than_may_be():
    with pytest.raises(ValueError, match="more data"):
        SegmentRecord(5, OWNER, 0, 1 << 30, (DataRecord(0, 17 << 20, b""),))


def test_an_attachment_to_no_place():
    with pytest.raises(ValueError, match="no place"):
        AttachmentRecord(1, 4096, 4096, 0, 1, writable=True, locked=False)


@pytest.mark.parametrize(
    ("number", "permissions"),
    [
        (-1, OWNER),
        (1 << 31, OWNER),
        (1, Permissions(1 << 31, 0, 0, 0)),
        (1, Permissions(0, -1, 0, 0)),
        (1, Permissions(0, 0, 1 << 32, 0)),
        (1, Permissions(0, 0, 0, 1 << 12)),
    ],
)
def test_an_object_that_cannot_be(number, permissions):
    with pytest.raises(ValueError, match="System V"):
        SegmentRecord(number, permissions, 0, 1, ())
    with pytest.raises(ValueError, match="System V"):
        SemaphoresRecord(number, permissions, ())
    with pytest.raises(ValueError, match="System V"):
        QueueRecord(number, permissions, 1, ())


@pytest.mark.parametrize("value", [-1, 32768])
def test_a_semaphore_that_cannot_be(value):
    with pytest.raises(ValueError, match="semaphore"):
        SemaphoresRecord(1, OWNER, (0, value))


@pytest.mark.parametrize("kind", [0, -1, 1 << 63])
def test_a_message_that_cannot_be(kind):
    with pytest.raises(ValueError, match="type of a message"):
        MessageRecord(kind, b"")


@pytest.mark.parametrize(
    "setting", [("../../sysrq-trigger", "b"), ("hostname", "x"), ("sem", "1\n2")]
)
def test_a_setting_that_is_none(setting):
    with pytest.raises(ValueError, match="not known"):
        SysvRecord((), (), (), (), (setting,))
