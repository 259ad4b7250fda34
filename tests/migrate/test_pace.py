import pytest

from ckpt.errors import UsageError
from ckpt.migrate.pace import Bandwidth, Traffic, add_up, parse_rate


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("100M", 12_500_000),
        ("1G", 125_000_000),
        ("1Gbit", 125_000_000),
        ("2.5Gb/s", 312_500_000),
        ("12.5MB", 12_500_000),
        ("50MB/s", 50_000_000),
        ("800000", 100_000),
        ("10Gbps", 1_250_000_000),
    ],
)
def test_a_rate_is_in_bits_unless_it_says_bytes(text, bytes_per_s):
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize("text", ["", "fast", "-1M", "1X", "100k", "1MiB", "1e9", "0"])
def test_anything_else_is_no_rate(text):
    with pytest.raises(UsageError):
        parse_rate(text)


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds


def test_a_limit_holds_on_the_long_run():
    clock = Clock()
    bandwidth = Bandwidth(1_000_000, clock=clock, sleep=clock.sleep)
    for _ in range(1000):
        bandwidth.wait_for(10_000)
    assert clock.now_s - 100.0 == pytest.approx(10.0, abs=0.02)


def test_a_pause_is_not_saved_up():
    clock = Clock()
    bandwidth = Bandwidth(1_000_000, clock=clock, sleep=clock.sleep)
    clock.now_s += 60
    for _ in range(101):
        bandwidth.wait_for(10_000)
    assert clock.now_s - 160.0 == pytest.approx(1.0, abs=0.02)


def test_a_limit_can_be_lifted_and_set_anew():
    clock = Clock()
    bandwidth = Bandwidth(clock=clock, sleep=clock.sleep)
    bandwidth.wait_for(1 << 30)
    bandwidth.bytes_per_s = 1000
    bandwidth.wait_for(1000)
    bandwidth.wait_for(1000)
    bandwidth.bytes_per_s = None
    bandwidth.wait_for(1 << 30)
    assert clock.now_s - 100.0 == pytest.approx(1.0, abs=0.02)


def test_a_rate_is_what_was_sent_in_the_time_it_took():
    traffic = Traffic()
    assert traffic.send_rate is None
    for _ in range(100):
        traffic.count_frame(1 << 20, 0.01)
    assert traffic.send_rate == pytest.approx((1 << 20) / 0.01)
    assert traffic.sending_s == pytest.approx(1.0)
    for _ in range(100):
        traffic.count_frame(1 << 20, 0.1)
    assert traffic.send_rate == pytest.approx((1 << 20) / 0.1, rel=0.01)


def test_streams_add_up():
    one, other = Traffic(1, 2, 3.0, 4.0), Traffic(10, 20, 30.0, None)
    assert add_up([one, other]) == Traffic(11, 22, 33.0, 4.0)
    assert add_up([]).send_rate is None
