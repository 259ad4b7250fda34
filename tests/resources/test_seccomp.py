"""The promise: no record of seccomp that a kernel would not take is taken from an image."""

import pytest

from ckpt.resources.seccomp import ConfinedRecord, FilterRecord, SeccompRecord

ONE = FilterRecord(bytes(8), log=False)


@pytest.mark.parametrize("length", [0, 7, 8 * 4097])
def test_a_program_of_no_length_or_too_long(length):
    with pytest.raises(ValueError, match="no seccomp filter"):
        FilterRecord(bytes(length), log=False)


@pytest.mark.parametrize("index", [-1, 1])
def test_a_chain_of_what_is_not_there(index):
    with pytest.raises(ValueError, match="not there"):
        SeccompRecord((ONE,), (ConfinedRecord(2, (0, index)),))


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="mode 3"):
        SeccompRecord((), (ConfinedRecord(3, ()),))
