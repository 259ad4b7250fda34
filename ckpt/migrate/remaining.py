"""What remains of a tree whose memory is still wanted elsewhere: the source's side of `--lazy`.

The tree runs there; here it stands still, doomed, and is read until all has come (`serving`). A cut
does no harm while the destination can be reached again. Neighbours: `handover` comes before,
`arriving_late` is the other side.
"""

import contextlib
import time
from collections.abc import Callable

from ckpt.errors import CkptError, PeerLost, PeerRefused, TreeLost
from ckpt.migrate.channel import Channel
from ckpt.migrate.dial import Dialer
from ckpt.migrate.messages import Abort, AllThere, Complete, Done, Purpose
from ckpt.migrate.serving import Serving

_GIVE_UP_S = 600.0
"""How long to try to reach the destination again: longer than it waits for us."""
_TELL_S = 2.0
_PAUSE_S = 0.2


def await_complete(
    channel: Channel, dialer: Dialer, serving: Serving, tell: Callable[[str], None]
) -> None:
    """Wait until the destination has all pages; meanwhile they are served in threads.

    State:  the tree runs there; here it stands still. Nothing of it is needed when this returns, or
            raises.

    Raises:
        TreeLost: the destination has lost it, or was lost itself.
    """
    answer = _listen(channel, serving, tell)
    if answer is None:
        tell("the connection was cut while memory was fetched: trying to reach the destination")
    heard_s = time.monotonic()
    while answer is None:
        if time.monotonic() - heard_s > _GIVE_UP_S:
            raise TreeLost(f"the destination could not be reached for {_GIVE_UP_S:g} s")
        time.sleep(_PAUSE_S)
        try:
            with dialer.attach(Purpose.RESUME) as again:
                again.send(AllThere())
                heard_s = time.monotonic()
                answer = _listen(again, serving, tell)
        except PeerRefused as error:
            if error.peer_code == "unknown-session":
                answer = _judge_alone(serving)
        except CkptError:
            continue
    if isinstance(answer, Abort):
        raise TreeLost(answer.reason)


def _listen(
    channel: Channel, serving: Serving, tell: Callable[[str], None]
) -> Complete | Abort | None:
    """Wait for the answer, and tell how far it is; None: the connection was cut."""
    told, told_s = 0, time.monotonic()
    received, heard_s = channel.traffic.received_bytes, time.monotonic()
    try:
        while True:
            answer = channel.try_receive(Complete, Abort, timeout_s=_TELL_S / 4)
            now_s = time.monotonic()
            if answer is not None:
                with contextlib.suppress(PeerLost, PeerRefused):
                    channel.send(Done())
                assert isinstance(answer, Complete | Abort)
                return answer
            if channel.traffic.received_bytes != received:
                received, heard_s = channel.traffic.received_bytes, now_s
            elif now_s - heard_s > channel.patience.silence_s:
                return None
            sent = serving.sent_bytes
            if sent != told and now_s - told_s > _TELL_S:
                told, told_s = sent, now_s
                tell(f"it runs there; {sent / 1e6:.0f} of {serving.total_bytes / 1e6:.0f} MB came")
    except (PeerLost, PeerRefused):
        return None


def _judge_alone(serving: Serving) -> Complete | Abort:
    """Say what became of it when nobody is left there who could tell."""
    if serving.sent_bytes == serving.total_bytes:
        return Complete()
    return Abort("the receiver has ended before all of its memory had come")
