"""A chain as plain Python: what the image layer should say, without any of its algebra.

A generation's spaces are lists of `ModelRun`; `replay` turns a history of them into page contents
by copying dicts, one page at a time.
"""

import attrs

from ckpt.image.chain import Chain
from ckpt.image.format import Fate, Manifest, RunTableBuilder
from ckpt.image.keys import PrivateKey
from ckpt.image.store import Store
from ckpt.units import AddrRange, GenerationNo, RemoteAddr, addr_range

PAGE = 4096
CHAIN_ID = "00112233445566778899aabbccddeeff"
KEY = PrivateKey(bytes(range(32)))
"""Opens the golden chain that is encrypted, and others that tests make."""
FILE_PAGE = "a page of the file itself"


class NoSyncStore(Store):
    """Does not wait for the disk: most tests are not about power cuts."""

    def sync_file(self, fd):
        pass

    def sync_directory(self, name="."):
        pass


@attrs.frozen
class ModelRun:
    page: int
    n_pages: int
    fate: Fate
    content: bytes = b""

    @property
    def start(self):
        return self.page * PAGE


def data(page, *pages):
    return ModelRun(page, len(pages), Fate.DATA, b"".join(pages))


def zero(page, n_pages):
    return ModelRun(page, n_pages, Fate.ZERO)


def file(page, n_pages):
    return ModelRun(page, n_pages, Fate.FILE)


def parent(page, n_pages):
    return ModelRun(page, n_pages, Fate.PARENT)


def soft_page(seed):
    """A page that compresses well."""
    return bytes([seed % 256]) * (PAGE - 8) + seed.to_bytes(8, "little")


def hard_page(seed):
    """A page that does not compress; always the same for the same seed."""
    state = seed * 2654435761 % (1 << 64) or 1
    words = []
    for _ in range(PAGE // 8):
        # xorshift64, the three shifts of Marsaglia's paper
        state ^= state << 13 & (1 << 64) - 1
        state ^= state >> 7
        state ^= state << 17 & (1 << 64) - 1
        words.append(state.to_bytes(8, "little"))
    return b"".join(words)


def new_chain(path, make_store=NoSyncStore):
    return Chain.create_or_open(path, make_store=make_store)


def write_spaces(writer, spaces, after_run=lambda _: None):
    """Write the pages of all runs and return the run tables."""
    tables = {}
    for name, runs in spaces.items():
        builder = RunTableBuilder(PAGE)
        for run in runs:
            source = writer.write_pages(run.content) if run.fate == Fate.DATA else 0
            builder.add(run.start, run.n_pages, run.fate, source)
            after_run(writer)
        tables[name] = builder.build()
    return tables


def add_generation(
    chain, spaces, parent=None, *, options=None, after_run=lambda _: None, **fields
) -> Manifest:
    with chain.lock(), chain.begin(parent, page_size=PAGE, options=options) as writer:
        tables = write_spaces(writer, spaces, after_run)
        fields = {"records": {}, "host": {}, "tracker": "full", **fields}
        return writer.commit(spaces=tables, **fields)


def replay(history, number):
    """Return {space: {page: content, or FILE_PAGE}} of one generation.

    `history` is a list, by generation number, of (parent number or None, spaces).
    """
    above, spaces = history[number]
    inherited = {} if above is None else replay(history, above)
    result = {}
    for name, runs in spaces.items():
        pages = result[name] = {}
        for run in runs:
            for n in range(run.n_pages):
                if run.fate == Fate.PARENT:
                    content = inherited[name][run.page + n]
                elif run.fate == Fate.DATA:
                    content = run.content[n * PAGE : (n + 1) * PAGE]
                else:
                    content = bytes(PAGE) if run.fate == Fate.ZERO else FILE_PAGE
                pages[run.page + n] = content
    return result


def pages_by_read(reader, space, pages):
    """Read single pages; a FILE page reads as zeros and is told by its fate."""
    runs = reader.resolve(space)
    result = {}
    for page in pages:
        found = runs.lookup(RemoteAddr(page * PAGE))
        content = reader.read(space, addr_range(page * PAGE, PAGE))
        if found.fate == Fate.FILE:
            assert content == bytes(PAGE)
            content = FILE_PAGE
        result[page] = content
    return result


def pages_by_frames(reader, space):
    """Rebuild a space the way a restore does: fates from the runs, content frame by frame."""
    result = {}
    for run in reader.resolve(space):
        filler = FILE_PAGE if run.fate == Fate.FILE else bytes(PAGE)
        if run.fate == Fate.DATA:
            filler = None
        for n in range(run.n_pages):
            result[run.start // PAGE + n] = filler
    for raw, pieces in reader.iter_data(space):
        for address, offset, len_bytes in pieces:
            for at in range(0, len_bytes, PAGE):
                page = (address + at) // PAGE
                assert result[page] is None, "only DATA pages, and each of them once"
                result[page] = bytes(raw[offset + at : offset + at + PAGE])
    return result


def span(first_page, n_pages):
    return AddrRange(RemoteAddr(first_page * PAGE), RemoteAddr((first_page + n_pages) * PAGE))


def generation(number):
    return GenerationNo(number)
