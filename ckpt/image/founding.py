"""The beginning of a chain: its header is made once, and says for good to whom it is encrypted.

Neighbours: `chain` opens what this made, `header` has its text.
"""

import os

from ckpt.errors import CkptError, HostFull, ImageSealed, ImageUnusable
from ckpt.image.access import Access
from ckpt.image.format import HEADER_NAME, LOCK_NAME, TEMPORARY_PREFIX
from ckpt.image.header import encode_header
from ckpt.image.keys import Recipient
from ckpt.image.store import Store

CHAIN_ID_BYTES = 16


def require_no_strangers(store: Store, names: list[str]) -> None:
    """Refuse to make a chain among the files of somebody else.

    Raises:
        ImageUnusable: there are such.
    """
    for name in names:
        if name != LOCK_NAME and not name.startswith(TEMPORARY_PREFIX):
            raise ImageUnusable(
                str(store.path),
                f"it is not an image directory, and not empty (it has {name!r}):"
                " choose another or a new one",
            )


def require_own(store: Store, recipients: tuple[Recipient, ...], access: Access) -> None:
    """Refuse private keys of which none opens the chain; one that fits is enough.

    Raises:
        ImageSealed: the chain is encrypted to others.
    """
    if not {one.recipient for one in access.private} & set(recipients):
        raise ImageSealed(
            str(store.path),
            f"it is encrypted to {_listed(recipients)}, and --identity has no private key of that",
        )


def require_agreed(
    store: Store, wanted: tuple[Recipient, ...], recipients: tuple[Recipient, ...]
) -> None:
    """Refuse to encrypt to others than the chain has been begun with; none wanted are all right.

    Raises:
        ImageUnusable: others are wanted.
    """
    if not wanted or set(wanted) == set(recipients):
        return
    reason = "it is not encrypted, and stays so: give --encrypt-to with a new directory"
    if recipients:
        reason = f"it is encrypted to {_listed(recipients)}: leave --encrypt-to out"
        reason += ", or start another"
    raise ImageUnusable(str(store.path), reason)


def _listed(recipients: tuple[Recipient, ...]) -> str:
    return ", ".join(map(str, recipients))


def make_header(
    store: Store,
    encrypt_to: tuple[Recipient, ...],
    *,
    made_root: bool,
    header: bytes | None = None,
) -> bool:
    """Make the header of a chain; tell whether it was we, and not another ckpt just before us.

    With `header` it is that of a chain that there is already, elsewhere.

    Raises:
        HostFull, ImageBusy, ImageUnusable: it cannot be made; nothing is left of it.
    """
    try:
        with store.lock():
            if HEADER_NAME in store.read_names():
                return False
            try:
                store.replace_file(HEADER_NAME, data=header or _new_header(encrypt_to))
            except (CkptError, KeyboardInterrupt):
                store.remove_fresh(root=made_root)
                raise
    except HostFull:
        # There was not even room for the lock.
        store.remove_fresh(root=made_root)
        raise
    return True


def _new_header(encrypt_to: tuple[Recipient, ...]) -> bytes:
    return encode_header(os.urandom(CHAIN_ID_BYTES).hex(), encrypt_to)
