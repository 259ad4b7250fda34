"""Places that a command line names: directories, and URLs of object storage.

What speaks to a store is imported only for a URL. A restore has it fetched by a child: it wants to
be a process of one thread, which the packages of the stores are not.
"""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from ckpt import errors
from ckpt.cli.output import ReportProgress, progress
from ckpt.errors import CkptError, ImageUntrusted, UsageError
from ckpt.image.access import Access
from ckpt.image.chain import Chain
from ckpt.image.objects import WHOSE, is_url, open_objects, parse_place
from ckpt.units import GenerationNo

if TYPE_CHECKING:
    from ckpt.image.copying import CopyResult

_EXIT_BUG = 70


def open_image(place: str, access: Access) -> Chain:
    """Open a chain to look at it, wherever it is.

    Raises:
        ImageError: see `Chain.open`.
        UsageError, ConnectFailed, NotPermitted: of a URL.
    """
    parsed = parse_place(place)
    if isinstance(parsed, Path):
        return Chain.open(parsed, access)
    from ckpt.image.remote import open_remote

    return open_remote(open_objects(parsed), access)


def copy(
    source: str, target: str, number: GenerationNo | None, report: ReportProgress
) -> "CopyResult":
    """Copy a chain, or the lineage of one generation, from one place to the other.

    Raises:
        UsageError: both are in object storage; or a URL is none.
        CkptError: see `sending.send` and `fetching.fetch`.
    """
    there = parse_place(target)
    if isinstance(there, Path):
        from ckpt.image.fetching import fetch

        return fetch(open_image(source, Access(trusts_anybody=True)), there, number, report)
    here = parse_place(source)
    if not isinstance(here, Path):
        raise UsageError("from object storage to object storage: give a directory in between")
    from ckpt.image.sending import send

    return send(Chain.open(here), open_objects(there), number, report)


@attrs.frozen
class Fetched:
    """What a restore is to restore."""

    image_dir: str
    at: int | None


@contextlib.contextmanager
def local_image(
    place: str, at: int | None, keep_in: str | None, *, trusts_anybody: bool
) -> Iterator[Fetched]:
    """Lend a directory that has what is to be restored; one that was made for it is removed.

    Raises:
        ImageUntrusted: it would have to be fetched, and nobody was said to be trusted.
        UsageError: `keep_in` is given, and nothing is fetched; or the URL is none.
        CkptError: see `fetching.fetch`.
    """
    parsed = parse_place(place)
    if isinstance(parsed, Path):
        if keep_in is not None:
            raise UsageError("--image-dir is for what is fetched from a URL")
        yield Fetched(str(parsed) if is_url(place) else place, at)
        return
    if not trusts_anybody:
        raise ImageUntrusted(parsed, WHOSE)
    from ckpt.cli.scratch import private_directory

    with contextlib.ExitStack() as stack:
        directory = keep_in or os.path.join(stack.enter_context(private_directory()), "image")
        number = None if at is None else GenerationNo(at)
        yield Fetched(directory, _fetch_in_child(parsed, number, directory))


def _fetch_in_child(url: str, number: GenerationNo | None, directory: str) -> int:
    """Have a child fetch a lineage; return the generation that it leads to.

    What it raises is raised here; what it wrote stays, as after a kill.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if not child:
        code = _EXIT_BUG
        try:
            os.close(reading)
            code = _be_child(parent, writing, partial(_fetch, url, number, directory))
        finally:
            os._exit(code)
    os.close(writing)
    try:
        with open(reading, "rb") as answer:
            raw = answer.read()
    finally:
        # It has said all, or we are interrupted: what it has written is good for the next time.
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not raw:
        raise RuntimeError("the process that fetches has ended without a word")
    said = json.loads(raw)
    if "error" in said:
        raise getattr(errors, said["error"])(**said["fields"])
    generation: int = said["generation"]
    return generation


def _be_child(parent: int, writing: int, work: Callable[[], int]) -> int:
    import traceback

    from ckpt.kernel.prctl import Prctl, prctl

    prctl(Prctl.SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return _EXIT_BUG
    try:
        said: dict[str, object] = {"generation": work()}
    except CkptError as error:
        kind = type(error)
        names = [field.name for field in attrs.fields(kind)] if attrs.has(kind) else []
        fields = {name: getattr(error, name) for name in names}
        said = {"error": kind.__name__, "fields": fields}
    except Exception:
        traceback.print_exc()
        return _EXIT_BUG
    with open(writing, "wb") as answer:
        answer.write(json.dumps(said).encode())
    return 0


def _fetch(url: str, number: GenerationNo | None, directory: str) -> int:
    from ckpt.image.fetching import fetch
    from ckpt.image.remote import open_remote

    chain = open_remote(open_objects(url))
    wanted = chain.require(number)
    with progress() as report:
        fetch(chain, directory, wanted, report)
    return wanted
