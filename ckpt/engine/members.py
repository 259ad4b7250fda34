"""The processes of a dump under way, each with its tracker and its pages that the image holds."""

import contextlib
from collections.abc import Container

import attrs

from ckpt.engine.deciding import decide_plan, follow_plan
from ckpt.engine.identity import read_exec_id
from ckpt.engine.pages import Held, covered
from ckpt.engine.records import space_name
from ckpt.engine.tracking import Tracking, drop_epoch, tracking
from ckpt.errors import TargetGone
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest
from ckpt.kernel.features import Features
from ckpt.kernel.procfs.status import read_status
from ckpt.process.tree import is_zombie, read_identity
from ckpt.tracker.base import TELLING, TrackerName
from ckpt.tracker.choose import Plan
from ckpt.tracker.epoch import read_epoch
from ckpt.tracker.spans import Spans
from ckpt.units import Pid


@attrs.define(repr=False)
class Member:
    """One process."""

    tracking: Tracking
    number: Pid
    """Its pid; `pid` is that by which it can be asked about (`tree.reachable_as`)."""
    inner: Pid
    """Its pid as the tree itself and its image know it."""
    held: Held
    follows: bool = True
    """What the parent generation holds of a process with this number is of this very process."""
    likely: Spans = attrs.Factory(list)
    """Its pages that existed a moment ago."""

    @property
    def pid(self) -> Pid:
        """The process, as it can be asked about."""
        return self.tracking.pid

    @property
    def space(self) -> str:
        """The name of its page space."""
        return space_name(self.inner)


@attrs.define(repr=False)
class Members:
    """All of them; what they have open is closed with `stack`."""

    root: Pid
    tracker: TrackerName
    features: Features
    stack: contextlib.ExitStack
    by_pid: dict[Pid, Member] = attrs.Factory(dict)

    def add(self, pid: Pid) -> Member:
        """Take in a process of which nothing is held yet.

        Raises:
            TargetGone: it has ended.
        """
        identity, exec_id = read_identity(pid), read_exec_id(pid)
        lent = self.stack.enter_context(tracking(identity, exec_id, self.tracker, self.features))
        ids = read_status(pid)
        inner = Pid(ids.ns_tgid[-1])
        member = self.by_pid[pid] = Member(lent, ids.tgid, inner, Held([]))
        return member

    def decide(self, chain: Chain, *, incremental: bool) -> Plan:
        """Decide by the root what the generation is made from, and take over all trackers."""
        plan = Plan(None, "")
        for member in self.by_pid.values():
            epoch = read_epoch(member.pid)
            if member.pid == self.root:
                plan = decide_plan(chain, member.tracking, epoch, incremental=incremental)
                continue
            member.follows = follow_plan(chain, member.tracking, epoch, plan.parent)
        return plan

    def take_over(self) -> None:
        """Take over what trackers there are, for copies that are made from nothing."""
        for member in self.by_pid.values():
            epoch = read_epoch(member.pid)
            if not member.tracking.take_over(epoch) and epoch is not None:
                drop_epoch(epoch)

    def hold(self, parent: Manifest) -> None:
        """Note what the parent generation holds of each."""
        if self.tracker not in TELLING:
            return
        for member in self.by_pid.values():
            table = parent.spaces.get(member.space)
            if table is not None and member.follows:
                member.held = Held(covered(table))

    def keep_only(self, pids: Container[Pid]) -> None:
        """Forget those that have ended, or belong to the tree no more."""
        self.by_pid = {pid: member for pid, member in self.by_pid.items() if pid in pids}

    def drop_if_ended(self, pid: Pid, error: TargetGone) -> None:
        """Forget a descendant that has ended.

        Raises:
            TargetGone: `error`: it is the root, or the process is still there.
        """
        if pid == self.root or not is_zombie(pid):
            raise error
        self.by_pid.pop(pid, None)
