"""Several trackers on one frozen process, and the memory that they speak of, seen in the same stop.

with Watch(pid, features) as watch:
    watch.look()                    arms them
    ...                             the process runs
    sight = watch.look()            what each says, and what really changed
"""

import os
from collections.abc import Mapping
from typing import Self

import attrs

from ckpt.kernel import ptrace
from ckpt.kernel.features import Features
from ckpt.kernel.procfs import maps
from ckpt.process.arena import arena
from ckpt.process.freezer import freeze
from ckpt.tracker.base import Tracker
from ckpt.tracker.softdirty import SoftDirty
from ckpt.tracker.spans import Own, Spans, join
from ckpt.tracker.writeprotect import WriteProtect, create_inside
from ckpt.units import Pid
from integration.trackers.truth import NOTHING, PAGE

KERNELS_OWN = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]"})


@attrs.frozen
class Report:
    """What one tracker says; sets hold page addresses."""

    clean: frozenset[int]
    beyond: frozenset[int]
    """Pages that it takes for written and that hold what they held."""


@attrs.frozen
class Sight:
    """One stop."""

    content: Mapping[int, bytes]
    """Of every page whose content is the process's own."""
    changed: frozenset[int]
    """Pages with another content than at the stop before; a page that was not there held zeros."""
    reports: Mapping[str, Report]

    def missed(self, tracker: str) -> list[str]:
        """Return the pages that a tracker takes for unchanged and that have changed."""
        return [f"{page:#x}" for page in sorted(self.reports[tracker].clean & self.changed)]


@attrs.define
class Watch:
    """Asks all trackers of this kernel at each stop."""

    pid: Pid
    features: Features
    _writeprotect: WriteProtect | None = None
    _content: Mapping[int, bytes] = attrs.Factory(dict)
    _likely: Spans = attrs.Factory(list)

    def look(self) -> Sight:
        """Stop the process, ask and re-arm the trackers, read its memory, let it go on."""
        with freeze(self.pid, ptrace.Option.NONE) as frozen:
            if self.features.uffd_wp_async and self._writeprotect is None:
                with arena(self.pid, frozen.tgid, frozen.leader) as lent:
                    self._writeprotect = create_inside(self.pid, lent, frozen.leader)
            own = self._own()
            scans = {
                tracker.name: tracker.collect(self.pid, own, self._likely)
                for tracker in self._trackers()
            }
            self._likely = join(span for scan in scans.values() for span in scan.populated)
            content = self._read(self._likely)
        before, self._content = self._content, content
        changed = frozenset(
            page for page in content if content[page] != before.get(page, NOTHING)
        ) | (frozenset(before) - frozenset(content))
        reports = {
            str(name): Report(
                _pages(scan.clean), _pages(scan.populated) - _pages(scan.clean) - changed
            )
            for name, scan in scans.items()
        }
        return Sight(content, changed, reports)

    def _trackers(self) -> list[Tracker]:
        trackers: list[Tracker] = [SoftDirty(self.features)] if self.features.soft_dirty else []
        return trackers + ([self._writeprotect] if self._writeprotect else [])

    def _own(self) -> Own:
        vmas = [
            vma
            for vma in maps.read_maps(self.pid)
            if not vma.shared and vma.path not in KERNELS_OWN
        ]
        of_file, anonymous = (
            join((vma.span.start, vma.span.end) for vma in vmas if bool(vma.inode) is mapped)
            for mapped in (True, False)
        )
        return Own(anonymous, of_file)

    def _read(self, spans: Spans) -> dict[int, bytes]:
        content = {}
        mem = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)
        for start, end in spans:
            raw = os.pread(mem, end - start, start)
            for at in range(start, end, PAGE):
                content[at] = raw[at - start : at - start + PAGE]
        os.close(mem)
        return content

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writeprotect is not None:
            self._writeprotect.close()


def _pages(spans: Spans) -> frozenset[int]:
    return frozenset(page for start, end in spans for page in range(start, end, PAGE))
