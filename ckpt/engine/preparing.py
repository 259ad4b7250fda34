"""What a restore does before the first process exists: checking this host, opening files.

Everything that is wrong is named together. Files are opened here, once each, and inherited by all
processes: so what was shared is shared again.
"""

import contextlib
import os
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import attrs

from ckpt.engine.family import family_of
from ckpt.engine.home import wants_own_numbers
from ckpt.engine.hooks import run_hook, run_return
from ckpt.engine.records import ProcessImage, TreeImage
from ckpt.errors import FeatureMissing, FileChanged, HostMismatch
from ckpt.kernel.features import Features
from ckpt.process.holder import taken
from ckpt.resources.base import Opened, Opening, Resource, RestoreOptions, run_all
from ckpt.resources.registry import PROCESS, THREAD
from ckpt.units import Pid, RemoteFd, Tid


def _iter_records(process: ProcessImage) -> Iterator[tuple[Resource[Any], Any]]:
    for resource in filter(process.owns, PROCESS):
        yield resource, process.resources[resource.name]
    for thread in process.threads:
        for resource in THREAD:
            yield resource, thread.resources[resource.name]


def check_host(
    tree: TreeImage, features: Features, options: RestoreOptions, ours: Collection[Pid] = ()
) -> None:
    """Refuse a host on which the tree would not be what it was; all findings together.

    Args:
        tree: that is to be restored.
        features: of this kernel.
        options: of the restore.
        ours: processes of it that are made already.

    Raises:
        FeatureMissing: no process could have its number.
        PidTaken: the number of a process, a thread or a group is in use.
        HostMismatch: this host lacks something.
        FileChanged: files are missing, or not what they were.
    """
    if not features.set_tid and "sys_admin" in features.capabilities:
        raise FeatureMissing(
            "clone3 with a number to choose (Linux 5.5)", "use a newer or more complete kernel"
        )
    for number in () if wants_own_numbers(tree, options) else _iter_numbers(tree):
        if number not in ours and os.path.exists(f"/proc/{number}"):
            raise taken(Tid(number))
    # Threads and processes have many in common.
    host = dict.fromkeys(
        finding
        for process in tree.processes
        for resource, record in _iter_records(process)
        for finding in resource.check_host(record, features)
    )
    if options.addresses_come:
        host = {finding: None for finding in host if not finding.wants_address}
    if host:
        raise HostMismatch(tuple(host))
    files = dict.fromkeys(
        finding
        for process in tree.processes
        for resource, record in _iter_records(process)
        for finding in resource.check_files(record, _options_for(process, tree, options))
    )
    if options.addresses_come:
        files = {finding: None for finding in files if not finding.wants_address}
    if files:
        raise FileChanged(tuple(files))


def _iter_numbers(tree: TreeImage) -> Iterator[int]:
    for process in tree.processes:
        # A first thread that has ended keeps its number. The process comes first: who still runs is
        # named by that, not by one of its threads.
        yield from dict.fromkeys((int(process.pid), *(int(one.tid) for one in process.threads)))
    yield from (int(zombie.pid) for zombie in tree.zombies)
    yield from map(int, family_of(tree).groups_without_leader())


def _options_for(process: ProcessImage, tree: TreeImage, options: RestoreOptions) -> RestoreOptions:
    """Return the options as they hold for one process: `--inherit` names those of the root."""
    return options if process is tree.root else attrs.evolve(options, inherit={})


@attrs.define(repr=False)
class Files:
    """What the restorer has opened for the tree to inherit."""

    by_key: dict[tuple[Pid, str], Opened] = attrs.Factory(dict)
    """By the process that asked for it, and its key there."""
    at_last: list[Callable[[], None]] = attrs.Factory(list)
    """What several descriptors have in common is finished once, see `Opening.at_last`."""
    at_go: list[Callable[[], None]] = attrs.Factory(list)
    """See `Opening.at_go`."""

    def of_each(
        self, numbers: Mapping[tuple[Pid, str], RemoteFd]
    ) -> Callable[[Pid], Mapping[str, RemoteFd]]:
        """Return what tells of a process what it finds: its own, and what is shared.

        Args:
            numbers: under which number each is inherited.
        """
        own: dict[Pid, dict[str, RemoteFd]] = {}
        shared: dict[str, RemoteFd] = {}
        for (owner, key), one in self.by_key.items():
            (shared if one.shared else own.setdefault(owner, {}))[key] = numbers[owner, key]
        # One dictionary of what is shared for all, however many they are.
        return lambda pid: ChainMap(own.get(pid, {}), shared)

    def run_at_last(self) -> None:
        """Finish what had to wait until everything else is built."""
        for one in self.by_key.values():
            if one.at_last is not None:
                one.at_last()
        # What was held first is let go last: the packets of connections.
        run_all(reversed(self.at_last))


def _if_it_fails(hooks: list[Callable[[], None]]) -> Callable[..., None]:
    """Return an exit of a context that calls the hooks if the block has raised."""

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            run_all(hooks)

    return leave


@contextlib.contextmanager
def arriving(tree: TreeImage, options: RestoreOptions) -> Iterator[Opening]:
    """Keep from answering for the tree while it is not there, then let its addresses come.

    Raises:
        HookFailed: the command of `--on-arrival` did not do its work.
        FeatureMissing, NotPermitted: the network cannot be held here.
    """
    with contextlib.ExitStack() as stack:
        opening = Opening(options, stack.enter_context(contextlib.ExitStack()))
        stack.callback(run_all, opening.at_end)
        stack.push(_if_it_fails(opening.at_failure))
        for process in tree.processes:
            for resource, record in _iter_records(process):
                resource.expect(record, opening)
        outcome = "nothing was restored"
        undo = partial(run_return, options.on_return, options.warn, tree.root.pid)
        stack.push(_if_it_fails([undo]))
        run_hook("--on-arrival", options.on_arrival, outcome, CKPT_PID=tree.root.pid)
        yield opening


@contextlib.contextmanager
def opened(tree: TreeImage, opening: Opening) -> Iterator[Files]:
    """Open everything that the embryos inherit; ours are closed again on the way out.

    Raises:
        RestoreFailed: something cannot be opened.
    """
    files = Files(at_last=opening.at_last, at_go=opening.at_go)
    options = opening.options
    with contextlib.ExitStack() as stack:
        with opening.stack:
            for process in tree.processes:
                opening.options = _options_for(process, tree, options)
                for resource, record in _iter_records(process):
                    for key, one in resource.prepare(record, opening).items():
                        stack.callback(os.close, one.fd)
                        files.by_key[process.pid, key] = one
        yield files
