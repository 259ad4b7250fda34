"""What a receiver does with a session: takes the tree, and says what came of it."""

from collections.abc import Callable

import attrs

from ckpt.engine.restore import wait_for_end
from ckpt.errors import CkptError
from ckpt.migrate.arrival import ReceiveOptions, receive_tree
from ckpt.migrate.fates import NoteMembers
from ckpt.migrate.heir import serve_with_heir
from ckpt.migrate.messages import Running
from ckpt.migrate.session import Session
from ckpt.units import Pid


@attrs.frozen
class Receiver:
    """The handler of sessions (`listen`, `stdio`)."""

    options: ReceiveOptions
    tell: Callable[[Running | CkptError | None], None]
    """What came of a session: it runs here, it failed, or (None) the source has kept it."""

    def __call__(self, session: Session) -> int:
        """Serve one session in this process; return its exit code."""
        return serve_with_heir(session, self._work)

    def _work(self, session: Session, note_members: NoteMembers) -> int:
        try:
            with session.channel:
                came = receive_tree(session, self.options, note_members)
        except CkptError as error:
            self.tell(error)
            return error.exit_code
        self.tell(came)
        if came is None or not self.options.stays:
            return 0
        return wait_for_end(Pid(came.pid))
