"""TLS 1.3 and nothing older: the two ways in which two hosts trust each other over the network.

Paired by a token (`pairing`): the receiver's certificate is its own and new, the sender pins its
fingerprint, and both prove in the handshake (`handshake`) that they know the token's secret. Or by
certificates of an authority, on both sides: whoever has one of that authority is let in, and the
receiver's has to name the host that was asked for.
"""

import contextlib
import datetime
import hashlib
import hmac
import os
import select
import socket
import ssl
import time

import attrs

from ckpt.errors import ConnectFailed, MigrateError, NotTrusted, UsageError
from ckpt.migrate.pairing import Token
from ckpt.migrate.transport import TlsTransport, describe_tls, wait_for

_LAST_WORD_S = 1.0


@attrs.frozen
class CertificateFiles:
    """`--tls-cert`, `--tls-key`, `--tls-ca`: who we are, and who may say who the peer is."""

    cert: str
    key: str
    ca: str


ClientTrust = Token | CertificateFiles
"""What a sender needs to trust a receiver; with ssh, nothing."""


@attrs.frozen
class ServerIdentity:
    """What a receiver answers with."""

    context: ssl.SSLContext
    token: Token | None
    """To be shown to the sender; None where the authority is what counts."""


def make_identity() -> ServerIdentity:
    """Make a certificate that signs itself, and a token for it. Takes a few milliseconds."""
    certificate, key = _self_signed()
    context = _server_context()
    _load_pem(context, certificate + key)
    fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode())).digest()
    return ServerIdentity(context, Token.make(fingerprint))


def load_identity(files: CertificateFiles) -> ServerIdentity:
    """Read the files of an authority; whoever connects needs a certificate of the same.

    Raises:
        UsageError: they cannot be read, or do not belong together.
    """
    context = _server_context()
    _load_files(context, files)
    context.verify_mode = ssl.CERT_REQUIRED
    return ServerIdentity(context, None)


def _self_signed() -> tuple[bytes, bytes]:
    """Return a certificate and its key, both PEM."""
    # 30 ms to import, and only those who listen without files need it.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ckpt receive")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Nobody looks at these: it is pinned, and gone with the process.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return certificate.public_bytes(pem), key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_pem(context: ssl.SSLContext, pem: bytes) -> None:
    """Give certificate and key to OpenSSL, which wants a file: one in memory only."""
    fd = os.memfd_create("ckpt-certificate", os.MFD_CLOEXEC)
    with open(fd, "wb", buffering=0) as file:
        file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Every connection shakes hands in full.
    context.num_tickets = 0
    return context


def _client_context(trust: ClientTrust) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if isinstance(trust, CertificateFiles):
        _load_files(context, trust)
    else:
        # The fingerprint is compared instead, before a byte is sent.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _load_files(context: ssl.SSLContext, files: CertificateFiles) -> None:
    try:
        # Without a password of ours, OpenSSL would ask the terminal for that of an encrypted key.
        context.load_cert_chain(files.cert, files.key, password="")
        context.load_verify_locations(files.ca)
    except ssl.SSLError as error:
        raise UsageError(
            f"{files.cert}, {files.key} and {files.ca} are no certificate, its key (unencrypted)"
            f" and an authority, all PEM: {describe_tls(error)}"
        ) from error
    except OSError as error:
        raise UsageError(f"the files of --tls-...: {error.strerror}") from error


def connect_tls(
    plain: socket.socket, trust: ClientTrust, host: str, peer: str, timeout_s: float
) -> TlsTransport:
    """Make the sender's end of a connection (owned from here on), and know who the receiver is.

    Raises:
        NotTrusted: it has another certificate than the one that is trusted.
        ConnectFailed: it speaks no TLS 1.3, or says nothing in time.
    """
    tls = _shake_hands(plain, _client_context(trust), peer, timeout_s, host)
    if isinstance(trust, Token):
        found = hashlib.sha256(tls.getpeercert(binary_form=True) or b"").digest()
        if not hmac.compare_digest(found, trust.fingerprint):
            tls.close()
            raise NotTrusted(
                peer=peer,
                reason="its certificate is not the one in the token (is the token that of an"
                " earlier 'ckpt receive', or somebody in between?)",
            )
    return TlsTransport(tls, peer)


def accept_tls(
    plain: socket.socket, identity: ServerIdentity, peer: str, timeout_s: float
) -> TlsTransport:
    """Make the receiver's end of a connection (owned from here on).

    Raises:
        NotTrusted: certificates are asked for, and the sender has none of our authority.
        ConnectFailed: it speaks no TLS 1.3, or says nothing in time.
    """
    return TlsTransport(_shake_hands(plain, identity.context, peer, timeout_s, None), peer)


def _shake_hands(
    plain: socket.socket, context: ssl.SSLContext, peer: str, timeout_s: float, host: str | None
) -> ssl.SSLSocket:
    """Do the TLS handshake, of a server if `host` is None; `timeout_s` is for all of it."""
    tls: ssl.SSLSocket | None = None
    try:
        plain.settimeout(timeout_s)
        tls = context.wrap_socket(
            plain, server_side=host is None, server_hostname=host, do_handshake_on_connect=False
        )
        tls.do_handshake()
    except OSError as error:
        connection = tls or plain
        failure = _turn_failure(error, peer, timeout_s)
        if isinstance(failure, NotTrusted):
            _let_read(connection)
        connection.close()
        raise failure from error
    return tls


def _let_read(connection: socket.socket) -> None:
    """Let the peer read why: it has sent more already; closing on that resets the connection."""
    ends_s = time.monotonic() + _LAST_WORD_S
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while (wait_s := ends_s - time.monotonic()) > 0:
            if not wait_for(connection.fileno(), select.POLLIN, wait_s):
                return
            if not os.read(connection.fileno(), 1 << 16):
                return


def _turn_failure(error: OSError, peer: str, timeout_s: float) -> MigrateError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return NotTrusted(peer=peer, reason=f"its certificate: {error.verify_message}")
    if is_about_certificates(error):
        assert isinstance(error, ssl.SSLError)
        return NotTrusted(peer=peer, reason=f"TLS: {describe_tls(error)}")
    if isinstance(error, TimeoutError):
        return ConnectFailed(peer=peer, reason=f"no TLS handshake within {timeout_s:g} s")
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return ConnectFailed(peer=peer, reason=f"it speaks no TLS 1.3: {describe_tls(error)}")
    return ConnectFailed(peer=peer, reason="it ended the connection in the TLS handshake")


def is_about_certificates(error: BaseException | None) -> bool:
    """Tell whether TLS failed because a side has no certificate that the other takes."""
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    return "CERT" in reason or "UNKNOWN_CA" in reason
