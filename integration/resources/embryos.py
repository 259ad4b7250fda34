"""One resource alone: captured from a frozen child, restored into an empty process."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import attrs

from ckpt.kernel import ptrace
from ckpt.kernel.features import Features, probe_features
from ckpt.process.arena import ARENA_SIZE, arena
from ckpt.process.freezer import freeze
from ckpt.process.seed import Embryo, plant
from ckpt.resources.base import Later, Rebuilt, Resource, Stopped, Target
from ckpt.units import Pid, addr_range

FEATURES = probe_features()
_ARENA_AT = addr_range(0x3800_0000_0000, ARENA_SIZE)


def look(resource: Resource[Any], pid: int) -> list[str]:
    """Return what the resource says of a process before it is touched."""
    target = Target(Pid(pid), FEATURES)
    found = [str(finding) for finding in resource.look(target)]
    target.tree.forget()
    return found


def capture(resource: Resource[Any], pid: int) -> Any:
    """Freeze a process, capture one resource of it (of its first thread), thaw."""
    with (
        freeze(Pid(pid), ptrace.Option.NONE) as frozen,
        arena(Pid(pid), frozen.tgid, frozen.leader) as lent,
    ):
        capturing = resource.capture(Stopped(frozen, frozen.leader, FEATURES, {}))
        calls = next(capturing)
        while True:
            try:
                calls = capturing.send(lent.run(frozen.leader, calls) if calls else [])
            except StopIteration as stop:
                return _built(stop.value)


@contextlib.contextmanager
def embryo() -> Iterator[Embryo]:
    """Lend an empty process; killed at the end."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)  # so that the number is free
    try:
        with plant(Pid(pid), {}, None, _ARENA_AT) as planted:
            yield planted.root
            raise _Done
    except _Done:
        pass


class _Done(Exception):
    """Makes `plant` end what it has made."""


def restore(
    resource: Resource[Any], record: object, into: Embryo, features: Features = FEATURES
) -> list[str]:
    """Restore one resource; return the warnings."""
    warnings: list[str] = []
    rebuilt = Rebuilt(
        embryo=into,
        task=into.leader,
        features=features,
        inherited={},
        fill=lambda _keep: None,
        warn=warnings.append,
    )
    restoring = resource.restore(record, rebuilt)
    with contextlib.suppress(StopIteration):
        calls = next(restoring)
        while True:
            calls = restoring.send(into.run(calls) if calls else [])
    return warnings


def _built(captured: Any) -> Any:
    """Return the record, of which the engine would build a part after the thaw."""
    return captured.build() if isinstance(captured, Later) else captured


def recapture(resource: Resource[Any], of: Embryo) -> Any:
    """Capture one resource of an embryo."""

    @attrs.frozen
    class FrozenEmbryo:
        pid: Pid
        leader: Any
        sleeps: dict[Any, Any] = attrs.field(factory=dict)
        texts: dict[str, bytes] = attrs.field(factory=dict)

    stopped: Any = Stopped(
        FrozenEmbryo(of.pid, of.leader),  # type: ignore[arg-type]
        of.leader,
        FEATURES,
        {},
    )
    capturing = resource.capture(stopped)
    calls = next(capturing)
    while True:
        try:
            calls = capturing.send(of.run(calls) if calls else [])
        except StopIteration as stop:
            return _built(stop.value)
