"""The destination's side of a migration, from start to end.

offer         this host is checked against everything but the memory; all findings together
rounds        frames come and are kept in a chain of their own, in memory unless told where
state         the manifest of that generation; the tree is built from it and stands still
wait          for Go or Abort, through cuts, however long
let go        and say so, until the source has heard it

All of it is done by a worker; the session's own process is its heir (`heir`): it tells the source
what became of the tree if the worker is killed. Neighbours: `source` is the other side, `handover`
has the last words.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import attrs

from ckpt import fault
from ckpt.engine.building import Building, Part, part_at_once
from ckpt.engine.expecting import contents_of, expecting
from ckpt.engine.ground import Ground, prepared
from ckpt.engine.preparing import check_host
from ckpt.engine.records import TreeImage, decode_tree, encode_tree
from ckpt.engine.standing import Standing, standing
from ckpt.errors import (
    CkptError,
    ImageUnusable,
    MigrateError,
    PeerLost,
    PeerRefused,
    ProtocolError,
    UsageError,
    printable,
)
from ckpt.image.arriving import NUMBER, Arriving
from ckpt.image.chain import Chain
from ckpt.image.format import Manifest, decode_manifest
from ckpt.image.keys import Recipient
from ckpt.image.reader import PageReader
from ckpt.image.workers import count_free_threads
from ckpt.kernel.features import probe_features
from ckpt.migrate.arriving_late import Late
from ckpt.migrate.carrying import Carried
from ckpt.migrate.channel import Channel
from ckpt.migrate.clocks import ask_clocks
from ckpt.migrate.fates import Member
from ckpt.migrate.heir import Notes
from ckpt.migrate.message import Message
from ckpt.migrate.messages import (
    Abort,
    Accepted,
    Departed,
    Done,
    FileBegins,
    FilePart,
    Go,
    Offer,
    Pages,
    PagesOf,
    Prepared,
    Purpose,
    Ready,
    RoundEnds,
    Running,
    State,
    Tree,
    WhatNow,
)
from ckpt.migrate.session import Session
from ckpt.migrate.shortage import shortage_untold
from ckpt.migrate.tables import build_tables, unpack_held
from ckpt.migrate.taking import Taking
from ckpt.process.seed import ClockOffsets
from ckpt.process.tree import read_boot_id
from ckpt.process.uninterrupted import uninterrupted
from ckpt.resources.base import RestoreOptions
from ckpt.resources.registry import entered
from ckpt.tracker.spans import Spans
from ckpt.units import Pid

_NOT_EMPTY = "has generations already, and what arrives begins a chain; name another directory"
_DOUBT_S = 600.0
"""How long to stand still without a word from the source."""
_HEARD_S = _DOUBT_S
"""How long to wait for the word that the last answer was heard: until then the source stands still,
and only we can end its doubt."""

_PAUSE_S = 0.2


@attrs.frozen
class ReceiveOptions:
    """What whoever receives may choose."""

    image_dir: str = ""
    """Keep what arrives there as a chain; empty: nowhere."""
    encrypt_to: tuple[Recipient, ...] = ()
    """Who can read that chain; one that is encrypted already, and empty, must be of the same."""
    on_arrival: str = ""
    """A command that is run before the tree's sockets are made, when its network is held; it gives
    this host the addresses of the tree."""
    on_return: str = ""
    """A command that undoes that one, if it has begun and the tree will not run here after all."""
    no_cgroups: bool = False
    stays: bool = False
    """The tree stays our child, and the session ends with it."""


@attrs.define(repr=False)
class _Work:
    """One arrival under way."""

    session: Session
    channel: Channel
    options: ReceiveOptions
    chain: Chain
    notes: Notes
    """For the heir."""
    carried: Carried
    late: Late | None = None
    """There with `--lazy`: memory comes when it runs already."""
    warnings: list[str] = attrs.Factory(list)
    offer: Offer = attrs.field(init=False)
    tree: TreeImage = attrs.field(init=False)
    """As it was when it was offered."""

    is_near: bool = False
    """The source has this very kernel."""

    def restore_options(self) -> RestoreOptions:
        """Return what the resources are restored with."""
        return RestoreOptions(
            tcp_close=self.offer.options.tcp_close,
            no_cgroups=self.options.no_cgroups,
            on_arrival=self.options.on_arrival,
            # They were compared byte by byte.
            allow_changed=frozenset(self.carried.paths),
            original_stands=True,
            original_is_near=self.is_near,
            on_return=self.options.on_return if self.options.on_arrival else "",
            warn=self.warnings.append,
        )


def receive_tree(
    session: Session, options: ReceiveOptions, notes: Notes, private: str
) -> Running | None:
    """Take one tree from a source; it runs when this returns. None: the source has kept it.

    Args:
        session: just begun.
        options: what the user chose.
        notes: for the heir.
        private: an empty directory, removed here; for what need not be kept.

    Raises:
        CkptError: it did not come about; the source was told, and nothing was left here.
    """
    with contextlib.ExitStack() as stack:
        # By the heir, too: whoever of the two is left.
        stack.callback(shutil.rmtree, private, ignore_errors=True)
        kept = Path(options.image_dir or private)
        chain = Chain.create_or_open(kept, encrypt_to=options.encrypt_to)
        stack.enter_context(chain.lock())
        if chain.next_number():
            raise ImageUnusable(options.image_dir, _NOT_EMPTY)
        carried = stack.enter_context(Carried(session.channel.peer))
        work = _Work(session, session.channel, options, chain, notes, carried)
        work.offer = _take_offer(work)
        begun_s = time.monotonic()
        if work.offer.options.lazy and options.image_dir:
            raise UsageError("what comes with --lazy cannot be kept in an --image-dir")
        with work.channel.kept_alive():
            _check(work)
        work.channel.send(Accepted(chain.chain_id))
        arriving = stack.enter_context(Arriving(chain))
        offsets = ask_clocks(work.channel)
        if work.offer.options.lazy:
            work.late = stack.enter_context(Late(session, work.channel.peer))
        with _prepared(work, offsets) as ground:
            work.channel.send(Ready((time.monotonic() - begun_s) * 1000))
            taking = stack.enter_context(
                Taking(work.channel, arriving, ground, keeps=bool(options.image_dir))
            )
            said = _take_until(work, taking, Tree)
            if said is None:
                return None
            begun_s = time.monotonic()
            tree = _tree_of(work, _decode(work, said.manifest))
            with contextlib.suppress(_Kept), contextlib.ExitStack() as building:
                stands = building.enter_context(_built(work, tree, taking, ground))
                word = Prepared((time.monotonic() - begun_s) * 1000)
                fault.reach("built")
                with shortage_untold():
                    return _await_word(work, stands, word)
    return None


def _prepared(
    work: _Work, offsets: ClockOffsets | None
) -> contextlib.AbstractContextManager[Ground | None]:
    if work.late is not None:
        # What is there ahead is its memory, and that is what comes last.
        return contextlib.nullcontext()
    return prepared(work.tree, probe_features(), offsets)


def _take_offer(work: _Work) -> Offer:
    while True:
        what = work.channel.receive(Offer, FileBegins, FilePart)
        if isinstance(what, Offer):
            return what
        _take_file(work, what)


def _take_file(work: _Work, what: Message) -> None:
    if isinstance(what, FileBegins):
        work.carried.begin(what)
    elif isinstance(what, FilePart):
        work.carried.take(what)


class _Kept(Exception):
    """The source has kept its tree: what was built is taken down as after a failure."""


def _check(work: _Work) -> None:
    """Check this host against the offer; what has no name is made for that, and taken back."""
    manifest = _decode(work, work.offer.manifest)
    tree = work.tree = _tree_of(work, manifest)
    work.is_near = manifest.host.get("boot_id") == read_boot_id()
    with contents_of(tree) as contents:
        options = attrs.evolve(
            work.restore_options(),
            contents=contents.paths,
            addresses_come=bool(work.options.on_arrival),
        )
        with entered(tree.root.resources):
            check_host(tree, probe_features(), options)


def _decode(work: _Work, encoded: bytes) -> Manifest:
    with _lies_of(work):
        return decode_manifest(encoded, "what came")


def _tree_of(work: _Work, manifest: Manifest) -> TreeImage:
    with _lies_of(work):
        return decode_tree(manifest, "what came")


@contextlib.contextmanager
def _lies_of(work: _Work) -> Iterator[None]:
    try:
        yield
    except CkptError as error:
        raise ProtocolError(peer=work.channel.peer, reason=error.message()) from error
    except ValueError as error:
        raise ProtocolError(peer=work.channel.peer, reason=str(error)) from error


L = TypeVar("L", Tree, Departed, State)


def _take_until(work: _Work, taking: Taking, last: type[L]) -> L | None:
    """Take frames until a message comes that ends them; None: the source keeps its tree."""
    while True:
        what = work.channel.receive(
            Pages, RoundEnds, last, Abort, FileBegins, FilePart, place=taking.place
        )
        if isinstance(what, Pages):
            taking.take(what)
            continue
        if isinstance(what, FileBegins | FilePart):
            _take_file(work, what)
            continue
        taking.finish()
        if isinstance(what, last):
            return what
        if isinstance(what, Abort):
            return None
        work.channel.send(what)


@contextlib.contextmanager
def _built(
    work: _Work, tree: TreeImage, taking: Taking, ground: Ground | None
) -> Iterator[Standing]:
    """Make this host ready while the last pages come, then build the tree.

    Raises:
        _Kept: it goes on there.
    """
    features = probe_features()
    with contents_of(tree) as contents:
        options = attrs.evolve(work.restore_options(), contents=contents.paths)
        if ground is not None:
            coming = attrs.evolve(options, addresses_come=bool(options.on_arrival))
            check_host(tree, features, coming, ground.nursery.embryos)
        if _take_until(work, taking, Departed) is None:
            raise _Kept
        work.notes.arriving(tree.root.pid)
        with contextlib.ExitStack() as stack:
            with work.channel.kept_alive():
                site = stack.enter_context(expecting(tree, features, contents, options, ground))
                if not contents.wait_for_pages:
                    # The source is still at work on the run tables.
                    site.open()
            state = _take_until(work, taking, State)
            if state is None:
                raise _Kept
            with _lies_of(work):
                held = unpack_held(state.held)
                tables = build_tables(tree, held, taking.there, taking.kept)
                records = encode_tree(tree) if work.options.image_dir else None
                taking.arriving.commit(state.manifest, "what came", tables, records)
            reader = PageReader(work.chain, NUMBER, threads=count_free_threads())
            parts = _parts(work, tree, reader, state.missing, held)
            building = Building(tree, parts, reader, features, work.warnings.append)
            with work.channel.kept_alive():
                stands = stack.enter_context(standing(building, site, ground))
            if work.late is not None:
                work.late.courier.begin()
            yield stands


def _parts(
    work: _Work,
    tree: TreeImage,
    reader: PageReader,
    missing: Sequence[PagesOf],
    held: Mapping[str, Spans],
) -> dict[Pid, Part]:
    if work.late is not None:
        return work.late.parts(tree, reader, missing)
    parts = {one.pid: part_at_once(one, reader) for one in tree.processes}
    for part in parts.values():
        if part.image.has_memory:
            # Most of it is in place already, and in no table.
            part.wanted = held[part.image.space]
    return parts


# ---- the last words


def _await_word(work: _Work, stands: Standing, prepared: Prepared) -> Running:
    """Wait for Go or Abort, over as many connections as it takes.

    Raises:
        _Kept: it was Abort.
        PeerLost: neither came in time; the tree will not run here.
    """
    channel = work.channel
    work.notes.prepared()
    _say(channel, prepared)
    give_up_s = time.monotonic() + _DOUBT_S
    while True:
        try:
            word = channel.receive(Go, Abort, WhatNow)
        except PeerRefused as refusal:
            raise _Kept from refusal
        except PeerLost as error:
            channel = _next_channel(work, channel, give_up_s, error)
            continue
        if isinstance(word, Go):
            return _let_go_and_say_so(work, stands, channel)
        if isinstance(word, Abort):
            raise _Kept
        _say(channel, prepared)


def _say(channel: Channel, what: Prepared | Running | Done) -> None:
    """Say it; if the connection is cut, that is noticed by whoever waits for the answer."""
    with contextlib.suppress(PeerLost, PeerRefused):
        channel.send(what)


def _next_channel(work: _Work, channel: Channel, give_up_s: float, error: CkptError) -> Channel:
    channel.close()
    while (left_s := give_up_s - time.monotonic()) > 0:
        joined = (work.late or work.session).accept(left_s)
        if joined is not None and joined.purpose == Purpose.RESUME:
            return joined.channel
        if joined is not None:
            joined.channel.close()
    raise error


def _let_go_and_say_so(work: _Work, stands: Standing, channel: Channel) -> Running:
    """Let it run; no signal of the user may come between that and the answer."""
    with uninterrupted():
        running, members = _let_go(work, stands)
        heard = _answer_surely(work, channel, running)
        if work.late is not None:
            # Our end would be the tree's.
            work.late.see_through(heard, running, members)
    work.notes.settled()
    return running


def _let_go(work: _Work, stands: Standing) -> tuple[Running, list[Member]]:
    begun_s = time.monotonic()
    pids = [part.embryo.pid for part in stands.building.parts.values()]
    members = [Member.read(pid) for pid in pids]
    work.notes.members(members, late=work.late is not None)
    stands.finish()
    if work.options.image_dir:
        stands.arm(work.chain.chain_id)
    fault.reach("finished")
    stands.let_go()
    work.carried.keep()
    finish_ms = (time.monotonic() - begun_s) * 1000
    running = Running(
        pids[0],
        finish_ms,
        tuple(printable(text)[:500] for text in work.warnings[:50]),
        stands.building.ahead_bytes,
        stands.building.late_bytes,
    )
    return running, members


def _answer_surely(work: _Work, channel: Channel, running: Running) -> Channel | None:
    """Do as `_answer`, whatever fails: what leaves the blocks around us ends a tree that runs."""
    give_up_s = time.monotonic() + _HEARD_S
    while time.monotonic() < give_up_s:
        try:
            fault.reach("let-go")
            return _answer(work, channel, running)
        except (CkptError, MemoryError, OSError, RuntimeError):
            time.sleep(_PAUSE_S)
    return None


def _answer(work: _Work, channel: Channel, running: Running) -> Channel | None:
    """Say that it runs, until that was heard (return where), or nobody asks any more."""
    give_up_s = time.monotonic() + _HEARD_S
    _say(channel, running)
    while True:
        try:
            word = channel.receive(Done, WhatNow, timeout_s=max(0.0, give_up_s - time.monotonic()))
        except PeerRefused:
            return None
        except MigrateError as error:
            # It runs: whatever the source says, that is all that can be answered.
            try:
                channel = _next_channel(work, channel, give_up_s, error)
            except MigrateError:
                return None
            continue
        if isinstance(word, Done):
            if work.late is None:
                _say(channel, word)
            return channel
        _say(channel, running)
