"""TLS 1.3 and nothing older: the two ways in which two hosts trust each other over the network.

Paired by a token (`pairing`): the receiver's certificate is its own and new, the sender pins its
fingerprint, and both prove in the handshake (`handshake`) that they know the token's secret. Or by
certificates of an authority, on both sides.
"""

import attrs

from ckpt.migrate.pairing import Token


@attrs.frozen
class CertificateFiles:
    """`--tls-cert`, `--tls-key`, `--tls-ca`: who we are, and who may say who the peer is."""

    cert: str
    key: str
    ca: str


ClientTrust = Token | CertificateFiles
"""What a sender needs to trust a receiver; with ssh, nothing."""
