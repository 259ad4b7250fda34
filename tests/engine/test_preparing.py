"""The promise: each process finds what it inherits, its own and what all share."""

from hypothesis import given
from hypothesis import strategies as st

from ckpt.engine.preparing import Files
from ckpt.resources.base import Opened
from ckpt.units import Fd, Pid, RemoteFd

opened_files = st.dictionaries(
    st.tuples(st.integers(1, 5), st.text("abc", min_size=1, max_size=2)), st.booleans()
)


@given(opened_files)
def test_a_process_finds_its_own_and_what_is_shared(asked):
    # A key of what is shared is unique in the tree.
    shared = {key for (_, key), is_shared in asked.items() if is_shared}
    asked = {
        (pid, key): is_shared
        for (pid, key), is_shared in asked.items()
        if key not in shared or (pid, key) == next(one for one in asked if one[1] == key)
    }
    files = Files({(Pid(pid), key): Opened(Fd(0), shared=s) for (pid, key), s in asked.items()})
    numbers = {place: RemoteFd(100 + index) for index, place in enumerate(files.by_key)}
    found = files.of_each(numbers)
    for pid in range(7):
        expected = {
            key: numbers[Pid(owner), key]
            for (owner, key), is_shared in asked.items()
            if is_shared or owner == pid
        }
        assert dict(found(Pid(pid))) == expected


def test_what_is_shared_is_sorted_once_for_all():
    """A thousand processes that share a thousand files do not have a million entries."""
    files = Files({(Pid(1), f"key {n}"): Opened(Fd(0), shared=True) for n in range(1000)})
    numbers = {place: RemoteFd(index) for index, place in enumerate(files.by_key)}
    found = files.of_each(numbers)
    first, *others = (found(Pid(pid)).maps for pid in range(1, 1001))
    assert all(one[-1] is first[-1] for one in others)
    assert len(first[-1]) == 1000
