"""Nobody without token or certificate gets past the handshake, on either side."""

import contextlib
import datetime
import hashlib
import ipaddress
import os
import select
import socket
import ssl
import threading

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ckpt.errors import ConnectFailed, NotTrusted, PeerLost, PeerVersion, ProtocolError, UsageError
from ckpt.migrate import handshake
from ckpt.migrate.channel import Channel
from ckpt.migrate.destination import Address, SshTarget
from ckpt.migrate.dial import Dialer
from ckpt.migrate.handshake import NEWEST_VERSION, PREFACE_BYTES, pack_preface
from ckpt.migrate.messages import Challenge, Hello, Proof, Welcome
from ckpt.migrate.pairing import Token
from ckpt.migrate.tls import CertificateFiles, accept_tls, load_identity, make_identity
from tests.migrate.ends import SHORT
from tests.migrate.receivers import PATIENT, dialer_to, echo, open_when_there_is_room, serving
from tests.migrate.spoken import Word

PEM = Encoding.PEM


@pytest.fixture(scope="module")
def paired():
    with serving(echo) as (listener, _):
        yield listener


@pytest.fixture(autouse=True)
def unharmed(paired):
    """Whatever a test does: the listener serves the next one, and wrong ones began no session."""
    yield
    with open_when_there_is_room(paired) as channel:
        channel.send(Word("hello"))
        assert channel.receive(Word).text == "hello"


def dial(listener, trust):
    return Dialer(listener.address, trust, patience=PATIENT).open()


def test_another_secret_is_not_let_in(paired):
    wrong = attrs.evolve(paired.token, secret=os.urandom(32))
    with pytest.raises(NotTrusted, match="another token"):
        dial(paired, wrong)


def test_another_fingerprint_is_not_spoken_to(paired):
    wrong = attrs.evolve(paired.token, fingerprint=os.urandom(32))
    with pytest.raises(NotTrusted, match="certificate is not the one in the token"):
        dial(paired, wrong)


def test_without_a_token_nothing_is_tried():
    with pytest.raises(UsageError, match="token"):
        Dialer(Address("127.0.0.1", 1))
    with pytest.raises(UsageError, match="ssh"):
        Dialer(SshTarget(None, "host", None), Token.make(bytes(32)))


def test_a_proof_made_for_another_certificate_is_worth_nothing(paired):
    """Somebody in between who has the fingerprint of his own pinned gains nothing by it."""
    dialer = dialer_to(paired)
    dialer._pairing = attrs.evolve(dialer._pairing, binding=os.urandom(32))
    with pytest.raises(NotTrusted, match="another token"):
        dialer.open()


@contextlib.contextmanager
def impostor(answer):
    """Listen, and do `answer` with the first connection in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield Address(*server.getsockname())
        thread.join()


def test_a_receiver_that_does_not_know_the_secret_is_not_trusted():
    identity = make_identity()

    def answer(connection):
        connection.recv(PREFACE_BYTES, socket.MSG_WAITALL)
        with Channel(accept_tls(connection.dup(), identity, "x", 5.0), patience=PATIENT) as channel:
            channel.receive(Hello)
            channel.send(Challenge(version=NEWEST_VERSION, nonce=os.urandom(32)))
            channel.receive(Proof)
            channel.send(Welcome(mac=os.urandom(32), session_id=b"i" * 16, session_key=b"k" * 32))
            channel.is_readable(5.0)

    with impostor(answer) as address, pytest.raises(NotTrusted, match="does not know the secret"):
        Dialer(address, identity.token, patience=PATIENT).open()


def test_tls_1_2_is_refused_by_the_receiver(paired):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((paired.address.host, paired.address.port), 5) as connection:
        connection.sendall(pack_preface(b""))
        with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
            context.wrap_socket(connection)


def test_tls_1_2_is_refused_by_the_sender():
    identity = make_identity()
    identity.context.minimum_version = ssl.TLSVersion.TLSv1_2
    identity.context.maximum_version = ssl.TLSVersion.TLSv1_2

    def answer(connection):
        connection.recv(PREFACE_BYTES, socket.MSG_WAITALL)
        with pytest.raises(ConnectFailed):
            accept_tls(connection.dup(), identity, "x", 5.0)

    with impostor(answer) as address, pytest.raises(ConnectFailed, match=r"no TLS 1\.3"):
        Dialer(address, identity.token, patience=PATIENT).open()


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"", os.urandom(1 << 12)])
def test_a_server_of_something_else_is_no_receiver(paired, answer):
    with (
        impostor(lambda connection: connection.sendall(answer)) as address,
        pytest.raises(ConnectFailed),
    ):
        Dialer(address, paired.token, patience=PATIENT).open()


def test_a_bit_that_somebody_in_between_flips_ends_the_channel(paired):
    with socket.create_server(("127.0.0.1", 0)) as server:
        flip = threading.Event()
        between = threading.Thread(target=carry_and_flip, args=(server, paired.address, flip))
        between.start()
        dialer = Dialer(Address(*server.getsockname()), paired.token, patience=PATIENT)
        with dialer.open() as channel:
            channel.send(Word("hello"))
            assert channel.receive(Word).text == "hello"
            flip.set()
            channel.send(Word("hello"))
            with pytest.raises((ProtocolError, PeerLost)):
                channel.receive(Word)
        between.join()


def carry_and_flip(server, address, flip):
    """Carry bytes both ways; once `flip` is set, one bit of the next ones is another."""
    near, _ = server.accept()
    far = socket.create_connection((address.host, address.port))
    with near, far:
        while True:
            for came, goes in ((near, far), (far, near)):
                if select.select([came], [], [], 0.01)[0]:
                    data = bytearray(came.recv(1 << 16))
                    if not data:
                        return
                    if flip.is_set():
                        data[len(data) // 2] ^= 4
                    goes.sendall(data)


def test_a_server_that_says_nothing_is_given_up(paired):
    with (
        impostor(lambda connection: connection.recv(1 << 16, socket.MSG_WAITALL)) as address,
        pytest.raises(ConnectFailed, match=r"within 0\.5 s"),
    ):
        Dialer(address, paired.token, patience=SHORT).open()


def test_nobody_listens(paired):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address(*server.getsockname())
    with pytest.raises(ConnectFailed, match="refused"):
        Dialer(address, paired.token).open()


@pytest.mark.parametrize(("oldest", "newest"), [(4, 5), (0, 2), (5, 4), (-1, -1)])
def test_versions_without_a_common_one_are_told_apart(paired, monkeypatch, oldest, newest):
    dialer = dialer_to(paired)
    monkeypatch.setattr(handshake, "OLDEST_VERSION", oldest)
    monkeypatch.setattr(handshake, "NEWEST_VERSION", newest)
    with pytest.raises(PeerVersion) as raised:
        dialer.open()
    assert raised.value.theirs == "3"


# Certificates of an authority.


class Authority:
    """Signs certificates, into files."""

    def __init__(self, directory):
        self._directory = directory
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, directory.name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        directory.mkdir()
        own = self._sign(self._name, self._key.public_key())
        own = own.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.ca = self._write("ca.pem", own.sign(self._key, hashes.SHA256()))

    def issue(self, host, ca=None):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
        certificate = self._sign(name, key.public_key()).add_extension(names, critical=False)
        cert = self._write(f"{host}.pem", certificate.sign(self._key, hashes.SHA256()))
        pem = key.private_bytes(PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        (self._directory / f"{host}.key").write_bytes(pem)
        return CertificateFiles(cert, str(self._directory / f"{host}.key"), ca or self.ca)

    def _sign(self, subject, public_key):
        now = datetime.datetime.now(datetime.UTC)
        return x509.CertificateBuilder(
            issuer_name=self._name,
            subject_name=subject,
            public_key=public_key,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(hours=1),
            not_valid_after=now + datetime.timedelta(hours=1),
        )

    def _write(self, name, certificate):
        (self._directory / name).write_bytes(certificate.public_bytes(PEM))
        return str(self._directory / name)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def certified(authority):
    with serving(echo, trust=authority.issue("127.0.0.1")) as (listener, _):
        yield listener


def test_certificates_of_one_authority_trust_each_other(authority, certified):
    assert certified.token is None
    with dial(certified, authority.issue("127.0.0.9")) as channel:
        channel.send(Word("hello"))
        assert channel.receive(Word).text == "hello"


def test_a_sender_of_another_authority_is_not_let_in(tmp_path, authority, certified):
    other = Authority(tmp_path / "other")
    with pytest.raises(NotTrusted):
        dial(certified, other.issue("127.0.0.9", ca=authority.ca))


def test_a_sender_without_a_certificate_is_not_let_in(certified):
    token = Token.make(fingerprint_of(certified))
    with pytest.raises(NotTrusted):
        dial(certified, token)


def fingerprint_of(listener):
    """Ask the receiver itself, as a thief would."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    where = (listener.address.host, listener.address.port)
    with socket.create_connection(where, 5) as connection:
        connection.sendall(pack_preface(b""))
        with context.wrap_socket(connection) as tls:
            return hashlib.sha256(tls.getpeercert(binary_form=True)).digest()


def test_a_receiver_of_another_authority_is_not_trusted(tmp_path, certified):
    other = Authority(tmp_path / "other")
    with pytest.raises(NotTrusted, match="certificate"):
        dial(certified, other.issue("127.0.0.9"))


def test_a_receiver_of_another_name_is_not_trusted(authority):
    with (
        serving(echo, trust=authority.issue("127.0.0.2")) as (listener, _),
        pytest.raises(NotTrusted, match=r"127\.0\.0\.1"),
    ):
        dial(listener, authority.issue("127.0.0.9"))


def test_files_that_are_none_are_refused(authority, tmp_path):
    good = authority.issue("127.0.0.1")
    with pytest.raises(UsageError, match="No such file"):
        load_identity(attrs.evolve(good, cert=str(tmp_path / "missing")))
    with pytest.raises(UsageError, match="PEM"):
        load_identity(attrs.evolve(good, key=good.ca))
    with pytest.raises(UsageError, match="PEM"):
        load_identity(attrs.evolve(good, key=authority.issue("127.0.0.3").key))
