"""Where memory comes from, and that what is mapped later is locked, comes back too."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from integration.files.processes import opened_by
from integration.harness import become_subreaper, ckpt, dump
from integration.resources.test_memory import AT, PAGE, brought_back, map_pages, succeed

_NR_MBIND, _NR_SET_MEMPOLICY = 237, 238
_BIND, _INTERLEAVE = 2, 3
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def _subreaper():
    become_subreaper()


def policies(pid):
    """Return the policy that /proc shows of each mapping."""
    lines = Path(f"/proc/{pid}/numa_maps").read_text().splitlines()
    return {int(line.split()[0], 16): line.split()[1] for line in lines}


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="kernel without NUMA")
@pytest.mark.parametrize("own", [True, False])
def test_memory_policies_come_back(tmp_path, own):
    def prepare():
        map_pages(2)
        node = ctypes.byref(ctypes.c_ulong(1))
        if own:
            succeed(libc.syscall(_NR_SET_MEMPOLICY, _INTERLEAVE, node, 64))
        at, size = ctypes.c_void_p(AT), ctypes.c_ulong(2 * PAGE)
        succeed(libc.syscall(_NR_MBIND, at, size, _BIND, node, ctypes.c_ulong(64), 0))

    with opened_by(prepare) as pid:
        before = policies(pid)
        assert before[AT] == "bind:0"
        assert list(before.values()).count("interleave:0") >= 3 * own
        dump(pid, tmp_path / "image", "--kill")
        with brought_back(pid, tmp_path / "image"):
            after = policies(pid)
            # Neighbours may be one mapping now.
            assert after.items() <= before.items()
            assert after[AT] == "bind:0"
            assert len(after) > len(before) // 2


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (0, set()),
        (_MCL_CURRENT, set()),
        (_MCL_FUTURE, {"lo"}),
        (_MCL_FUTURE | _MCL_ONFAULT, {"lo", "lf"}),
    ],
)
def test_future_memory_is_locked_as_before(tmp_path, wish, expected):
    code = (
        "import ctypes, mmap, sys\n"
        "libc = ctypes.CDLL(None)\n"
        f"assert {wish} == 0 or libc.mlockall({wish}) == 0\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    m = mmap.mmap(-1, 1 << 22, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "    start = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "    flags = None\n"
        "    for one in open('/proc/self/smaps'):\n"
        "        if '-' in one.split()[0]:\n"
        "            a, b = (int(x, 16) for x in one.split()[0].split('-'))\n"
        "            here = a <= start < b\n"
        "        elif one.startswith('VmFlags') and here:\n"
        "            flags = sorted({'lo', 'lf'} & set(one.split()))\n"
        "    print(*flags, flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=-1, stdout=-1, start_new_session=True, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        dump(child.pid, tmp_path / "image", "--kill")
        child.wait()
    done = ckpt("restore", tmp_path / "image", input="\n", stdin=None)
    assert set(done.stdout.split()) == expected, done.stderr
