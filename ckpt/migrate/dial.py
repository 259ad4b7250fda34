"""Opens the channels of one session: the sender's side of `listen`."""

from ckpt.migrate.channel import Channel, Patience
from ckpt.migrate.destination import Destination
from ckpt.migrate.pace import Bandwidth
from ckpt.migrate.session import Purpose
from ckpt.migrate.tls import ClientTrust


class Dialer:
    """A destination, why we trust it, and (after `open`) what our session there is called."""

    def __init__(
        self,
        destination: Destination,
        trust: ClientTrust | None,
        *,
        patience: Patience | None = None,
        bandwidth: Bandwidth | None = None,
        remote_ckpt: str = "ckpt",
    ) -> None:
        """Connect to nobody yet; `trust` is None with ssh, and only there."""
        raise NotImplementedError

    def open(self) -> Channel:
        """Begin a session and return its first channel.

        Raises:
            ConnectFailed: nobody, or somebody else, answers there.
            NotTrusted: the other side is not the one that the token or the authority means, or
                does not take us for that.
            PeerVersion: no version in common.
            PeerRefused: it takes no session now.
        """
        raise NotImplementedError

    def attach(self, purpose: Purpose) -> Channel:
        """Open a further channel of the session: STREAM, or RESUME after a cut.

        Raises what `open` does; `PeerRefused` with `peer_code` "unknown-session" if the session's
        process over there has ended.
        """
        raise NotImplementedError
