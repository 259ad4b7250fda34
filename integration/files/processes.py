"""A process that has opened what a test wants, its capture, and its rebuilt self.

with opened_by(prepare) as child:          a fork of ours, stopped by itself once prepared
    record = capture(child)
with rebuilt(record) as embryo:            same pid, same descriptors, still without memory
    embryo.run([call(NR.read, 3, Out(5))])
"""

import contextlib
import fcntl
import os
import signal
import traceback
from collections.abc import Iterator

import attrs
import cattrs

from ckpt.engine.layout import number_inherited
from ckpt.image.codec import pack, unpack
from ckpt.kernel import ptrace
from ckpt.kernel.arch import NR
from ckpt.kernel.features import probe_features
from ckpt.process.arena import ARENA_SIZE, arena
from ckpt.process.freezer import freeze
from ckpt.process.remote import Call, In, Out, Reply, call
from ckpt.process.seed import Embryo, plant
from ckpt.resources.base import (
    CaptureOptions,
    Opening,
    Rebuilt,
    Resource,
    RestoreOptions,
    Stopped,
    Target,
    Tree,
    run_all,
)
from ckpt.resources.files.table import FILES, FilesRecord
from ckpt.resources.plain import structure
from ckpt.units import Pid, addr_range

FEATURES = probe_features()
ARENA_AT = addr_range(0x7000_0000_0000 // 2, ARENA_SIZE)
_converter = cattrs.Converter(unstruct_collection_overrides={tuple: list})


def nothing() -> None:
    """Prepare nothing."""


@contextlib.contextmanager
def opened_by(prepare=nothing, *, fds=None) -> Iterator[Pid]:
    """Fork a child with `prepare` run in it; it then stops itself.

    It has /dev/null for standard streams and nothing else, but what `fds` names: number there ->
    descriptor here. What it opens itself starts at 3.
    """
    pid = os.fork()
    if pid == 0:
        _be_child(prepare, fds or {})
    try:
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the child ended with {status}"
        yield Pid(pid)
    finally:
        end(pid)


_ABOVE = 900


def _be_child(prepare, fds) -> None:
    error = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
    try:
        moved = {there: fcntl.fcntl(here, fcntl.F_DUPFD, _ABOVE) for there, here in fds.items()}
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.closerange(3, _ABOVE)
        for there, here in moved.items():
            os.dup2(here, there)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd >= _ABOVE and fd != error:
                with contextlib.suppress(OSError):  # that of the listing itself
                    os.close(fd)
        prepared = prepare()
        os.close(error)
        os.kill(os.getpid(), signal.SIGSTOP)
        del prepared
        os._exit(0)
    except BaseException:
        os.write(error, traceback.format_exc().encode())
    finally:
        os._exit(1)


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _target(pid: Pid, external) -> Target:
    return Target(pid, FEATURES, tree=Tree((pid,), CaptureOptions(external=external)))


def look(pid: Pid, resource: Resource = FILES, *, external=()) -> list[str]:
    target = _target(pid, external)
    found = [str(finding) for finding in resource.look(target)]
    target.tree.forget()
    return found


def capture(pid: Pid, resource: Resource = FILES, *, meanwhile=nothing, external=()):
    """Look, freeze, capture; the record has been through an image's encoding.

    `meanwhile` runs between look and freeze.
    """
    target = _target(pid, external)
    assert [str(finding) for finding in resource.look(target)] == []
    meanwhile()
    with (
        freeze(pid, ptrace.Option.NONE) as frozen,
        arena(pid, frozen.tgid, frozen.leader) as lent,
    ):
        stopped = Stopped(frozen, frozen.leader, FEATURES, target.notes, target.tree)
        try:
            record = _drive(resource.capture(stopped), lambda calls: lent.run(frozen.leader, calls))
        finally:
            _let_go(target.tree)
    return encoded(resource.complete(record))


def _let_go(tree: Tree) -> None:
    run_all(tree.at_thaw)
    run_all(tree.at_end)
    tree.forget()


def _drive(steps, run):
    """Run a generator of calls to its end; return what it returns."""
    try:
        calls = next(steps)
        while True:
            calls = steps.send(run(calls) if calls else [])
    except StopIteration as stop:
        return stop.value


def encoded(record):
    """Return the record as a restore gets it from an image."""
    return structure(unpack(pack(_converter.unstructure(record))), type(record))


@attrs.define
class Built:
    """A rebuilt process: the embryo, and what was said while it was built."""

    embryo: Embryo
    warnings: list[str]

    @property
    def pid(self) -> Pid:
        return self.embryo.pid

    def run(self, calls: list[Call]) -> list[Reply]:
        return self.embryo.run(calls)

    def restore(self, resource: Resource, record) -> None:
        rebuilt = Rebuilt(
            embryo=self.embryo,
            task=self.embryo.leader,
            features=FEATURES,
            inherited={},
            fill=lambda _keep: None,
            warn=self.warnings.append,
        )
        _drive(resource.restore(record, rebuilt), self.run)

    def capture(self, resource: Resource = FILES):
        """Capture it as if it were a target: it stands still."""
        target = Target(self.pid, FEATURES)
        assert [str(finding) for finding in resource.look(target)] == []
        stopped = attrs.evolve(
            _STOPPED, frozen=self, task=self.embryo.leader, notes=target.notes, tree=target.tree
        )
        try:
            record = _drive(resource.capture(stopped), self.run)
        finally:
            _let_go(target.tree)
        return encoded(resource.complete(record))

    def read(self, fd: int, n_bytes: int) -> bytes:
        """Read from a descriptor; what it says if that fails."""
        (reply,) = self.run([call(NR.read, fd, Out(n_bytes), n_bytes)])
        if not reply.ok:
            raise OSError(reply.error, os.strerror(reply.error))
        return reply.outs[0][: reply.value]

    def write(self, fd: int, data: bytes) -> int:
        (reply,) = self.run([call(NR.write, fd, In(data), len(data))])
        if not reply.ok:
            raise OSError(reply.error, os.strerror(reply.error))
        return reply.value


_STOPPED = Stopped(None, None, FEATURES, {}, Tree(()))


@contextlib.contextmanager
def rebuilt(record: FilesRecord, pid: Pid, **options) -> Iterator[Built]:
    """Make a process with number `pid` (free by now) and the descriptors of the record."""
    warnings: list[str] = []
    chosen = RestoreOptions(warn=warnings.append, **options)
    assert [str(finding) for finding in FILES.check_host(record, FEATURES)] == []
    assert [str(finding) for finding in FILES.check_files(record, chosen)] == []
    with contextlib.ExitStack() as stack:
        opening = Opening(chosen, stack)
        opened = FILES.prepare(record, opening)
    fds, inherited = number_inherited(opened, record.highest_fd)
    try:
        with plant(pid, fds, None, ARENA_AT) as nursery:
            embryo = nursery.root
            for one in opened.values():
                os.close(one.fd)
            rebuilding = Rebuilt(
                embryo=embryo,
                task=embryo.leader,
                features=FEATURES,
                inherited=inherited,
                fill=lambda _keep: None,
                warn=warnings.append,
            )
            _drive(FILES.restore(record, rebuilding), embryo.run)
            run_all([*opening.at_last, *opening.at_go])
            yield Built(embryo, warnings)
    finally:
        end(pid)
        run_all(opening.at_end)


@contextlib.contextmanager
def brought_back(prepare=nothing, *, fds=None, meanwhile=None, **options):
    """Capture a child, kill it, rebuild it; yield what was captured and what was built."""
    with opened_by(prepare, fds=fds) as pid:
        record = capture(pid)
    if meanwhile:
        meanwhile()
    with rebuilt(record, pid, **options) as built:
        yield record, built
