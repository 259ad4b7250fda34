"""Options that both ends of a migration have: certificates of an authority."""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, TypeVar

import attrs
import click

from ckpt.errors import UsageError

if TYPE_CHECKING:
    from ckpt.migrate.tls import CertificateFiles

F = TypeVar("F", bound=Callable[..., object])


@attrs.frozen
class TlsFiles:
    """`--tls-cert`, `--tls-key`, `--tls-ca`: all of them or none."""

    cert: str | None
    key: str | None
    ca: str | None

    @property
    def given(self) -> bool:
        """Whether any of them was given."""
        return any(value is not None for value in (self.cert, self.key, self.ca))

    def load(self) -> "CertificateFiles | None":
        """Return them for a channel; None if none was given.

        Raises:
            UsageError: some of the three are missing.
        """
        if not self.given:
            return None
        if self.cert is None or self.key is None or self.ca is None:
            raise UsageError("--tls-cert, --tls-key and --tls-ca go together: give all three")
        from ckpt.migrate.tls import CertificateFiles

        return CertificateFiles(self.cert, self.key, self.ca)


def tls_options(command: F) -> F:
    """Add the three options to a command, which gets them as one argument `tls`."""

    @wraps(command)
    def with_files(
        *args: object,
        tls_cert: str | None,
        tls_key: str | None,
        tls_ca: str | None,
        **more: object,
    ) -> object:
        return command(*args, tls=TlsFiles(tls_cert, tls_key, tls_ca), **more)

    options = (
        click.option("--tls-cert", metavar="FILE", help="Our certificate (PEM)."),
        click.option("--tls-key", metavar="FILE", help="Its private key."),
        click.option(
            "--tls-ca", metavar="FILE", help="Who may vouch for the other side's certificate."
        ),
    )
    wrapped: Callable[..., object] = with_files
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]
