"""What a receiver does with a session: takes the tree, and says what came of it."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import attrs

from ckpt.engine.hooks import run_return
from ckpt.engine.restore import wait_for_end
from ckpt.errors import CkptError, HostFull, RestoreFailed
from ckpt.migrate.arrival import ReceiveOptions, receive_tree
from ckpt.migrate.heir import Notes, serve_with_heir
from ckpt.migrate.messages import Running
from ckpt.migrate.session import Session
from ckpt.migrate.shortage import shortage_named
from ckpt.resources.base import be_silent
from ckpt.units import Pid

_SHM = "/dev/shm"


@attrs.frozen
class Receiver:
    """The handler of sessions (`listen`, `stdio`)."""

    options: ReceiveOptions
    tell: Callable[[Running | CkptError | None], None]
    """What came of a session: it runs here, it failed, or (None) the source has kept it."""
    warn: Callable[[str], None] = be_silent

    def __call__(self, session: Session) -> int:
        """Serve one session in this process; return its exit code."""
        folder = _SHM if Path(_SHM).is_dir() else None
        try:
            with shortage_named():
                private = tempfile.mkdtemp(prefix="ckpt-arriving-", dir=folder)
                work = partial(self._work, private)
                return serve_with_heir(session, work, private, self._undo_arrival)
        except HostFull as error:
            session.channel.refuse(error)
            self.tell(error)
            return error.exit_code

    def _undo_arrival(self, root: Pid) -> None:
        if self.options.on_arrival:
            run_return(self.options.on_return, self.warn, root)

    def _work(self, private: str, session: Session, notes: Notes) -> int:
        try:
            with session.channel, _interrupts_told(), shortage_named():
                came = receive_tree(session, self.options, notes, private)
        except CkptError as error:
            self.tell(error)
            return error.exit_code
        self.tell(came)
        if came is None or not self.options.stays:
            return 0
        return wait_for_end(Pid(came.pid))


@contextlib.contextmanager
def _interrupts_told() -> Iterator[None]:
    """Have the source told of Ctrl-C here, like of any other trouble."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise RestoreFailed("waiting for the source", "the receiver was interrupted") from interrupt
