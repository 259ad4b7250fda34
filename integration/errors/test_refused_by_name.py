"""What cannot be captured is named by the command, all of it at once, and the tree is untouched."""

import pytest

from ckpt.kernel.arch import NR
from integration.errors.refusals import refused, untouched
from integration.harness import become_subreaper
from integration.trees.test_trees import Tree, places, python

become_subreaper()

NR_MEMFD_SECRET = 447
PREPARE = """
import struct, threading
libc.syscall.restype = libc.mmap.restype = ctypes.c_long
libc.syscall.argtypes = [ctypes.c_long] * 7
libc.mmap.argtypes = [ctypes.c_long] * 6
SHARED, PRIVATE, ANONYMOUS, NORESERVE, HUGETLB = 0x01, 0x02, 0x20, 0x4000, 0x40000
def syscall(*args):
    got = libc.syscall(*args, *[0] * (7 - len(args)))
    assert got >= 0, args
    return got
def map_pages(flags, fd=-1, size=4096):
    at = libc.mmap(0, size, 3, flags, fd, 0)
    assert at != -1
    ctypes.memset(at, 7, size)
    return at
def reserve_huge(flags):
    assert libc.mmap(0, 2 << 20, 3, flags | ANONYMOUS | HUGETLB | NORESERVE, -1, 0) != -1
"""

CASES = {
    "aio": (
        f"ring = ctypes.c_long(); syscall({NR.io_setup}, 8, ctypes.addressof(ring))",
        ["an AIO ring is not supported"],
    ),
    "io_uring": (
        "entries = ctypes.create_string_buffer(120)\n"
        f"fd = syscall({NR.io_uring_setup}, 4, ctypes.addressof(entries))\n"
        "assert libc.mmap(0, 4096, 3, SHARED, fd, 0) != -1",
        ["is an io_uring", "memory of an anonymous inode (io_uring"],
    ),
    "userfaultfd": (
        f"fd = syscall({NR.userfaultfd}, os.O_CLOEXEC)",
        ["is a userfaultfd: the process handles page faults itself"],
    ),
    "fanotify": (f"fd = syscall({NR.fanotify_init}, 0, 0)", ["is a fanotify group"]),
    "bpf": (
        "asked = ctypes.create_string_buffer(struct.pack('<IIII', 2, 4, 4, 1), 128)\n"
        f"fd = syscall({NR.bpf}, 0, ctypes.addressof(asked), 128)",
        ["is a map of BPF"],
    ),
    "a mapped file that is linked elsewhere": (
        "open('one', 'w').write('x' * 4096)\n"
        "map_pages(SHARED, os.open('one', os.O_RDWR))\n"
        "os.link('one', 'other'); os.unlink('one')",
        ["the mapped file has lost its name and has another"],
    ),
    "vfork under way": (
        """
stack = ctypes.create_string_buffer(1 << 16)
libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
waits = (ctypes.cast(libc.pause, ctypes.c_void_p), (ctypes.addressof(stack) + (1 << 16)) & ~15)
threading.Thread(target=lambda: libc.clone(*waits, 0x4100 | 17, None), daemon=True).start()
def has_child():
    tasks = os.listdir("/proc/self/task")
    return any(open(f"/proc/self/task/{tid}/children").read() for tid in tasks)
while not has_child():
    pass
""",
        ["was made by vfork and has not executed a program yet"],
    ),
}


def assert_refused(code, wanted, cwd):
    with Tree(python(PREPARE + code), cwd=cwd) as work:
        stood = places(work.pid)
        with untouched(work.pid):
            said = refused(21, "dump", "--pid", work.pid, cwd / "image")
        assert [one for one in wanted if one not in said] == [], said
        assert places(work.pid) == stood
        assert work.ask("1 + 1") == "2"
        assert not (cwd / "image" / "0").exists()


@pytest.mark.parametrize("case", CASES)
def test_it_is_named(case, tmp_path):
    assert_refused(*CASES[case], tmp_path)


def test_all_of_a_tree_are_named_together(tmp_path):
    together = [case for case in CASES if case != "vfork under way"]
    code = "\n".join(CASES[case][0] for case in together)
    code += (
        f"\ndef also(ready):\n    syscall({NR.userfaultfd}, 0)\n    ready()\n    signal.pause()\n"
    )
    wanted = [one for case in together for one in CASES[case][1]]
    assert_refused(code + "child(also)", wanted, tmp_path)


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("reserve_huge(PRIVATE)", "huge pages of hugetlbfs"),
        ("reserve_huge(SHARED)", "huge pages of hugetlbfs"),
        ("fd = os.memfd_create('huge', 4)", "is a memfd of huge pages"),
    ],
    ids=["private", "shared", "memfd"],
)
def test_huge_pages_are_named(code, wanted, tmp_path):
    """None of them is touched, so the machine needs none to spare."""
    assert_refused(code, [wanted], tmp_path)
