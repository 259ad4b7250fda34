"""A restore, from start to end.

verify        structure, digests, and every checksum of what will be used
stand         this host is checked, files are opened, all processes are built (`standing`)
let go        all threads together; until here any failure leaves nothing behind
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import attrs

from ckpt import fault
from ckpt.engine.building import Building, Part, part_at_once
from ckpt.engine.expecting import contents_of, expecting
from ckpt.engine.guard import Lazy
from ckpt.engine.lazy import plan_lazy
from ckpt.engine.lazy_pages import ImagePages
from ckpt.engine.postponing import alone_in_memory
from ckpt.engine.records import ProcessImage, TreeImage, decode_tree
from ckpt.engine.standing import standing
from ckpt.engine.steps import Steps
from ckpt.image.access import Access
from ckpt.image.ahead import Ahead
from ckpt.image.chain import Chain
from ckpt.image.reader import PageReader
from ckpt.image.store import InUse
from ckpt.image.verify import verify_for, verify_frames, verify_sizes
from ckpt.image.workers import count_free_threads
from ckpt.kernel.features import probe_features
from ckpt.resources.base import RestoreOptions
from ckpt.resources.registry import has_own_mounts, mounted, reachable, reachable_instead
from ckpt.units import GenerationNo, Pid


@attrs.frozen
class RestoreResult:
    """What a restore brought back; the process runs."""

    pid: Pid
    """As the caller sees it."""
    generation: GenerationNo
    restore_ms: float
    """From the start of the call until all threads were let go."""
    warnings: tuple[str, ...]


def restore(
    directory: str | Path,
    at: int | None = None,
    options: RestoreOptions | None = None,
    *,
    lazy: bool = False,
    ahead: Ahead | None = None,
    access: Access | None = None,
    announce: Callable[[Pid], None] | None = None,
) -> RestoreResult:
    """Bring a process back from a generation of an image directory (the newest by default).

    It is a child of the caller and runs when this returns. Its next incremental dump into the same
    directory is a delta on that generation. With `lazy` it runs before its memory is there: two
    processes of ours fill it, check each page then, and end when all is there; the next dump is
    full, and refused until then.

    Args:
        directory: of the chain.
        at: the generation.
        options: what the user of a restore may choose.
        lazy: see above.
        ahead: of the same generation, begun before with the same `access`; not with `lazy`.
        access: how the image is read; if not given, only one that nobody else can have written.
        announce: told the pid of the root when all is made; if it raises, or we end in it, nothing
            is let go.

    Raises:
        ImageError: the image is damaged, of a newer format, or has no such generation (`at` is not
            given, and the newest is gone); or others than we and root can write to it.
        RestoreError: this host cannot run it as it was; nothing was left behind.
        HostError: the kernel or the user lacks something.
    """
    started_s = time.monotonic()
    steps = Steps("restore")
    warnings: list[str] = []
    options = options or RestoreOptions()
    options = attrs.evolve(options, warn=warnings.append)
    chain = Chain.open(Path(directory), access or Access())
    with chain.in_use() as use:
        number = chain.require(None if at is None else GenerationNo(at))
        reader, tree, parts = _verify(chain, number, ahead, use if lazy else None)
        fault.reach("restore-verified")
        steps.done("verifying", generation=number, processes=len(tree.processes))
        building = Building(tree, parts, reader, probe_features(), warnings.append)
        if has_own_mounts(tree.root.resources):
            # From there only a relative path leads back here.
            for one in (chain, reader.chain):
                one.stay_reachable(reachable(directory))
            options = reachable_instead(options)
        with mounted(tree.root.resources), contents_of(tree) as contents:
            options = attrs.evolve(options, contents=contents.paths)
            if lazy:
                verify_frames(chain, reader, contents.resolve(reader))
            with (
                steps.held(),
                expecting(tree, building.features, contents, options) as site,
                standing(building, site) as stands,
            ):
                steps.done("building")
                stands.finish()
                stands.arm(chain.chain_id)
                if announce is not None:
                    announce(stands.root)
                fault.reach("restore-announced")
                stands.let_go()
                fault.reach("restore-let-go")
                steps.done("finishing")
    restore_ms = (time.monotonic() - started_s) * 1000
    return RestoreResult(stands.root, number, restore_ms, tuple(warnings))


def _verify(
    chain: Chain, number: GenerationNo, ahead: Ahead | None, lazily: InUse | None
) -> tuple[PageReader, TreeImage, dict[Pid, Part]]:
    """Check what is used before the tree runs; return what is filled then, and what later.

    Args:
        chain: that is read.
        number: of the generation.
        ahead: of the same one, begun before.
        lazily: what keeps the image, for those who fill later; None: all is filled at once.
    """
    path = str(chain.manifest_path(number))
    n_threads = count_free_threads()
    if lazily is not None:
        reader = PageReader(chain, number, threads=n_threads)
        tree = decode_tree(reader.manifest, path)
        image = f"generation {number} of {chain.path}"
        alone = alone_in_memory(tree)
        parts = {
            one.pid: _plan_lazy(one, reader, image, lazily)
            if one.pid in alone
            else part_at_once(one, reader)
            for one in tree.processes
        }
        verify_sizes(chain, number)
        verify_frames(chain, reader, [part.at_once for part in parts.values()], threads=n_threads)
        return reader, tree, parts
    if ahead is not None:
        tree = decode_tree(ahead.reader.manifest, path)
        reader = ahead.finish()
    else:
        reader = verify_for(chain, number, threads=n_threads)
        tree = decode_tree(reader.manifest, path)
    parts = {one.pid: part_at_once(one, reader) for one in tree.processes}
    return reader, tree, parts


def _plan_lazy(process: ProcessImage, reader: PageReader, image: str, use: InUse) -> Part:
    runs = reader.resolve(process.space)
    spans, others = plan_lazy(process.resources["memory"].vmas, runs)
    if not spans:
        return Part(process, runs.clip(others))
    pages = ImagePages(reader, runs.clip(spans), image, use)
    return Part(process, runs.clip(others), Lazy(pages, spans))


def wait_for_end(pid: Pid) -> int:
    """Wait for a restored process; return its exit status as a shell does (128 + signal)."""
    forwarded = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _forward_to(pid)) for number in forwarded}
    # A terminal sends SIGINT and SIGQUIT to the restored process itself: it decides.
    before |= {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGQUIT)}
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code


def _forward_to(pid: Pid) -> Callable[[int, object], None]:
    def forward(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    return forward
