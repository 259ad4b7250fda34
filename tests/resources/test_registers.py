"""Registers of another processor are refused by name; those of this one are not."""

import struct

import attrs

from ckpt.kernel.features import probe_features
from ckpt.kernel.ptrace import MAX_XSTATE
from ckpt.resources.registers import REGISTERS, RegistersRecord

FEATURES = probe_features()
XSTATE_BV = 512
SIZE = FEATURES.xsave_bytes or 576


def record(used=0b11, size=SIZE, machine=FEATURES.machine):
    xstate = bytearray(size)
    struct.pack_into("<Q", xstate, XSTATE_BV, used)
    return RegistersRecord(machine, bytes(216), bytes(xstate), -1, 0)


def findings(record, features=FEATURES):
    return [str(finding) for finding in REGISTERS.check_host(record, features)]


def test_what_this_processor_offers_is_taken():
    assert FEATURES.xsave_components & 0b11 == 0b11, "x87 and SSE are on every one"
    assert findings(record()) == []
    assert findings(record(FEATURES.xsave_components)) == []


def test_another_size_is_named():
    for size in (SIZE - 8, SIZE + 8):
        assert size <= MAX_XSTATE
        (found,) = findings(record(size=size))
        assert f"the image has {size}" in found


def test_a_component_in_use_that_is_not_offered_is_named():
    fewer = attrs.evolve(FEATURES, xsave_components=0b11)
    (found,) = findings(record(0b111), fewer)
    assert "XCR0 bits 0x4" in found
    assert findings(record(0b11), fewer) == [], "what is not in use does not matter"


def test_another_architecture_is_named_alone():
    (found,) = findings(record(1 << 40, SIZE + 8, "riscv64"))
    assert "riscv64" in found
