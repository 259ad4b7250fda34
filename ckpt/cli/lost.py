"""A word about a newest generation that is gone, from commands that only look: they go on."""

from ckpt.cli.output import note
from ckpt.errors import ImageError
from ckpt.image.chain import Chain
from ckpt.image.newest import require_newest


def warn_of_loss(chain: Chain) -> None:
    """Say so if the newest generation is gone, or what says which it is cannot be read."""
    try:
        require_newest(chain.store, chain.chain_id)
    except ImageError as error:
        note(str(error))
