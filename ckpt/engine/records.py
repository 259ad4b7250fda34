"""Records to and from the plain values of a manifest, by cattrs, strictly.

The manifest's `records` hold one entry per process, the root first, each behind its parent:

    {"processes": [{"pid": 7, "place": {...}, "stopped_by": 0, "resources": {NAME: {...}},
                    "threads": [{"tid": 7, "resources": {NAME: {...}}}]},
                   {"pid": 8, ..., "shares": {"files": 7}, ...}],
     "zombies": [{"pid": 9, "place": {...}, "wait_status": 256, "comm": "sh"}]}

A process that `shares` an object has no resources that are about it: they are the other's.

Nothing in an image is trusted: a field of a wrong type is `ImageCorrupt`, an unknown field is one
of a newer minor version and is left alone.
"""

from collections.abc import Mapping
from typing import Any

import attrs

from ckpt.errors import ImageCorrupt, ImageSealed
from ckpt.image.format import Manifest
from ckpt.process.clones import OWN, Shares
from ckpt.resources.base import Resource
from ckpt.resources.plain import strict, structure, unstructure
from ckpt.resources.registry import PROCESS, THREAD
from ckpt.units import Pid, Tid


@attrs.frozen(repr=False)
class ThreadImage:
    """One thread of an image."""

    tid: Tid
    resources: Mapping[str, Any]
    """Resource name -> its record."""


@attrs.frozen(repr=False)
class Place:
    """Where a process stands among the others."""

    parent: Pid
    """0: of the root, whose parent is nobody of the image."""
    session: Pid
    group: Pid
    """`OUTER_GROUP` of who is not the root, and in a group that a process outside leads."""
    exit_signal: int
    """What its parent is sent when it ends; 0: nothing."""


OUTER_GROUP = Pid(0)


@attrs.frozen(repr=False)
class EndedLeader:
    """The first thread of a process that goes on without it: a zombie until the last one ends."""

    wait_status: int
    """What the process will have ended with, as wait(2) has it, if nothing else ends it."""
    comm: str


@attrs.frozen(repr=False)
class ProcessImage:
    """One process of an image."""

    pid: Pid
    place: Place
    stopped_by: int
    """The stop signal of its group-stop, 0 if it was running."""
    resources: Mapping[str, Any]
    """Those included that are about what it has of another one."""
    threads: tuple[ThreadImage, ...]
    shares: Shares = OWN
    ended_leader: EndedLeader | None = None
    """Its first thread has ended, and is none of `threads`."""

    def owns(self, resource: Resource[Any]) -> bool:
        """Tell whether what a resource is about is its own, and not another's."""
        return not self.shares.of(resource.common)

    @property
    def has_memory(self) -> bool:
        """Tell whether its memory is its own, and not another's."""
        return not self.shares.memory

    @property
    def space(self) -> str:
        """The name of the page space of its memory, of whom ever it has that."""
        return space_name(self.shares.memory or self.pid)


@attrs.frozen(repr=False)
class ZombieImage:
    """A process that has ended, for which its parent has not waited yet."""

    pid: Pid
    place: Place
    wait_status: int
    """What the parent will be told, as wait(2) has it."""
    comm: str


@attrs.frozen(repr=False)
class TreeImage:
    """All processes of an image."""

    processes: tuple[ProcessImage, ...]
    """The root first, each behind its parent."""
    zombies: tuple[ZombieImage, ...] = ()

    @property
    def root(self) -> ProcessImage:
        """The one that all others descend from."""
        return self.processes[0]


def space_name(pid: Pid) -> str:
    """Return the name of the page space of a process's memory."""
    return f"mm-{pid}"


def encode_tree(tree: TreeImage) -> dict[str, object]:
    """Return the manifest's `records` for these processes."""
    return {
        "processes": [
            {
                "pid": process.pid,
                "place": unstructure(process.place),
                "stopped_by": process.stopped_by,
                **_encode_shares(process.shares),
                **({"ended_leader": unstructure(ended)} if (ended := process.ended_leader) else {}),
                "resources": {
                    one.name: unstructure(process.resources[one.name])
                    for one in PROCESS
                    if process.owns(one)
                },
                "threads": [
                    {
                        "tid": thread.tid,
                        "resources": {k: unstructure(v) for k, v in thread.resources.items()},
                    }
                    for thread in process.threads
                ],
            }
            for process in tree.processes
        ],
        "zombies": [unstructure(zombie) for zombie in tree.zombies],
    }


def _encode_shares(shares: Shares) -> dict[str, object]:
    owners = {common.value: int(owner) for common, owner in shares.items()}
    return {"shares": owners} if owners else {}


def decode_tree(manifest: Manifest, path: str) -> TreeImage:
    """Return the processes of a generation.

    Args:
        manifest: of the generation.
        path: of the manifest, for the message.

    Raises:
        ImageCorrupt: a record does not have the shape that it must have.
        ImageSealed: it is encrypted, and no private key for it was given.
    """
    try:
        tree = TreeImage(
            _decode_processes(_list(manifest.records, "processes")),
            tuple(structure(raw, ZombieImage) for raw in _list(manifest.records, "zombies")),
        )
        _check_relations(tree)
    except ImageSealed:
        raise
    except Exception as error:  # cattrs raises groups of whatever went wrong
        reason = f"its records are not as they must be ({_explain(error)})"
        raise ImageCorrupt(path, reason) from error
    return tree


def _check_relations(tree: TreeImage) -> None:
    if not tree.processes:
        raise ValueError("it holds no process")
    known: set[int] = set()
    for process in tree.processes:
        if process.place.parent not in known and known:
            raise ValueError(f"the parent of process {process.pid} does not come before it")
        tids = {int(process.pid), *(int(thread.tid) for thread in process.threads)}
        if tids & known:
            raise ValueError(f"process {process.pid} has a number that another one has")
        known |= tids
    pids = {int(process.pid) for process in tree.processes}
    for zombie in tree.zombies:
        if zombie.place.parent not in pids or zombie.pid in known:
            raise ValueError(f"the ended process {zombie.pid} cannot be")
        known.add(zombie.pid)


def _explain(error: BaseException) -> str:
    """Return the first thing that is wrong, behind the way to it: `memory.vmas.1.prot: ...`.

    cattrs nests groups, and notes on each exception the field or the index that it is about.
    """
    way: list[str] = []
    while True:
        # The outer ones were added later.
        for note in reversed(getattr(error, "__notes__", [])):
            way.append(note if type(note) is str else str(getattr(note, "name", note.index)))
        if not isinstance(error, BaseExceptionGroup):
            break
        error = error.exceptions[0]
    what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return ": ".join(filter(None, (".".join(way), what)))


def _list(raw: Mapping[str, Any], key: str) -> list[Any]:
    return strict(raw[key], list)


def _decode_processes(raws: list[Any]) -> tuple[ProcessImage, ...]:
    decoded: dict[Pid, ProcessImage] = {}
    for raw in raws:
        process = _decode_process(raw, decoded)
        decoded[process.pid] = process
    return tuple(decoded.values())


def _decode_process(raw: dict[str, Any], before: Mapping[Pid, ProcessImage]) -> ProcessImage:
    pid = Pid(strict(raw["pid"], int))
    shares = structure(strict(raw.get("shares", {}), dict), Shares)
    if pid in before:
        raise ValueError(f"there are two processes {pid}")
    own = tuple(one for one in PROCESS if not shares.of(one.common))
    resources = _decode_resources(raw["resources"], own)
    process = ProcessImage(
        pid=pid,
        place=structure(strict(raw["place"], dict), Place),
        stopped_by=strict(raw["stopped_by"], int),
        resources=with_shared(resources, shares, before),
        shares=shares,
        threads=tuple(
            ThreadImage(
                Tid(strict(thread["tid"], int)), _decode_resources(thread["resources"], THREAD)
            )
            for thread in _list(raw, "threads")
        ),
        ended_leader=structure(strict(raw["ended_leader"], dict), EndedLeader)
        if "ended_leader" in raw
        else None,
    )
    _check_ids(process)
    return process


def with_shared(
    own: Mapping[str, Any], shares: Shares, before: Mapping[Pid, ProcessImage]
) -> dict[str, Any]:
    """Return the resources of a process, with what it has of processes before it.

    Raises:
        ValueError: somebody has nothing of his own that it could have.
    """
    for common, owner in shares.items():
        if owner not in before or before[owner].shares.of(common):
            raise ValueError(f"process {owner} has no {common.value} that another could share")
    owners = {one.name: shares.of(one.common) for one in PROCESS}
    return {
        name: before[owner].resources[name] if owner else own[name]
        for name, owner in owners.items()
    }


def _check_ids(process: ProcessImage) -> None:
    pid, tids = process.pid, [thread.tid for thread in process.threads]
    if (Tid(pid) in tids) == (process.ended_leader is not None) or not tids:
        raise ValueError(f"process {pid} has no thread of this number, or one that has ended")
    if len(set(tids)) < len(tids) or min(tids) < 1:
        raise ValueError("the numbers of its threads cannot be")


def _decode_resources(raw: dict[str, Any], resources: tuple[Resource[Any], ...]) -> dict[str, Any]:
    records: dict[str, Any] = {}
    for resource in resources:
        try:
            records[resource.name] = structure(strict(raw[resource.name], dict), resource.record)
        except Exception as error:
            error.add_note(resource.name)
            raise
    return records
