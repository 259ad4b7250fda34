"""The options by which two hosts find and trust each other, for `migrate` and `receive` alike."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ckpt.errors import UsageError
from ckpt.migrate.channel import Patience
from ckpt.migrate.destination import Address, SshTarget, parse_destination
from ckpt.migrate.dial import Dialer
from ckpt.migrate.pace import Bandwidth, parse_rate
from ckpt.migrate.pairing import read_token
from ckpt.migrate.tls import CertificateFiles

F = TypeVar("F", bound=Callable[..., Any])


def _apply(command: F, options: tuple[Callable[[F], F], ...]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def _certificate_options() -> tuple[Callable[[F], F], ...]:
    return (
        click.option("--tls-cert", metavar="F", help="Our certificate (PEM), instead of a token."),
        click.option("--tls-key", metavar="F", help="Its key, not encrypted."),
        click.option(
            "--tls-ca", metavar="F", help="The authority that the other side's certificate is of."
        ),
    )


def dial_options(command: F) -> F:
    """Add the options of a sender: `to`, `token_file`, `tls_cert`, `tls_key`, `tls_ca`, ...

    ... `bandwidth` and `remote_ckpt`: all of them for `make_dialer`.
    """
    return _apply(
        command,
        (
            click.option(
                "--to",
                required=True,
                metavar="HOST:PORT",
                help="Where 'ckpt receive' listens; or ssh://USER@HOST, where ssh starts it.",
            ),
            click.option(
                "--token-file",
                metavar="F",
                help="The token that 'ckpt receive' printed, in a file that nobody else may read.",
            ),
            *_certificate_options(),
            click.option(
                "--bandwidth",
                metavar="RATE",
                help="Send memory no faster: 500M and 1G are bits per second, 60MB bytes.",
            ),
            click.option(
                "--remote-ckpt",
                metavar="COMMAND",
                default="ckpt",
                show_default=True,
                help="With ssh://, how ckpt is called over there ('sudo ckpt', a path).",
            ),
        ),
    )


def make_dialer(
    to: str,
    token_file: str | None,
    certificates: CertificateFiles | None,
    bandwidth: str | None,
    remote_ckpt: str,
    patience: Patience | None = None,
) -> Dialer:
    """Return what opens the channels, from the options of `dial_options`.

    Raises:
        UsageError: they make no sense together, or a file cannot be read.
    """
    destination = parse_destination(to)
    if token_file and certificates:
        raise UsageError("--token-file and --tls-... are two ways: give one of them")
    if isinstance(destination, SshTarget) and (token_file or certificates):
        raise UsageError("with ssh:// there is no token and no certificate: ssh knows the host")
    return Dialer(
        destination,
        read_token(token_file) if token_file else certificates,
        patience=patience,
        bandwidth=Bandwidth(parse_rate(bandwidth) if bandwidth else None),
        remote_ckpt=remote_ckpt,
    )


def listen_options(command: F) -> F:
    """Add the options of a receiver: `listen`, `stdio`, `once`, `token_file`, `tls_...`."""
    return _apply(
        command,
        (
            click.option(
                "--listen",
                metavar="HOST:PORT",
                help="Wait there for senders; port 0 takes a free one, :PORT is every address.",
            ),
            click.option(
                "--stdio", is_flag=True, help="Serve one sender on standard input and output."
            ),
            click.option("--once", is_flag=True, help="Serve one sender, and end with it."),
            click.option(
                "--token-file",
                metavar="F",
                help="Write the token there, for its owner only, instead of printing it.",
            ),
            *_certificate_options(),
        ),
    )


def parse_listen(
    listen: str | None, stdio: bool, token_file: str | None, certificates: CertificateFiles | None
) -> Address | None:
    """Return where to listen; None: on the standard streams.

    Raises:
        UsageError: the options make no sense together.
    """
    if stdio == (listen is not None):
        raise UsageError("give --listen HOST:PORT, or --stdio")
    if stdio and (token_file or certificates):
        raise UsageError("with --stdio, whoever started ckpt is trusted: no token, no certificate")
    if token_file and certificates:
        raise UsageError("--token-file and --tls-... are two ways: give one of them")
    return None if listen is None else Address.parse(listen)


def read_certificates(cert: str | None, key: str | None, ca: str | None) -> CertificateFiles | None:
    """Return the three `--tls-...`; None if there are none.

    Raises:
        UsageError: there are some, but not all.
    """
    if cert and key and ca:
        return CertificateFiles(cert, key, ca)
    if cert or key or ca:
        raise UsageError("--tls-cert, --tls-key and --tls-ca belong together: give all three")
    return None
