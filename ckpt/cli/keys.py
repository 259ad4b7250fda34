"""The options of encrypted images: to whom, and the private key that opens them."""

import click

from ckpt.image.access import Access
from ckpt.image.keys import (
    PrivateKey,
    Recipient,
    distinct,
    read_private_keys,
    read_recipients,
)


def _parse_identities(
    _ctx: click.Context, _option: click.Parameter, files: tuple[str, ...]
) -> tuple[PrivateKey, ...]:
    return tuple(key for file in files for key in read_private_keys(file))


def _parse_recipients(
    _ctx: click.Context, _option: click.Parameter, texts: tuple[str, ...]
) -> tuple[Recipient, ...]:
    return distinct(one for text in texts for one in read_recipients(text))


identity_option = click.option(
    "--identity",
    "private",
    multiple=True,
    callback=_parse_identities,
    metavar="FILE",
    help="The private key of an encrypted image, in a file of 'ckpt keygen'; may be repeated.",
)
"""The `--identity` of every command that reads images; arrives as `private`, for `access_of`."""

encrypt_to_option = click.option(
    "--encrypt-to",
    multiple=True,
    callback=_parse_recipients,
    metavar="RECIPIENT|FILE",
    help="Encrypt a new IMAGE_DIR, and all that is ever added to it, to a recipient that 'ckpt"
    " keygen' printed (ckpt1...), or to those in FILE (a private key there: to its recipient);"
    " may be repeated. To add to it takes no key.",
)


def access_of(private: tuple[PrivateKey, ...], *, trusts_anybody: bool = True) -> Access:
    """Return how a command reads an image."""
    return Access(trusts_anybody=trusts_anybody, private=private)
