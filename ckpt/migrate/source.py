"""The source's side of a migration, from start to end.

look          everything that cannot be captured is named before anything is stopped
offer         all but the memory, taken in a short stop; the destination checks itself against it
rounds        memory is copied while the tree runs, until little is left
freeze        everything else is taken; the tree stands still from here on
hand over     the destination has it in place; the tree here is doomed; it is let go there;
              it is killed here (`handover`)

Until the tree is doomed it goes on here, whatever fails. Neighbours: `arrival` is the other side.
"""

import contextlib
import mmap
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import attrs

from ckpt import fault
from ckpt.engine.capture import Looked, examine
from ckpt.engine.convergence import Rest, Round, Verdict
from ckpt.engine.copying import Copy
from ckpt.engine.hooks import Hook, run_return, start_hook
from ckpt.engine.live import Outcome
from ckpt.engine.members import Members
from ckpt.engine.postponing import waiting_mappings
from ckpt.engine.records import TreeImage, encode_tree
from ckpt.engine.steps import Steps
from ckpt.engine.taking import Taking
from ckpt.errors import HookFailed, NotMoved, TreeLost
from ckpt.image.format import FORMAT_VERSION, Kind, Manifest, PageFile, encode_manifest
from ckpt.image.pipeline import PRESSED_LEVEL, Compression
from ckpt.kernel.features import Features, probe_features
from ckpt.migrate.carrying import Carrier
from ckpt.migrate.channel import Channel
from ckpt.migrate.clocks import answer_clocks
from ckpt.migrate.dial import Dialer
from ckpt.migrate.handover import NobodyKnows, ask_again, hand_over, say_abort, told_if_kept
from ckpt.migrate.messages import (
    Accepted,
    Departed,
    Offer,
    Options,
    PagesOf,
    Ready,
    RoundEnds,
    State,
    Tree,
)
from ckpt.migrate.policy import Decision, Goal, HandOver, PreCopy, tell_nobody
from ckpt.migrate.remaining import await_complete
from ckpt.migrate.sending import Sender
from ckpt.migrate.serving import Kept, Serving
from ckpt.migrate.spans import pack_spans
from ckpt.migrate.witness import attended
from ckpt.process.freezer import DEFAULT_TIMEOUT_S
from ckpt.process.tree import reachable_as, read_boot_id, refuse_untouchable
from ckpt.resources.base import CaptureOptions, be_silent
from ckpt.tracker.base import TrackerName
from ckpt.tracker.choose import AUTO, choose_tracker
from ckpt.units import GenerationNo, Pid

_GOAL = Goal()
_COMPRESSION = Compression(pressed_level=PRESSED_LEVEL)
_STAYS = "the tree goes on here"
"""What a command of `--on-departure` that fails has done to it."""
_TELLING_S = 600.0
_PAUSE_S = 0.2


@attrs.frozen
class MigrateOptions:
    """How a tree is moved."""

    tcp_close: bool = False
    """Connections are not kept: they arrive closed."""
    tracker: str = AUTO
    freeze_timeout_s: float = DEFAULT_TIMEOUT_S
    ghost_limit_bytes: int = 1 << 20
    goal: Goal = _GOAL
    compression: Compression = _COMPRESSION
    lazy: bool = False
    """It runs there before its memory has come, which is fetched when it is touched; no rounds."""
    with_files: tuple[str, ...] = ()
    """Paths of files that the destination lacks; see `carrying`."""
    on_departure: str = ""
    """A command that is run when the tree stands still and its network is held; it takes the
    addresses of the tree from this host."""
    on_return: str = ""
    """A command that is run if the tree goes on here when that one has begun: it undoes it."""


@attrs.frozen
class MigrateResult:
    """What a migration did; the tree runs at the destination."""

    pid: Pid
    rounds: tuple[Round, ...]
    sent_bytes: int
    downtime_ms: float
    """From the first thread stopped here to the word that it runs there."""
    expected_ms: float
    """The same, as it was expected when the last round was over."""
    wall_ms: float
    warnings: tuple[str, ...]
    ahead_bytes: int
    """Of the memory of the tree: what was in place there before it stood still."""
    late_bytes: int
    """And what was put there after."""
    fetched_bytes: int = 0
    """Of memory, that came when it ran there already."""


@attrs.define(repr=False)
class _Work:
    """One migration under way."""

    root: Pid
    options: MigrateOptions
    features: Features
    tracker: TrackerName
    channel: Channel
    carrier: Carrier
    chain_id: str = ""

    def capture_options(self, *, kill: bool) -> CaptureOptions:
        """Return what the resources are asked with."""
        return CaptureOptions(
            kill=kill,
            tcp_close=self.options.tcp_close,
            ghost_limit_bytes=self.options.ghost_limit_bytes,
            departs=kill and bool(self.options.on_departure),
        )

    def manifest(
        self,
        records: Mapping[str, object],
        files: tuple[PageFile, ...] = (),
    ) -> bytes:
        """Return a part of what is said of a tree, encoded as the manifest of a generation."""
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            chain_id=self.chain_id,
            generation=GenerationNo(0),
            kind=Kind.FULL,
            parent=None,
            created_s=time.time(),
            page_size=mmap.PAGESIZE,
            tracker=self.tracker,
            reason="",
            freeze_ms=0.0,
            wall_ms=0.0,
            host={
                "kernel_release": self.features.kernel_release,
                "boot_id": read_boot_id(),
            },
            records=records,
            spaces={},
            page_files=files,
        )
        return encode_manifest(manifest)[0]


def migrate(
    pid: int,
    dialer: Dialer,
    options: MigrateOptions | None = None,
    *,
    tell: Callable[[str], None] = be_silent,
    tell_round: Callable[[Decision], None] = tell_nobody,
) -> MigrateResult:
    """Move the process `pid`, with its descendants, to another host; it runs there then.

    State:  any; the tree stands still for `MigrateResult.downtime_ms`, and a moment before.

    Raises:
        TargetError: the process is gone, may not be touched, or owns something unsupported.
        HostError: this kernel or this user cannot do it.
        MigrateError: the destination cannot be reached, refuses, or was lost. The tree goes on
            here, unless the error says otherwise (`TreeLost`).
    """
    started_s = time.monotonic()
    steps = Steps("migrate")
    options = options or MigrateOptions()
    root = reachable_as(Pid(pid))
    refuse_untouchable(root)
    carrier = Carrier(options.with_files)
    features = probe_features()
    tracker = TrackerName.FULL if options.lazy else choose_tracker(options.tracker, features)
    with dialer.open() as channel, contextlib.ExitStack() as stack:
        steps.done("connecting")
        work = _Work(root, options, features, tracker, channel, carrier)
        looked = examine(root, features, work.capture_options(kill=False))
        stack.callback(looked.tree.forget)
        members = Members(root, tracker, features, stack)
        of_memory = looked.tree.memory_owners()
        for each in looked.targets:
            if each not in of_memory:
                members.add(each)
        members.take_over()
        steps.done("looking", processes=len(looked.targets), tracker=tracker)
        sender = Sender(channel, mmap.PAGESIZE, options.compression)
        stack.callback(sender.close)
        taking = _begin(work, looked, members, sender)
        stack.callback(taking.forget)
        taking.remove_leftovers()
        hand_over_takes = _offer(work, taking)
        steps.done("offering")
        taking.look_again(work.capture_options(kill=True))
        outcome, expected_ms = _copy_running(work, taking, sender, hand_over_takes, tell_round)
        steps.done("copying while it runs", rounds=len(outcome.rounds))
        # If we are killed: who tells there what became of it here.
        undo = partial(run_return, options.on_return, tell, pid)
        departing = _Departing(work, tell)
        with (
            attended(partial(_tell_fate, dialer, undo, options.lazy), channel.abandon) as witness,
            told_if_kept(channel, dialer),
            departing.undone_at_failure(),
            taking.take(outcome, departing.begin) as taken,
            departing.undone_at_failure(),
            contextlib.ExitStack() as at_last,
        ):
            departing.finish()
            sender.flush()
            files = (PageFile(sender.n_bytes, sender.frames),) if len(sender.frames) else ()
            missing = tuple(PagesOf(space, pack_spans(s)) for space, _, s in taken.left if s)
            held = tuple(PagesOf(space, pack_spans(s)) for space, s in taken.held.items())
            channel.send(State(work.manifest({}, files), missing, held))
            serving = at_last.enter_context(
                Serving(dialer, [Kept(*left) for left in taken.left], options.compression)
            )
            waiting = partial(await_complete, channel, dialer, serving, tell)
            running, downtime_ms = hand_over(
                channel, dialer, taken, witness, tell, waiting if options.lazy else None
            )
        steps.done("handing over", downtime_ms=round(downtime_ms, 3))
        warnings = [*taking.warnings, *running.warnings]
        warnings += [said for moved in taken.tree.at_moved if (said := moved())]
    return MigrateResult(
        pid=Pid(running.pid),
        rounds=outcome.rounds,
        sent_bytes=channel.traffic.sent_bytes + serving.wire_bytes,
        downtime_ms=downtime_ms,
        expected_ms=expected_ms,
        wall_ms=(time.monotonic() - started_s) * 1000,
        warnings=tuple(warnings),
        ahead_bytes=running.ahead_bytes,
        late_bytes=running.late_bytes,
        fetched_bytes=serving.sent_bytes,
    )


def _copy_running(
    work: _Work,
    taking: Taking,
    sender: Sender,
    hand_over_takes: HandOver,
    tell_round: Callable[[Decision], None],
) -> tuple[Outcome, float]:
    """Send memory while the tree runs; return what is left, and the downtime to expect of that.

    Raises:
        NotMoved: too much is left, and that will not change.
    """
    if work.options.lazy:
        return Outcome((), Rest(0, 0), fits=True), 0.0
    policy = PreCopy(
        work.options.goal,
        mmap.PAGESIZE,
        sent_bytes=lambda: sender.n_bytes,
        hand_over=lambda: hand_over_takes,
        tell=tell_round,
    )
    outcome = taking.rounds().run(policy)
    expected = policy.decisions[-1]
    if expected.verdict is Verdict.GIVE_UP:
        raise NotMoved(expected.sentence)
    return outcome, expected.downtime_ms


@attrs.define(repr=False)
class _Departing:
    """What goes on while the last pages are copied: the records travel, the address leaves."""

    work: _Work
    _tell: Callable[[str], None]
    _hook: Hook | None = None
    _has_begun: bool = False

    def begin(self, tree: TreeImage) -> None:
        """Send all but the memory of the tree, which has just stopped; start the user's command."""
        self.work.carrier.send(self.work.channel)
        self.work.channel.send(Tree(self.work.manifest(encode_tree(tree))))
        command = self.work.options.on_departure
        self._has_begun = bool(command)
        self._hook = start_hook("--on-departure", command, _STAYS, CKPT_PID=self.work.root)
        fault.reach("departing")

    def finish(self) -> None:
        """Have the destination know that the addresses have left.

        Raises:
            HookFailed: they have not.
        """
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.wait()
        fault.reach("departed")
        self.work.channel.send(Departed())

    @contextlib.contextmanager
    def undone_at_failure(self) -> Iterator[None]:
        """Undo it, if the block fails: best while the tree still stands and its network is held."""
        try:
            yield
        except TreeLost:
            raise
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        hook, self._hook = self._hook, None
        if hook is not None:
            with contextlib.suppress(HookFailed):
                hook.wait()
        if self._has_begun:
            self._has_begun = False
            run_return(self.work.options.on_return, self._tell, self.work.root)


def _begin(work: _Work, looked: Looked, members: Members, sender: Sender) -> Taking:
    copy = Copy(sender)
    sender.follow(copy.stream)
    return Taking(
        looked=looked,
        members=members,
        copy=copy,
        parent=None,
        kill=True,
        max_freeze_ms=0.0,
        # Pages are put in place there as they come, each for one process.
        stores_once=False,
        freeze_timeout_s=work.options.freeze_timeout_s,
        leave=waiting_mappings if work.options.lazy else None,
    )


def _offer(work: _Work, taking: Taking) -> HandOver:
    """Have the destination check itself, and prepare for what comes; return what is known then.

    Raises:
        PeerRefused: it cannot run the tree; with all findings.
    """
    channel = work.channel
    work.chain_id = "0" * 32
    offer = work.manifest(encode_tree(taking.preview()))
    work.carrier.send(channel)
    channel.send(Offer(offer, Options(work.options.tcp_close, work.options.lazy)))
    work.chain_id = channel.receive(Accepted).chain_id
    answer_clocks(channel, work.root)
    ready = channel.receive(Ready)
    begun_s = time.monotonic()
    channel.send(RoundEnds(0))
    channel.receive(RoundEnds)
    return HandOver(
        capture_ms=taking.stopped_ms,
        restore_ms=ready.restore_ms,
        round_trip_ms=(time.monotonic() - begun_s) * 1000,
    )


def _tell_fate(dialer: Dialer, undo: Callable[[], None], lazy: bool, lives_here: bool) -> None:
    """Be the witness: tell the destination whether the tree lives on here."""
    if lives_here:
        undo()
    if lives_here or lazy:
        # Of one that was to come late, what is not there yet has ended with us.
        say_abort(dialer, _TELLING_S)
        return
    give_up_s = time.monotonic() + _TELLING_S
    with contextlib.suppress(NobodyKnows):
        while ask_again(dialer) is None and time.monotonic() < give_up_s:
            time.sleep(_PAUSE_S)
