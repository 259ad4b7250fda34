"""What lies beside a mapping does not keep its pages from being watched."""

import pytest

from ckpt.engine.pages import read_own_mappings
from ckpt.kernel import ptrace
from ckpt.kernel.libc import PAGE_SIZE as PAGE
from ckpt.kernel.procfs import maps
from ckpt.process.arena import arena
from ckpt.process.freezer import freeze
from ckpt.resources.mappings import KERNEL_VMAS
from ckpt.tracker.spans import Own, intersect
from ckpt.tracker.writeprotect import create_inside
from ckpt.units import Pid
from integration.resources.droppable import MAP_DROPPABLE, can_be_dropped
from tests.kernel.children import running

N = 16
PROGRAM = f"""
    memory = private_memory({N})
    for page in range({N}):
        memory[page * PAGE] = 1
    say(address_of(memory))
    while wait():
        memory[3 * PAGE] = 2
        say("written")
    """


BESIDE_DROPPABLE = f"""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p] + [ctypes.c_size_t] * 5
    anonymous, fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0x10
    base = libc.mmap(None, {N} * PAGE, 3, anonymous, 2**64 - 1, 0)
    # No userfaultfd can watch it.
    at = base + {N // 2} * PAGE
    assert libc.mmap(at, PAGE, 3, {MAP_DROPPABLE} | mmap.MAP_ANONYMOUS | fixed, 2**64 - 1, 0) == at
    ctypes.memset(base, 1, {N} * PAGE)
    say(base)
    wait()
    """


def kernels_own(pid):
    return [vma.span for vma in maps.read_maps(pid) if vma.path in KERNEL_VMAS]


def test_a_mapping_that_cannot_be_watched_keeps_no_other_from_it():
    with running(PROGRAM) as child:
        pid, (base,) = Pid(child.pid), child.heard()
        # All that lies between, and the kernel's own, which nobody can watch.
        own = Own([(base, max(span.end for span in kernels_own(pid)))], [])
        with (
            freeze(pid, ptrace.Option.NONE) as frozen,
            arena(pid, frozen.tgid, frozen.leader) as lent,
        ):
            tracker = create_inside(pid, lent, frozen.leader)
        try:
            with freeze(pid, ptrace.Option.NONE):
                tracker.watch(pid, own)
            tracker.collect(pid, own, [], running=True)
            child.tell()
            assert child.heard() == ["written"]
            clean = tracker.collect(pid, own, [], running=True).clean
        finally:
            tracker.close()
        pages = [(base, base + N * PAGE)]
        dirty = base + 3 * PAGE
        assert intersect(clean, pages) == [(base, dirty), (dirty + PAGE, base + N * PAGE)]


def test_what_the_kernel_maps_is_not_a_process_s_own():
    with running(PROGRAM) as child:
        pid, _ = Pid(child.pid), child.heard()
        kernels = sorted((span.start, span.end) for span in kernels_own(pid))
        assert kernels
        assert intersect(read_own_mappings(pid).all, kernels) == []


@pytest.mark.skipif(not can_be_dropped(), reason="kernel has no droppable memory")
def test_what_comes_behind_one_that_cannot_be_watched_is_protected():
    with running(BESIDE_DROPPABLE) as child:
        pid, (base,) = Pid(child.pid), child.heard()
        own = Own([(base, base + N * PAGE)], [])
        with freeze(pid, ptrace.Option.NONE) as frozen:
            with arena(pid, frozen.tgid, frozen.leader) as lent:
                tracker = create_inside(pid, lent, frozen.leader)
            tracker.collect(pid, own, [])
        try:
            clean = tracker.collect(pid, own, [], running=True).clean
        finally:
            tracker.close()
        droppable = base + N // 2 * PAGE
        assert clean == [(base, droppable), (droppable + PAGE, base + N * PAGE)]
