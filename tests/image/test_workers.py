"""Jobs in threads: everything is done once, and the first failure ends it."""

import threading

import pytest

from ckpt.image.workers import for_each


def test_each_item_is_worked_on_once():
    done = []
    for_each(done.append, iter(range(1000)), 4)
    assert sorted(done) == list(range(1000))


def test_threads_work_at_the_same_time():
    both = threading.Barrier(2)
    for_each(lambda _: both.wait(60), range(2), 2)
    assert both.n_waiting == 0


def test_a_failure_of_the_work_ends_it():
    done = []

    def work(item):
        if item == 10:
            raise ValueError("ten")
        done.append(item)

    with pytest.raises(ValueError, match="ten"):
        for_each(work, iter(range(10**9)), 2)
    assert 10 not in done


def test_a_failure_of_the_items_ends_it():
    def items():
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        for_each(lambda _: None, items(), 2)
