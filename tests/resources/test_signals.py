"""What a queued signal becomes before it is queued again."""

import struct

from ckpt.resources.signals import SETTABLE, _sendable

SI_QUEUE, SI_TIMER = -1, -2


def siginfo(code):
    return struct.pack("<iiii", 34, 0, code, 0) + bytes(range(16, 128))


def test_a_signal_of_a_timer_does_not_make_the_kernel_look_for_that_timer():
    before = siginfo(SI_TIMER)
    after = _sendable(before)
    assert after[32:36] == bytes(4)
    assert after[:32] + after[36:] == before[:32] + before[36:]


def test_any_other_signal_stays_byte_for_byte():
    assert _sendable(siginfo(SI_QUEUE)) == siginfo(SI_QUEUE)


def test_all_but_two_signals_have_an_action():
    assert set(range(1, 65)) - set(SETTABLE) == {9, 19}
