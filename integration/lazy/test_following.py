"""The server follows what a process does with memory that is not there yet.

The server runs in a thread of the test, over the memory of a small program that does one thing at a
time: nothing is left to chance or time. Until it is told to fill, it only answers faults.
"""

import contextlib
import os
import threading

import pytest

from ckpt.engine.lazy import FEATURES, PageServer
from ckpt.engine.lazy_pages import ImagePages
from ckpt.errors import RestoreFailed
from ckpt.image.chain import Chain
from ckpt.image.reader import PageReader
from ckpt.kernel import pidfd, userfaultfd
from ckpt.units import GenerationNo, Pid, RemoteFd, addr_range
from tests.image.chain_model import PAGE, add_generation, data, new_chain, soft_page, zero
from tests.kernel.children import running

N = 64
FRAME = 8
PROGRAM = """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    libc.mremap.argtypes += [ctypes.c_void_p]
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mprotect.argtypes = libc.madvise.argtypes
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    memory = private_memory(%d)
    base = address_of(memory)
    spare = private_memory(%d)
    beside = address_of(spare)
    fd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)

    def number(page, at=None):
        raw = ctypes.string_at((base if at is None else at) + page * PAGE, PAGE)
        return int.from_bytes(raw[-8:], "little") if raw[:8] == raw[8:16] else -1

    def numbers(first, n, at=None):
        return [number(page, at) for page in range(first, first + n)]

    def checked(result):
        assert result not in (-1, 2**64 - 1, None), ctypes.get_errno()
        return result

    say(base, fd)
    while command := wait():
        exec(command)
    """ % (N, N)  # noqa: UP031


class Scene:
    """A program, an image of its memory, and a server in a thread."""

    def __init__(self, child, base, fd, chain, zeros):
        self.child, self.base = child, base
        page = base // PAGE
        stored = range(0, N - zeros, FRAME)
        runs = [data(page + n, *map(soft_page, range(n + 1, n + FRAME + 1))) for n in stored]
        runs.append(zero(page + N - zeros, zeros))
        add_generation(chain, {"mm": runs}, after_run=lambda writer: writer.flush())
        reader = PageReader(Chain.open(chain.path), GenerationNo(0))
        span = addr_range(base, N * PAGE)
        userfaultfd.register(fd, span, userfaultfd.UFFDIO_REGISTER_MODE_MISSING, pid=child.pid)
        self.use = contextlib.ExitStack()
        use = self.use.enter_context(reader.chain.in_use())
        pages = ImagePages(reader, reader.resolve("mm"), "it", use)
        self.server = PageServer(pages, fd, [span], Pid(child.pid))
        self.go_read, self.go_write = os.pipe()
        self.failure = None
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        try:
            if self.server.serve_until(self.go_read):
                self.server.serve_all()
        except RestoreFailed as error:
            self.failure = error

    def ask(self, expression):
        """Let the program say a list of numbers."""
        self.child.tell(f"say(*({expression}))")
        return self.child.heard()

    def do(self, statement):
        self.child.tell(f"{statement}; say('done')")
        assert self.child.heard() == ["done"]

    def fill(self):
        """Let the server put everything in place, and wait until it has."""
        os.write(self.go_write, b"g")
        self.thread.join()
        assert self.failure is None

    def end(self):
        with contextlib.suppress(BrokenPipeError):
            os.close(self.go_write)
        self.thread.join()
        self.use.close()
        os.close(self.go_read)


@pytest.fixture
def scene(tmp_path):
    with running(PROGRAM) as child:
        base, number = child.heard()
        process = pidfd.pidfd_open(Pid(child.pid))
        fd = pidfd.pidfd_getfd(process, RemoteFd(number), pid=Pid(child.pid))
        os.close(process)
        userfaultfd.negotiate(fd, FEATURES)
        made = Scene(child, base, fd, new_chain(tmp_path / "chain"), zeros=8)
        child.tell("os.close(fd); say('closed')")
        assert child.heard() == ["closed"]
        try:
            yield made
        finally:
            made.end()


def content(first, n):
    """What the image has in pages `first`...; the last ones are zero."""
    return [page + 1 if page < N - 8 else 0 for page in range(first, first + n)]


def test_every_page_comes_when_it_is_touched(scene):
    assert scene.ask(f"numbers(0, {N})") == content(0, N)


def test_every_page_is_there_in_the_end(scene):
    scene.fill()
    assert scene.ask(f"numbers(0, {N})") == content(0, N)


def test_a_fault_by_the_kernel_is_served(scene):
    scene.do("r, w = os.pipe(); checked(libc.write(w, base + 5 * PAGE, PAGE))")
    assert scene.ask("[int.from_bytes(os.read(r, PAGE)[-8:], 'little')]") == content(5, 1)


@pytest.mark.parametrize("touched", [False, True])
def test_what_is_given_back_reads_as_zero_for_ever(scene, touched):
    if touched:
        scene.ask("numbers(0, 32)")
    scene.do("checked(libc.madvise(base + 3 * PAGE, 10 * PAGE, mmap.MADV_DONTNEED))")
    expected = content(0, 3) + [0] * 10 + content(13, N - 13)
    assert scene.ask("numbers(0, 16)") == expected[:16]
    scene.fill()
    assert scene.ask(f"numbers(0, {N})") == expected


def test_what_was_written_is_not_overwritten(scene):
    scene.do("ctypes.memset(base + 9 * PAGE, 7, PAGE)")
    scene.fill()
    assert scene.ask("[ctypes.string_at(base + 9 * PAGE, PAGE) == bytes([7]) * PAGE]") == ["True"]
    assert scene.ask("numbers(0, 9)") == content(0, 9)


def test_moved_memory_is_filled_where_it_is(scene):
    scene.do("checked(libc.mremap(base + 4 * PAGE, 20 * PAGE, 20 * PAGE, 3, beside + 8 * PAGE))")
    assert scene.ask("numbers(8, 3, beside)") == content(4, 3)
    scene.fill()
    assert scene.ask("numbers(8, 20, beside)") == content(4, 20)
    assert scene.ask("numbers(0, 4)") == content(0, 4)
    assert scene.ask("numbers(24, 8)") == content(24, 8)


def test_what_is_left_behind_by_a_move_is_zero(scene):
    # MREMAP_DONTUNMAP: the old place stays, empty.
    scene.do("checked(libc.mremap(base + 4 * PAGE, 20 * PAGE, 20 * PAGE, 7, beside))")
    assert scene.ask("numbers(4, 20)") == [0] * 20
    scene.fill()
    assert scene.ask("numbers(4, 20)") == [0] * 20
    assert scene.ask("numbers(0, 20, beside)") == content(4, 20)


def test_what_grows_by_a_move_is_zero_behind_its_content(scene):
    scene.do("at = checked(libc.mremap(base + 8 * PAGE, 4 * PAGE, 9 * PAGE, 1, 0))")
    assert scene.ask("numbers(0, 9, at)") == content(8, 4) + [0] * 5
    scene.fill()
    assert scene.ask("numbers(0, 9, at)") == content(8, 4) + [0] * 5


def test_unmapped_memory_is_not_filled(scene):
    scene.do("checked(libc.munmap(base + 4 * PAGE, 20 * PAGE))")
    scene.do("again = mmap.mmap(-1, PAGE)")
    scene.fill()
    assert scene.ask("numbers(0, 4)") == content(0, 4)
    assert scene.ask(f"numbers(24, {N - 24})") == content(24, N - 24)


def test_split_mappings_are_filled(scene):
    scene.do("[checked(libc.mprotect(base + n * PAGE, PAGE, 1)) for n in range(1, 50, 3)]")
    scene.fill()
    assert scene.ask(f"numbers(0, {N})") == content(0, N)


def test_a_forked_child_has_all_its_pages(scene):
    scene.ask("numbers(0, 10)")
    scene.child.tell(
        f"pid = os.fork(); pid or (say(*numbers(0, {N})), os._exit(0));"
        " os.waitpid(pid, 0); say('done')"
    )
    assert scene.child.heard() == content(0, N)
    assert scene.child.heard() == ["done"]
    scene.fill()
    assert scene.ask(f"numbers(0, {N})") == content(0, N)


def test_a_child_keeps_what_its_parent_gives_back(scene):
    scene.child.tell(
        "r, w = os.pipe();"
        " pid = os.fork(); pid or (os.read(r, 1), say(*numbers(0, 20)), os._exit(0));"
        " checked(libc.madvise(base, 8 * PAGE, mmap.MADV_DONTNEED)); say(*numbers(0, 16))"
    )
    assert scene.child.heard() == [0] * 8 + content(8, 8)
    scene.fill()
    scene.child.tell("os.write(w, b'g')")
    assert scene.child.heard() == content(0, 20)
    assert scene.ask("[os.waitpid(pid, 0)[1]]") == [0]


_TWICE = f"""
r, w = os.pipe()
a = os.fork()
if not a:
    b = os.fork()
    if not b:
        say("up")
        os.read(r, 1)
        say(*numbers(0, {N}))
        os._exit(0)
    os.waitpid(b, 0)
    os._exit(0)
"""


def test_a_child_of_a_child_is_filled_too(scene):
    scene.child.tell(f"exec({_TWICE!r})")
    assert scene.child.heard() == ["up"]
    scene.fill()
    scene.child.tell("os.write(w, b'g')")
    assert scene.child.heard() == content(0, N)
    assert scene.ask("[os.waitpid(a, 0)[1]]") == [0]


def test_a_child_that_is_gone_is_forgotten(scene):
    scene.do("pid = os.fork(); pid or os._exit(0); os.waitpid(pid, 0)")
    scene.fill()
    assert scene.ask(f"numbers(0, {N})") == content(0, N)


def test_an_exec_ends_the_filling(scene):
    scene.child.tell(
        "os.execv(sys.executable, [sys.executable, '-S', '-c', 'print(1, flush=True); input()'])"
    )
    assert scene.child.heard() == [1]
    scene.fill()


def test_a_page_that_somebody_else_has_put_there_ends_the_serving(scene):
    scene.server._spaces[0].places.move(scene.base, scene.base + 8 * PAGE, 8 * PAGE)
    scene.ask("numbers(8, 1)")
    scene.server._spaces[0].places.move(scene.base + 16 * PAGE, scene.base + 8 * PAGE, 8 * PAGE)
    os.write(scene.go_write, b"g")
    scene.thread.join()
    assert "is filled already" in str(scene.failure)
