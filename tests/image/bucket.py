"""Object storage in memory, of which any single request can be the last."""

from fsspec.implementations.memory import MemoryFileSystem

from ckpt.image.objects import Objects
from ckpt.image.reader import PageReader
from ckpt.image.remote import open_remote
from ckpt.image.verify import verify
from ckpt.image.writer import WriterOptions
from tests.image.chain_model import (
    PAGE,
    add_generation,
    data,
    hard_page,
    new_chain,
    pages_by_frames,
    parent,
    replay,
    soft_page,
    zero,
)

ROOT = "/bucket/job"
URL = "s3:/" + ROOT


class Stopped(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def new_memory():
    """Return a file system that shares nothing with any other."""
    alone = {"store": {}, "pseudo_dirs": [""], "cachable": False}
    return type("Memory", (MemoryFileSystem,), alone)()


class Bucket(Objects):
    """Counts requests and what they write; from number `stop_at` on none is carried out."""

    def __init__(self, memory=None, stop_at=None, *, tears=False):
        self.memory = new_memory() if memory is None else memory
        super().__init__(self.memory, ROOT, URL)
        self.stop_at = stop_at
        self.tears = tears
        """Of a page file half is there if it is the last request, as where files are not atomic."""
        self.n_requests = 0
        self.written = []
        self.read_bytes = {}

    def _step(self):
        number = self.n_requests
        self.n_requests += 1
        if self.stop_at is not None and number >= self.stop_at:
            raise Stopped

    def list(self, key=""):
        self._step()
        return super().list(key)

    def look(self, key):
        self._step()
        return super().look(key)

    def read(self, key, start, end):
        self._step()
        self.read_bytes[key] = self.read_bytes.get(key, 0) + end - start
        return super().read(key, start, end)

    def put(self, key, data):
        self._step()
        self.written.append((key, len(data)))
        super().put(key, data)

    def create(self, key, data):
        self._step()
        self.written.append((key, len(data)))
        return super().create(key, data)

    def send(self, key, path, report):
        if self.tears and self.n_requests == self.stop_at:
            content = path.read_bytes()
            super().put(key, content[: len(content) // 2])
        self._step()
        self.written.append((key, path.stat().st_size))
        super().send(key, path, report)

    def content(self):
        return {key: self.memory.cat_file(f"{ROOT}/{key}") for key in Objects.list(self)}

    def chain(self):
        return open_remote(Objects(self.memory, ROOT, URL))

    def alter(self, key, change):
        """Have something else there."""
        path = f"{ROOT}/{key}"
        self.memory.pipe_file(path, change(self.memory.cat_file(path)))


def flipped(content):
    """Return it with one bit of its middle changed."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def files_of(path):
    """Return what a chain's directory has that counts."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "lock"
    }


ALL = [
    (None, {"mm": [data(0, *map(hard_page, range(4))), data(4, soft_page(4)), zero(5, 6)]}),
    (0, {"mm": [parent(0, 4), data(4, hard_page(14)), parent(5, 6)], "new": [zero(0, 1)]}),
    (1, {"mm": [data(0, soft_page(20)), parent(1, 6), data(7, hard_page(27)), parent(8, 3)]}),
    (2, {"mm": [parent(0, 6), data(6, soft_page(36)), parent(7, 4)]}),
    (3, {"mm": [parent(0, 11)]}),
]
"""The first has two page files, the last none."""


def make_original(path):
    made = new_chain(path)
    options = WriterOptions(threads=1, page_file_bytes=PAGE)
    for above, spaces in ALL:
        flush = {"after_run": lambda writer: writer.flush()}
        add_generation(made, spaces, above, options=options, **flush)
    assert len(made.manifest(0).page_files) == 2
    return path


def assert_replays(chain, numbers):
    assert chain.generations() == sorted(numbers)
    assert verify(chain) == []
    for number in numbers:
        reader = PageReader(chain, number)
        for space, pages in replay(ALL, number).items():
            assert pages_by_frames(reader, space) == pages
