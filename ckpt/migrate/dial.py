"""Opens the channels of one session: the sender's side of `listen` and `stdio`."""

from ckpt.errors import ConnectFailed, PeerLost, UsageError
from ckpt.migrate.channel import Channel, Patience
from ckpt.migrate.destination import Address, Destination, SshTarget
from ckpt.migrate.handshake import NEW_SESSION, Pairing, Ticket, greet, nobody_answers, pack_preface
from ckpt.migrate.messages import Purpose
from ckpt.migrate.pace import Bandwidth
from ckpt.migrate.pairing import Token
from ckpt.migrate.sockets import connect
from ckpt.migrate.ssh import SshConnection
from ckpt.migrate.tls import ClientTrust, connect_tls
from ckpt.migrate.transport import Transport


class Dialer:
    """A destination, why we trust it, and (after `open`) what our session there is called."""

    def __init__(
        self,
        destination: Destination,
        trust: ClientTrust | None = None,
        *,
        patience: Patience | None = None,
        bandwidth: Bandwidth | None = None,
        remote_ckpt: str = "ckpt",
    ) -> None:
        """Connect to nobody yet. All channels share `bandwidth`.

        Raises:
            UsageError: no `trust`, but with ssh, which needs none and takes none.
        """
        if isinstance(destination, SshTarget) and trust is not None:
            raise UsageError("with ssh:// there is no token and no certificate: ssh knows the host")
        if isinstance(destination, Address) and trust is None:
            raise UsageError(
                f"to trust {destination}, its token is needed (--token-file, as 'ckpt receive'"
                " printed it), or certificates (--tls-cert, --tls-key, --tls-ca)"
            )
        self._destination = destination
        self._trust = trust
        self._pairing = (
            Pairing(trust.secret, trust.fingerprint) if isinstance(trust, Token) else Pairing()
        )
        self._patience = patience or Patience()
        self._bandwidth = bandwidth or Bandwidth()
        self._remote_ckpt = remote_ckpt
        self._ticket: Ticket | None = None

    def open(self) -> Channel:
        """Begin a session and return its first channel.

        Raises:
            ConnectFailed: nobody, or somebody else, answers there.
            NotTrusted: the other side is not the one that the token or the authority means, or
                does not take us for that.
            PeerVersion: no version in common.
            PeerRefused: it takes no session now (`peer_code` "busy").
        """
        return self._open(Purpose.BEGIN, None)

    def attach(self, purpose: Purpose) -> Channel:
        """Open a further channel of the session: STREAM, or RESUME after a cut.

        Raises what `open` does; `PeerRefused` with `peer_code` "unknown-session" if the session's
        process over there has ended.
        """
        if self._ticket is None:
            raise TypeError("attach before open")
        return self._open(purpose, self._ticket)

    def _open(self, purpose: Purpose, ticket: Ticket | None) -> Channel:
        preface = pack_preface(ticket.session_id if ticket else NEW_SESSION)
        if isinstance(self._destination, SshTarget):
            ssh = SshConnection(self._destination, self._remote_ckpt)
            try:
                return self._begin(ssh.transport, preface, purpose, ticket)
            except ConnectFailed as error:
                raise ssh.explain(error) from error
        return self._begin(self._connect(self._destination, preface), b"", purpose, ticket)

    def _connect(self, address: Address, preface: bytes) -> Transport:
        assert self._trust is not None
        plain = connect(address, self._patience.handshake_s)
        try:
            plain.sendall(preface)
        except OSError as error:
            plain.close()
            raise nobody_answers(str(address), error.strerror or str(error)) from error
        timeout_s = self._patience.handshake_s
        return connect_tls(plain, self._trust, address.host, str(address), timeout_s)

    def _begin(
        self, transport: Transport, preface: bytes, purpose: Purpose, ticket: Ticket | None
    ) -> Channel:
        channel = Channel(transport, patience=self._patience, bandwidth=self._bandwidth)
        try:
            _send_preface(transport, preface, self._patience.handshake_s)
            self._ticket = greet(channel, purpose, ticket, self._pairing)
        except BaseException:
            channel.close()
            raise
        return channel


def _send_preface(transport: Transport, preface: bytes, wait_s: float) -> None:
    """Send what comes before the first message; it fits into any buffer, or nobody reads."""
    if preface:
        try:
            sent = transport.write(memoryview(preface), wait_s)
        except PeerLost as error:
            raise nobody_answers(transport.peer, error.reason) from error
        if sent != len(preface):
            raise nobody_answers(transport.peer, "nobody reads there")
