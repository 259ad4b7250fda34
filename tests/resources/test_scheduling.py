"""The kernel's way to write a set of processors."""

import pytest

from ckpt.resources.scheduling import parse_cpu_list


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0\n", {0}),
        ("0-3\n", {0, 1, 2, 3}),
        ("0-1,4,6-7\n", {0, 1, 4, 6, 7}),
        ("\n", set()),
    ],
)
def test_a_list_of_processors_is_read(text, expected):
    assert parse_cpu_list(text) == expected
