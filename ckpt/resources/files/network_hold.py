"""The network around TCP connections is held still, so that no peer hears of a dump or a restore.

    dump              freeze ──── read ──── thaw                        table lives in this process
    dump with kill    freeze ──── read ──── commit ── `keep` ── kill    `keep` makes one that stays
    to leave          freeze ──── read ──── commit, hook ────── kill    none: the address is gone
    restore           hold ── hook ── open sockets ── build ── let go   both are removed at its end

A host without a socket for a packet answers with a reset, and a peer that hears it is lost. So the
packets of exactly these connections are dropped (`kernel/nftables`) from before the first byte of
a queue is read until the restored sockets stand; to a peer the way is cut for so long, and it sends
again. The table of a dump belongs to this process and vanishes with it; only that of a dump with
`kill` outlives it: its name is in the record of each connection, and the restore removes it.
"""

import contextlib
import os
from _socket import SOCK_DGRAM, inet_ntop
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Callable, Iterable

import attrs

from ckpt.kernel import nftables
from ckpt.kernel.nftables import Flow, OwnedTable
from ckpt.kernel.pidfd import pidfd_getfd, pidfd_open
from ckpt.kernel.tcp_repair import end_silence, silence
from ckpt.resources.base import Opening, Tree
from ckpt.resources.files.network_space import beside
from ckpt.units import Fd, Pid, RemoteFd

_NAME = "network"
_NOTED = "connections"
_PREFIX = "ckpt_"
_RANDOM_BYTES = 8


@attrs.define(slots=True, eq=False, repr=False)
class DumpHold:
    """What a dump holds of the network."""

    name: str
    """Of the table that `keep` makes; "" for none."""
    _pid: Pid
    """A process in the network namespace of the connections."""
    _owned: OwnedTable
    _flows: dict[Flow, tuple[Pid, RemoteFd]] = attrs.field(factory=dict)
    """Each connection, and a descriptor of it in the tree."""
    _silenced: list[tuple[Fd, int]] = attrs.field(factory=list)
    """What `keep` has silenced, and what `end_silence` wants of it."""

    def hold(self, flow: Flow, owner: tuple[Pid, RemoteFd]) -> None:
        """Let no packet of a connection through from here on."""
        if flow not in self._flows:
            self._owned.add([flow])
            self._flows[flow] = owner

    def expect(self, flows: Iterable[Flow]) -> None:
        """Hold what most likely will be asked for, one by one: at once it costs a tenth."""
        self._owned.add(flows)

    def let_go(self) -> None:
        """Let all packets through; nothing of ours is left."""
        self._owned.let_through()

    def close(self) -> None:
        """Remove the table: not while anybody stands still for it, it takes 10 ms."""
        while self._silenced:
            os.close(self._silenced.pop()[0])
        self._owned.close()

    def keep(self) -> None:
        """Let the sockets end without a word, and hold on when this process has ended.

        Where the addresses have left this host, there is nothing to hold on to.

        State: the tree is frozen, and will be killed at once.

        Raises:
            CkptError, OSError: nothing was made, no socket was touched.
        """
        if self.name:
            with beside(self._pid):
                nftables.make_table(self.name, list(self._flows))
        try:
            for pid, fd in self._flows.values():
                ours = _duplicate_of(pid, fd)
                self._silenced.append((ours, silence(ours)))
        except BaseException:
            self.spare()
            raise

    def spare(self) -> None:
        """Take `keep` back: the connections go on here."""
        for ours, reuse_address in self._silenced:
            end_silence(ours, reuse_address)
        if self.name:
            with beside(self._pid):
                nftables.remove_table(self.name)

    def leave(self) -> str:
        """Remove the table once the connections are another host's, and so are their addresses.

        Returns:
            What the user must know: as long as an address is still ours, our packets would end
            what the tree goes on with elsewhere.
        """
        if not self.name:
            return ""
        here = sorted({text for flow in self._flows if (text := _local_address(flow))})
        if not here:
            nftables.remove_table(self.name)
            return ""
        return (
            f"packets of {len(self._flows)} connections are dropped here until {', '.join(here)} is"
            f" gone from this host and 'nft delete table inet {self.name}' was called"
        )


def _local_address(flow: Flow) -> str:
    """Return the address of our end, if this host has it; else an empty text."""
    with contextlib.closing(Socket(flow.family, SOCK_DGRAM)) as probe:
        address = inet_ntop(flow.family, flow.local)
        try:
            probe.bind((address, 0))
        except OSError:
            return ""
    return address


def _duplicate_of(pid: Pid, fd: RemoteFd) -> Fd:
    pidfd = pidfd_open(pid)
    try:
        return pidfd_getfd(pidfd, fd, pid=pid)
    finally:
        os.close(pidfd)


def note_connection(tree: Tree, flow: Flow) -> None:
    """Note a connection of the running tree, so that all can be held by one request."""
    tree.notes.setdefault(_NOTED, {})[flow] = None


def dump_hold(tree: Tree) -> DumpHold:
    """Return what this capture of the tree holds; made at the first call, let go at the thaw.

    State: the tree is frozen.

    Raises:
        FeatureMissing, NotPermitted: the network cannot be held here.
    """
    known: DumpHold | None = tree.notes.get(_NAME)
    if known is not None:
        return known
    name = _PREFIX + os.urandom(_RANDOM_BYTES).hex()
    with beside(tree.pids[0]):
        owned = OwnedTable(name + "_dump")
    made = DumpHold("" if tree.options.departs else name, tree.pids[0], owned)
    made.expect(tree.notes.get(_NOTED, ()))
    tree.notes[_NAME] = made

    notes = tree.notes  # not the tree itself: a circle would keep what it holds

    def let_go() -> None:
        made.let_go()
        del notes[_NAME]

    tree.at_thaw.append(let_go)
    tree.at_end.append(made.close)
    if tree.options.kill:
        tree.at_kill.append(made.keep)
        tree.at_spared.append(made.spare)
        tree.at_moved.append(made.leave)
    return made


@attrs.define(slots=True, eq=False, repr=False)
class RestoreHold:
    """What a restore holds of the network while its sockets come into being."""

    _owned: OwnedTable | None = None
    _kept: dict[str, None] = attrs.field(factory=dict)
    """Tables that dumps have left."""
    at_last: list[Callable[[], None]] = attrs.field(factory=list)
    """Called when everything stands and the packets are let through."""
    at_end: list[Callable[[], None]] = attrs.field(factory=list)
    """Called when the restore is over, however."""

    def hold(self, flow: Flow) -> None:
        """Let no packet of a connection through from here on.

        Raises:
            FeatureMissing, NotPermitted: the network cannot be held here.
        """
        if self._owned is None:
            self._owned = OwnedTable(f"{_PREFIX}{os.urandom(_RANDOM_BYTES).hex()}_restore")
        self._owned.add([flow])

    def release_later(self, names: Iterable[str]) -> None:
        """Note tables that are removed when everything stands."""
        self._kept.update(dict.fromkeys(name for name in names if is_ours(name)))

    def release(self) -> None:
        """Let all packets through: everything stands."""
        if self._owned is not None:
            self._owned.let_through()
        for name in self._kept:
            nftables.remove_table(name)
        for finish in self.at_last:
            finish()

    def close(self) -> None:
        """Remove our own table; those of the dump stay if they were not released."""
        for end in self.at_end:
            end()
        if self._owned is not None:
            self._owned.close()


def is_ours(name: str) -> bool:
    """Tell whether a table, named by an image, is one that `keep` may have made."""
    digits = name.removeprefix(_PREFIX)
    return name != digits and len(digits) == 2 * _RANDOM_BYTES and digits.isalnum()


def restore_hold(opening: Opening) -> RestoreHold:
    """Return what this restore holds; made at the first call, released when everything stands."""
    known: RestoreHold | None = opening.made.get((_NAME, 0))
    if known is not None:
        return known
    made = RestoreHold()
    opening.made[_NAME, 0] = made
    opening.at_last.append(made.release)
    opening.at_end.append(made.close)
    return made
