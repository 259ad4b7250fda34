"""500 threads, 10,000 mappings, 1,000 descriptors of one process: all of them come back."""

import pytest

from integration.harness import Restored, become_subreaper, dump
from integration.trees.test_trees import Tree, assert_same, places, python, views

become_subreaper()

# Each thread adds its own number to its own count when its turn comes, and lets the next one go.
THREADS = """
import threading
N = 500
threading.stack_size(1 << 16)
counts = [0] * N
turns = [threading.Semaphore(0) for _ in range(N + 1)]
def works(nth):
    while True:
        turns[nth].acquire()
        counts[nth] += nth
        turns[nth + 1].release()
for nth in range(N):
    threading.Thread(target=works, args=(nth,), daemon=True).start()
rounds = 0
def step():
    global rounds
    rounds += 1
    turns[0].release()
    turns[N].acquire()
    return counts == [rounds * nth for nth in range(N)]
"""
# Neighbours differ in protection, so that they are mappings of their own; each page has its number.
MAPPINGS = """
PAGE, N = 4096, 10_000
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
at = libc.mmap(None, N * PAGE, 3, 0x22, -1, 0)
cells = [ctypes.c_uint64.from_address(at + nth * PAGE) for nth in range(N)]
for nth, cell in enumerate(cells):
    cell.value = nth
    assert libc.mprotect(at + nth * PAGE, PAGE, 1 if nth % 2 else 3) == 0
rounds = 0
def step():
    global rounds
    right = all(cell.value == nth + (0 if nth % 2 else rounds) for nth, cell in enumerate(cells))
    rounds += 1
    for cell in cells[::2]:
        cell.value += 1
    return right and len(open("/proc/self/maps").readlines()) > N
"""
# Files at offsets of their own, pipes with content, events with counts.
DESCRIPTORS = """
import resource
N = 250
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
files = [os.open("file", os.O_RDWR | os.O_CREAT) for _ in range(N)]
os.truncate("file", 1 << 20)
pipes = [os.pipe() for _ in range(N)]
events = [os.eventfd(nth + 1, os.EFD_NONBLOCK) for nth in range(N)]
for nth in range(N):
    os.lseek(files[nth], nth, os.SEEK_SET)
    os.write(pipes[nth][1], b"%d" % nth)
rounds = 0
def step():
    global rounds
    right = True
    for nth, (reader, writer) in enumerate(pipes):
        right &= os.lseek(files[nth], 100, os.SEEK_CUR) == nth + 100 * (rounds + 1)
        right &= os.read(reader, 100) == b"%d" % nth and os.write(writer, b"%d" % nth) > 0
        right &= os.eventfd_read(events[nth]) == nth + 1
        os.eventfd_write(events[nth], nth + 1)
    rounds += 1
    return right and len(os.listdir("/proc/self/fd")) > 4 * N
"""
KINDS = {"threads": THREADS, "mappings": MAPPINGS, "descriptors": DESCRIPTORS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_one_comes_back(kind, tmp_path):
    image, home = tmp_path / "image", tmp_path / "home"
    home.mkdir()
    with Tree(python(KINDS[kind]), start_new_session=True, cwd=home) as work:
        for nth in range(2):
            assert dump(work.pid, image)["kind"] == ("delta" if nth else "full")
            assert work.ask("step()") == "True"
        stood = places(work.pid)
        seen = views(stood)
        dump(work.pid, image, "--kill")
        work.process.wait()
    with Restored(image) as back:
        assert_same(back.pid, stood, seen)
        assert back.ask("step()") == "True"
        assert dump(back.pid, image)["kind"] == "delta"
        assert back.ask("(step(), rounds)") == "(True, 4)"
    with Restored(image, "--at", "1") as back:
        assert back.ask("(step(), rounds)") == "(True, 2)"
