import contextlib
import mmap
import os
import select
import threading

import pytest

from ckpt.errors import TargetGone
from ckpt.kernel import pagemap, userfaultfd
from ckpt.kernel.libc import writable_address
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.userfaultfd import UffdFeature
from ckpt.units import addr_range
from tests.kernel.children import running

PAGE = mmap.PAGESIZE
PID = os.getpid()
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | userfaultfd.UFFD_USER_MODE_ONLY


@contextlib.contextmanager
def closing(fd):
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def memory():
    n_bytes = 64 * PAGE
    with mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        yield memory


@pytest.fixture
def span(memory):
    return addr_range(writable_address(memory)[0], len(memory))


@pytest.fixture
def uffd():
    with closing(userfaultfd.create(FLAGS)) as fd:
        yield fd


@pytest.fixture
def map_fd():
    with closing(pagemap.open_pagemap(PID)) as fd:
        yield fd


def collect(map_fd, span, **masks):
    """Pages written since the last collect, and write-protect them again."""
    masks = masks or {"category_mask": pagemap.PAGE_IS_WRITTEN}
    regions = pagemap.scan(
        map_fd,
        span,
        return_mask=pagemap.PAGE_IS_WRITTEN,
        flags=pagemap.PM_SCAN_WP_MATCHING,
        **masks,
    )
    return [
        page
        for start, end, _ in regions
        for page in range((start - span.start) // PAGE, (end - span.start) // PAGE)
    ]


def test_handshake_tells_the_features(uffd):
    features = userfaultfd.negotiate(uffd, UffdFeature(0))
    assert UffdFeature.PAGEFAULT_FLAG_WP in features
    assert UffdFeature.MISSING_SHMEM in features


def test_a_second_handshake_is_refused(uffd):
    userfaultfd.negotiate(uffd, UffdFeature.SIGBUS)
    with pytest.raises(OSError, match="Invalid argument"):
        userfaultfd.negotiate(uffd, UffdFeature(0))


def test_an_unknown_feature_is_refused(uffd):
    with pytest.raises(OSError, match="Invalid argument"):
        userfaultfd.negotiate(uffd, UffdFeature(1 << 62))


@pytest.mark.usefixtures("needs_wp_async")
class TestWriteProtectAsync:
    @pytest.fixture(autouse=True)
    def armed(self, uffd, span):
        userfaultfd.negotiate(uffd, UffdFeature.WP_ASYNC)
        mode = userfaultfd.UFFDIO_REGISTER_MODE_WP
        ioctls = userfaultfd.register(uffd, span, mode, pid=PID)
        assert ioctls & 1 << 0x06  # UFFDIO_WRITEPROTECT

    def test_writes_are_reported_once(self, map_fd, memory, span):
        memory[3 * PAGE] = 1
        assert collect(map_fd, span) == list(range(64))
        assert collect(map_fd, span) == []
        memory[3 * PAGE] = memory[40 * PAGE] = memory[41 * PAGE] = 2
        assert collect(map_fd, span) == [3, 40, 41]
        assert collect(map_fd, span) == []

    def test_what_the_kernel_writes_is_reported_too(self, map_fd, memory, span):
        collect(map_fd, span)
        with open("/dev/zero", "rb", buffering=0) as zero:
            zero.readinto(memoryview(memory)[7 * PAGE : 9 * PAGE])
        assert collect(map_fd, span) == [7, 8]

    def test_reading_is_not_writing(self, map_fd, memory, span):
        collect(map_fd, span)
        assert memory[5 * PAGE] == 0
        assert collect(map_fd, span) == []

    def test_arming_holes_leaves_markers_that_are_no_pages(self, map_fd, memory, span, features):
        memory[3 * PAGE] = 1
        collect(map_fd, span)
        entries = pagemap.read_entries(map_fd, span)
        assert all(int(entry) & pagemap.PM_UFFD_WP for entry in entries)
        assert int(entries[0]) & pagemap.PM_SWAP
        if "sys_admin" not in features.capabilities:
            # The type of swap that tells a marker is hidden: every marker passes for a page.
            assert pagemap.scan_populated_private(map_fd, span) == [(span.start, span.end)]
            return
        page = (span.start + 3 * PAGE, span.start + 4 * PAGE)
        assert pagemap.scan_populated_private(map_fd, span) == [page]
        assert pagemap.runs_of(pagemap.populated_private(entries), span.start) == [page]

    def test_arming_only_pages_leaves_no_markers(self, map_fd, memory, span):
        memory[3 * PAGE] = 1
        populated = {
            "category_mask": pagemap.PAGE_IS_WRITTEN,
            "category_anyof_mask": pagemap.PAGE_IS_PRESENT | pagemap.PAGE_IS_SWAPPED,
        }
        assert collect(map_fd, span, **populated) == [3]
        entries = pagemap.read_entries(map_fd, span)
        assert [bool(entry) for entry in entries] == [page == 3 for page in range(64)]
        memory[9 * PAGE] = 1
        assert collect(map_fd, span, **populated) == [9]

    def test_pages_given_back_and_touched_again_are_written(self, map_fd, memory, span):
        memory[:] = b"x" * len(memory)
        collect(map_fd, span)
        memory.madvise(mmap.MADV_DONTNEED, 10 * PAGE, 2 * PAGE)
        memory[10 * PAGE] = 1
        assert 10 in collect(map_fd, span)

    def test_a_mapping_that_is_not_watched_is_skipped_or_refused(self, map_fd):
        with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as other:
            other[0] = 1
            span = addr_range(writable_address(other)[0], PAGE)
            assert collect(map_fd, span) == []
            with pytest.raises(PermissionError):
                pagemap.scan(
                    map_fd,
                    span,
                    return_mask=pagemap.PAGE_IS_WRITTEN,
                    flags=pagemap.PM_SCAN_CHECK_WPASYNC,
                )

    def test_protection_by_range(self, uffd, map_fd, memory, span):
        memory[:] = b"x" * len(memory)
        half = addr_range(span.start, 32 * PAGE)
        mode = userfaultfd.UFFDIO_WRITEPROTECT_MODE_WP
        userfaultfd.write_protect(uffd, half, mode, pid=PID)
        assert collect(map_fd, span) == list(range(32, 64))
        userfaultfd.write_protect(uffd, half, 0, pid=PID)
        assert collect(map_fd, span) == list(range(32))

    def test_unregistered_pages_are_skipped(self, uffd, map_fd, memory, span):
        memory[:] = b"x" * len(memory)
        collect(map_fd, span)
        userfaultfd.unregister(uffd, addr_range(span.start, 32 * PAGE), pid=PID)
        memory[0] = memory[40 * PAGE] = 1
        assert collect(map_fd, span) == [40]

    def test_another_descriptor_cannot_watch_the_same(self, span):
        with closing(userfaultfd.create(FLAGS)) as second:
            userfaultfd.negotiate(second, UffdFeature.WP_ASYNC)
            with pytest.raises(OSError, match="busy"):
                userfaultfd.register(second, span, userfaultfd.UFFDIO_REGISTER_MODE_WP, pid=PID)


class TestFilling:
    @pytest.fixture(autouse=True)
    def registered(self, uffd, span):
        userfaultfd.negotiate(uffd, UffdFeature(0))
        mode = userfaultfd.UFFDIO_REGISTER_MODE_MISSING
        ioctls = userfaultfd.register(uffd, span, mode, pid=PID)
        assert ioctls & 1 << 0x03  # UFFDIO_COPY

    def test_copy_puts_pages_in_place(self, uffd, memory, span):
        source = os.urandom(2 * PAGE)
        from_, _ = writable_address(buffer := bytearray(source))
        assert userfaultfd.copy(uffd, span.start + PAGE, from_, 2 * PAGE, pid=PID) == 2 * PAGE
        assert memory[PAGE : 3 * PAGE] == buffer

    def test_copy_stops_at_a_page_that_is_there(self, uffd, span):
        from_, _ = writable_address(buffer := bytearray(b"n" * (4 * PAGE)))
        userfaultfd.copy(uffd, span.start + 2 * PAGE, from_, PAGE, pid=PID)
        assert userfaultfd.copy(uffd, span.start, from_, len(buffer), pid=PID) == 2 * PAGE
        with pytest.raises(FileExistsError):
            userfaultfd.copy(uffd, span.start, from_, PAGE, pid=PID)

    def test_zeropage(self, uffd, memory, span):
        part = addr_range(span.start, 3 * PAGE)
        assert userfaultfd.zeropage(uffd, part, pid=PID) == 3 * PAGE
        assert memory[: 3 * PAGE] == bytes(3 * PAGE)
        with pytest.raises(FileExistsError):
            userfaultfd.zeropage(uffd, part, pid=PID)

    def test_a_thread_that_waits_for_a_page_is_woken(self, uffd, span):
        from_, _ = writable_address(buffer := bytearray(b"w" * PAGE))
        seen = []
        # The thread must fault in user mode and without the interpreter's lock: in libc.
        reader = threading.Thread(target=lambda: seen.append(first_byte(span.start)))
        reader.start()
        mode = userfaultfd.UFFDIO_COPY_MODE_DONTWAKE
        userfaultfd.copy(uffd, span.start, from_, PAGE, mode, pid=PID)
        userfaultfd.wake(uffd, addr_range(span.start, PAGE), pid=PID)
        reader.join()
        assert seen == [buffer[0]]


def first_byte(address):
    import ctypes

    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
    return memcmp(address, b"\0", 1)


def test_nothing_mapped_cannot_be_registered(uffd):
    userfaultfd.negotiate(uffd, UffdFeature(0))
    with pytest.raises(OSError, match="Invalid argument"):
        userfaultfd.register(
            uffd, addr_range(PAGE, PAGE), userfaultfd.UFFDIO_REGISTER_MODE_MISSING, pid=PID
        )


def test_the_address_space_behind_the_descriptor_is_gone():
    code = """
        memory = private_memory(4)
        uffd = ctypes.CDLL(None).syscall(323, os.O_CLOEXEC | 1)
        say(uffd, address_of(memory))
        wait()
    """
    with running(code) as child:
        remote, start = child.heard()
        with closing(pidfd_open(child.pid)) as pidfd:
            fd = pidfd_getfd(pidfd, remote, pid=child.pid)
        with closing(fd):
            userfaultfd.negotiate(fd, UffdFeature(0))
            span = addr_range(start, 4 * PAGE)
            mode = userfaultfd.UFFDIO_REGISTER_MODE_MISSING
            userfaultfd.register(fd, span, mode, pid=child.pid)
            child.kill()
            from_, _ = writable_address(buffer := bytearray(PAGE))
            assert len(buffer) == PAGE
            with pytest.raises(TargetGone):
                userfaultfd.copy(fd, start, from_, PAGE, pid=child.pid)
            with pytest.raises(TargetGone):
                userfaultfd.register(fd, span, mode, pid=child.pid)
            with pytest.raises(TargetGone):
                userfaultfd.unregister(fd, span, pid=child.pid)


def test_what_the_process_does_is_read():
    code = """
        libc = ctypes.CDLL(None)
        libc.mremap.argtypes = [ctypes.c_void_p] + [ctypes.c_size_t] * 4
        libc.mremap.restype = ctypes.c_void_p
        memory, spare = private_memory(8), private_memory(8)
        uffd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)
        start, to = address_of(memory), address_of(spare)
        say(uffd, start, to)
        wait()
        for step in (
            lambda: memory.madvise(mmap.MADV_DONTNEED, 0, PAGE),
            lambda: libc.mremap(start + PAGE, PAGE, PAGE, 3, to),
            lambda: os.fork() or os._exit(0),
            lambda: ctypes.string_at(start + 4 * PAGE, 1),
        ):
            step()
        say("done")
        wait()
    """
    events = UffdFeature.EVENT_FORK | UffdFeature.EVENT_REMAP | UffdFeature.EVENT_REMOVE
    with running(code) as child:
        remote, start, to = child.heard()
        with closing(pidfd_open(child.pid)) as pidfd:
            fd = pidfd_getfd(pidfd, remote, pid=child.pid)
        with closing(fd), select.epoll() as poll:
            userfaultfd.negotiate(fd, events)
            mode = userfaultfd.UFFDIO_REGISTER_MODE_MISSING
            userfaultfd.register(fd, addr_range(start, 8 * PAGE), mode, pid=child.pid)
            assert userfaultfd.read_messages(fd) == []
            assert userfaultfd.has_memory(fd)
            child.tell()
            poll.register(fd, select.EPOLLIN)
            found = []
            while not found or not isinstance(found[-1], userfaultfd.Fault):
                poll.poll()
                found += userfaultfd.read_messages(fd)
            dropped, moved, forked, fault = found
            assert dropped == userfaultfd.Dropped(start, start + PAGE)
            assert moved == userfaultfd.Moved(start + PAGE, to, PAGE)
            assert fault == userfaultfd.Fault(start + 4 * PAGE)
            os.close(forked.fd)
            userfaultfd.zeropage(fd, addr_range(fault.address, PAGE), pid=child.pid)
            assert child.heard() == ["done"]
            child.kill()
            assert not userfaultfd.has_memory(fd)
