"""Which copy runs: the last words of a migration, on the source's side.

    source                                    destination
    frozen ── State ────────────────────────> builds
           <──────────────────────── Prepared  stands still, waits for Go or Abort, however long
    doomed    (it ends with us from here on)
           ── Go ───────────────────────────> lets it go
           <───────────────────────── Running
    killed ── Done ─────────────────────────>

At any instant at most one copy runs: there, only after Go; here, never after Go unless the
destination has said Abort, which it says only of a copy that is gone and never ran. After a cut the
source asks (`WhatNow`) until it is told, or until the user decides (Ctrl-C): that nobody knows the
session any more is no proof that the tree does not run there. Whoever is killed leaves somebody who
can tell: the source its witness (`witness`), the destination's worker its heir (`heir`):

    cut, or killed       source                            destination
    before Prepared      goes on                           gone
    Prepared to Go       cut: goes on, says Abort          waits; Abort: gone
                         source killed: goes on            the witness says Abort
    while it is doomed   source killed: some of it ended:  the witness says Go
                         the rest is ended
    Go to Running        stands still, asks                worker killed: the heir looks whether all
                                                           processes live: Running; else it ends
                                                           the rest: Abort
    after Running        killed, or ended by the witness   runs

With `--lazy` it is not killed after Running, but kept, standing still and doomed, until all of its
memory has come (`remaining`, `arriving_late`). For that time the tree has its memory in two places,
and is lost with either: a source that is killed takes what was still to come with it, a destination
all that the tree has done since. Then nothing of it runs anywhere; never two, never one with pages
that are not its own.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from ckpt import fault
from ckpt.engine.taken import Taken
from ckpt.errors import CkptError, NotMoved, PeerLost, PeerRefused, TreeLost
from ckpt.migrate.channel import Channel
from ckpt.migrate.dial import Dialer
from ckpt.migrate.message import Message
from ckpt.migrate.messages import Abort, Done, Go, Prepared, Purpose, Running, WhatNow
from ckpt.migrate.witness import Witness
from ckpt.process.uninterrupted import uninterrupted

_PAUSE_S = 0.2
_ABORT_S = 5.0
"""For how long we try to tell that the tree goes on here: the destination need not know at once."""


def hand_over(
    channel: Channel,
    dialer: Dialer,
    taken: Taken,
    witness: Witness,
    tell: Callable[[str], None],
    await_complete: Callable[[], None] | None = None,
) -> tuple[Running, float]:
    """Let the tree run there, and never more here.

    State:  it was taken to be killed, stands still, and its state was sent. On return it runs there
            and is dead here.

    Returns:
        What was said of it, and for how long it had stood still by then, in milliseconds.

    Args:
        channel: over which the state was sent.
        dialer: of the session.
        taken: the tree.
        witness: who speaks for us if we are killed.
        tell: is told of a cut.
        await_complete: called when it runs there and some of its memory is still wanted; raises if
            it was lost.

    Raises:
        TreeLost: it ran there before all of its memory had come, and ended; it is dead here, too.
        NotMoved: the destination could not let it go, and it is gone there; or the user has ended
            the doubt.
        MigrateError: the destination was lost, or refused, before that.
        Any of them: the tree goes on here at the end of the freeze.
    """
    channel.receive(Prepared)
    # An interrupt must not let it go on here while it may run there.
    with uninterrupted() as came:
        witness.note_doom(taken.frozen.processes)
        taken.doom()
        fault.reach("doomed")
        answer = say_go(channel) or _end_doubt(dialer, came, tell)
        if answer is None or (isinstance(answer, Abort) and not answer.ran):
            taken.spare()
            came.clear()
            raise _kept(channel, answer)
        downtime_ms = taken.standing_ms
        try:
            if isinstance(answer, Abort):
                raise TreeLost(answer.reason)
            if await_complete is not None:
                _say_heard(channel)
                await_complete()
            witness.release()
        finally:
            taken.kill()
        if await_complete is None:
            _say_done(channel, dialer)
        # It is too late for whoever wanted to stop it.
        came.clear()
    return answer, downtime_ms


def _kept(channel: Channel, answer: Abort | None) -> NotMoved:
    if answer is not None:
        return NotMoved(answer.reason)
    return NotMoved(
        f"as you have decided; {channel.peer} was told to let it run, and never said"
        " whether it does: see to it that it does not run there, too"
    )


def _say_heard(channel: Channel) -> None:
    with contextlib.suppress(CkptError):
        channel.send(Done())


def _end_doubt(
    dialer: Dialer, came: list[int], tell: Callable[[str], None]
) -> Running | Abort | None:
    """Ask what has become of it until that is known; None: the user does not want to wait for it.

    Args:
        dialer: knows the session.
        came: signals of the user, held back.
        tell: tells the user.
    """
    tell("the connection was cut while the tree was handed over: asking what became of it")
    answer = _ask(dialer)
    if answer is None:
        # What came before was said by somebody who did not know this.
        came.clear()
        tell(
            "nobody answers: the tree may run there, and stands still here until that is known;"
            " Ctrl-C lets it go on here, and is right only if it does not run there"
        )
    while answer is None and not came:
        time.sleep(_PAUSE_S)
        answer = _ask(dialer)
    return answer


def _ask(dialer: Dialer) -> Running | Abort | None:
    with contextlib.suppress(NobodyKnows):
        return ask_again(dialer)
    return None


@contextlib.contextmanager
def told_if_kept(channel: Channel, dialer: Dialer) -> Iterator[None]:
    """Tell the destination, if the block fails, that the tree goes on here: it does by then."""
    try:
        yield
    except (NotMoved, PeerRefused, TreeLost):
        # The destination knows, or cannot be told.
        raise
    except BaseException:
        with contextlib.suppress(CkptError):
            _tell_abort(channel, dialer)
        raise


def say_go(channel: Channel) -> Running | Abort | None:
    """Say Go and return what came of it; None: the connection was cut."""
    try:
        channel.send(Go())
        return _one_of(channel.receive(Running, Abort))
    except PeerRefused as error:
        return Abort(error.reason)
    except CkptError:
        # Whatever came instead of an answer: Go was said.
        return None


def _say_done(channel: Channel, dialer: Dialer) -> None:
    """Have nobody there wait for a question of ours; it ends by itself some time."""
    with contextlib.suppress(CkptError):
        try:
            channel.send(Done())
            channel.receive(Done, timeout_s=_ABORT_S)
        except PeerLost:
            with dialer.attach(Purpose.RESUME) as again:
                again.send(Done())
                again.receive(Done, timeout_s=_ABORT_S)


def _one_of(answer: Message) -> Running | Abort:
    assert isinstance(answer, Running | Abort)
    return answer


class NobodyKnows(Exception):
    """The session is over there: it may have ended because it had waited for us for too long."""


def ask_again(dialer: Dialer) -> Running | Abort | None:
    """Ask over a new connection; say Go, if it still waits for that. None: nobody answered.

    Raises:
        NobodyKnows: nor will anybody ever.
    """
    try:
        with dialer.attach(Purpose.RESUME) as channel:
            channel.send(WhatNow())
            answer = channel.receive(Prepared, Running, Abort)
            known = say_go(channel) if isinstance(answer, Prepared) else _one_of(answer)
            if known is not None:
                with contextlib.suppress(CkptError):
                    channel.send(Done())
                    channel.receive(Done, timeout_s=_ABORT_S)
            return known
    except PeerRefused as error:
        if error.peer_code == "unknown-session":
            raise NobodyKnows from error
        return None
    except CkptError:
        # Nobody is there, or somebody else.
        return None


def _tell_abort(channel: Channel, dialer: Dialer) -> None:
    """Say that the tree goes on here; over a new connection, if the old one is cut."""
    try:
        channel.send(Abort("the source goes on"))
    except PeerLost:
        say_abort(dialer, _ABORT_S)


def say_abort(dialer: Dialer, seconds: float) -> None:
    """Say so over new connections, until one takes it or the time is over."""
    give_up_s = time.monotonic() + seconds
    while time.monotonic() < give_up_s:
        try:
            with dialer.attach(Purpose.RESUME) as channel:
                channel.send(Abort("the source goes on"))
                return
        except PeerRefused:
            return
        except CkptError as error:
            if isinstance(error.__cause__, ConnectionRefusedError):
                # Nobody listens, so nobody can be told, and waits for no more than its patience.
                return
            time.sleep(_PAUSE_S)
