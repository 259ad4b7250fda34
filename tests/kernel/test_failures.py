import errno

import pytest

from ckpt.errors import FeatureMissing, HostFull, NotPermitted, TargetGone
from ckpt.kernel.failures import failures_of, proc_failures_of


@pytest.mark.parametrize(
    ("number", "meaning"),
    [
        (errno.ESRCH, TargetGone),
        (errno.EPERM, NotPermitted),
        (errno.EACCES, NotPermitted),
        (errno.ENOSYS, FeatureMissing),
        (errno.ENOMEM, HostFull),
        (errno.EMFILE, HostFull),
        (errno.EINVAL, OSError),
        (errno.ENOENT, FileNotFoundError),
    ],
)
def test_errno_is_turned(number, meaning):
    with pytest.raises(meaning) as caught, failures_of(7, "do something"):
        raise OSError(number, "text")
    cause = caught.value.__cause__ or caught.value
    assert cause.errno == number


def test_message_says_what_and_whom():
    message = "permitted to read the memory of process 7: run"
    with pytest.raises(NotPermitted, match=message), failures_of(7, "read the memory"):
        raise PermissionError(errno.EPERM, "text")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESRCH])
def test_a_missing_file_of_proc_is_a_missing_process(number):
    with pytest.raises(TargetGone, match="process 7"), proc_failures_of(7, "read"):
        raise OSError(number, "text")


def test_a_bug_of_ours_stays_one():
    with pytest.raises(KeyError), failures_of(7, "read"):
        raise KeyError("x")
