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
source asks (`WhatNow`) until it is told. Whoever is killed leaves somebody who can tell: the source
its witness (`witness`), the destination's worker its heir (`arrival`):

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
from collections.abc import Callable

from ckpt.engine.taking import Taken
from ckpt.errors import CkptError, ConnectFailed, NotMoved, PeerLost, PeerRefused, TreeLost
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
) -> Running:
    """Let the tree run there, and never more here.

    State:  it was taken to be killed, stands still, and its state was sent. On return it runs there
            and is dead here.

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
        NotMoved: the destination could not let it go; it is gone there.
        MigrateError: the destination was lost, or refused, before that.
        Any of them: the tree goes on here at the end of the freeze.
    """
    try:
        channel.receive(Prepared)
        witness.note_doom(taken.frozen.processes)
        taken.doom()
    except BaseException:
        with contextlib.suppress(CkptError):
            _tell_abort(channel, dialer)
        raise
    # An interrupt must not let it go on here while it may run there.
    with uninterrupted():
        answer = say_go(channel)
        if answer is None:
            tell("the connection was cut while the tree was handed over: asking what became of it")
        while answer is None:
            time.sleep(_PAUSE_S)
            answer = ask_again(dialer)
        if isinstance(answer, Abort) and not answer.ran:
            taken.spare()
            raise NotMoved(answer.reason)
        try:
            if isinstance(answer, Abort):
                raise TreeLost(answer.reason)
            if await_complete is not None:
                await_complete()
        finally:
            taken.kill()
    return answer


def say_go(channel: Channel) -> Running | Abort | None:
    """Say Go and return what came of it; None: the connection was cut."""
    try:
        channel.send(Go())
        answer: Running | Abort = _one_of(channel.receive(Running, Abort))
        with contextlib.suppress(PeerLost, PeerRefused):
            channel.send(Done())
    except PeerRefused as error:
        return Abort(error.reason)
    except PeerLost:
        return None
    return answer


def _one_of(answer: Message) -> Running | Abort:
    assert isinstance(answer, Running | Abort)
    return answer


def ask_again(dialer: Dialer) -> Running | Abort | None:
    """Ask over a new connection; say Go, if it still waits for that. None: nobody answered."""
    try:
        with dialer.attach(Purpose.RESUME) as channel:
            channel.send(WhatNow())
            answer = channel.receive(Prepared, Running, Abort)
            if isinstance(answer, Prepared):
                return say_go(channel)
            channel.send(Done())
            return _one_of(answer)
    except PeerRefused as error:
        if error.peer_code == "unknown-session":
            # Whoever let it go would have left somebody to say so.
            return Abort("the destination has given it up")
        return None
    except (PeerLost, ConnectFailed):
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
        except (PeerLost, ConnectFailed):
            time.sleep(_PAUSE_S)
