"""Address spaces for tests, told in page numbers."""

from ckpt.image.runs import Fate
from ckpt.resources.file_identity import FileIdentity
from ckpt.resources.memory import MemoryRecord, MmFields, VmaRecord
from ckpt.tracker.spans import join
from tests.image.chain_model import PAGE

__all__ = ["PAGE", "by_page", "memory", "pages", "spans_of", "vma"]


def vma(start, end, *, file=-1, shared=False, special="", flags=()):
    """Return a mapping of the pages from `start` to `end`."""
    return VmaRecord(
        start=start * PAGE,
        end=end * PAGE,
        prot=3,
        shared=shared,
        special=special,
        file=file,
        offset_bytes=0,
        flags=tuple(flags),
        name="",
    )


def memory(*vmas):
    file = FileIdentity("/x", 0, 0)
    return MemoryRecord(tuple(vmas), (file,), MmFields(*[0] * 11), file, b"", "")


def pages(spans):
    """Return the page numbers in spans."""
    return {page for start, end in spans for page in range(start // PAGE, end // PAGE)}


def spans_of(numbers):
    return join((page * PAGE, (page + 1) * PAGE) for page in numbers)


def by_page(table):
    """Return page -> (fate, source) of a run table."""
    result = {}
    for run in table:
        for n in range(run.n_pages):
            page = run.start // PAGE + n
            assert page not in result
            result[page] = (run.fate, run.source + n if run.fate == Fate.DATA else None)
    return result
