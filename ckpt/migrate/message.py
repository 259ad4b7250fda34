"""What a message is: an attrs class with a number, and caps on what a peer may put into it.

    @message(17)
    @attrs.frozen
    class RoundBegins(Message):
        index: int

    @message(18)
    @attrs.frozen
    class Pages(FrameMessage):           # carries one page frame beside its fields
        first_page: int

Fields are `int`, `str`, `bytes`, `bool`, `float`, attrs classes, `tuple[X, ...]`, dicts, and
`X | None`, no enums. They are decoded strictly: no value is bent to the wanted type. Ranges are
the business of attrs validators on the field, or of whoever receives. What a newer peer added is
left alone. Neighbours: `messages` (the list of them), `frames` (the bytes).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import attrs

from ckpt import fault
from ckpt.image.codec import pack, unpack
from ckpt.image.pages import EncodedFrame, Encoding, require_known
from ckpt.migrate.frames import Header, make_header
from ckpt.resources.plain import strict, structure, unstructure

DEFAULT_FIELD_BYTES = 1 << 16
"""Most bytes of fields in a message that says nothing else."""

MAX_FIELD_BYTES = 1 << 28
"""Most bytes of fields in any message; larger things are cut by whoever sends them."""

if TYPE_CHECKING:
    CarriedFrame = EncodedFrame
else:
    # What decodes the fields must not look into it: it is put in place afterwards.
    CarriedFrame = Any

NO_FRAME = EncodedFrame(b"", Encoding.RAW, 0)


@attrs.frozen
class Message:
    """Something that may be said; each subclass is registered with `message`."""

    NUMBER: ClassVar[int]
    FIELD_BYTES: ClassVar[int]


@attrs.frozen
class FrameMessage(Message):
    """A message that carries one page frame, which is never copied nor packed.

    On the receiving side its checksum was found right and its encoding is known; it is not decoded
    (`image.pages.decode_frame`).
    """

    frame: CarriedFrame = attrs.field(default=NO_FRAME, kw_only=True, repr=False)


M = TypeVar("M", bound=Message)

_KINDS: dict[int, type[Message]] = {}


def message(
    number: int, *, max_field_bytes: int = DEFAULT_FIELD_BYTES
) -> Callable[[type[M]], type[M]]:
    """Register a message type under `number`, once and for ever (a class decorator)."""
    if not 0 < number < 1 << 16 or number in _KINDS or max_field_bytes > MAX_FIELD_BYTES:
        raise TypeError(f"message {number} has a number or a cap that cannot be")

    def register(kind: type[M]) -> type[M]:
        kind.NUMBER = number
        kind.FIELD_BYTES = max_field_bytes
        _KINDS[number] = kind
        return kind

    return register


def require_known_fault() -> None:
    """Refuse a fault at a message that is none of those that were registered.

    Raises:
        UsageError: see `fault.require_message`.
    """
    fault.require_message({kind.__name__ for kind in _KINDS.values()})


def find_kind(number: int) -> type[Message] | None:
    """Return the message type of a number, None if there is none."""
    return _KINDS.get(number)


def encode(what: Message) -> tuple[bytes, EncodedFrame | None]:
    """Return header and fields of a message as bytes, and its page frame.

    Raises:
        ValueError: it is larger than its own type allows, which is a bug of the caller.
    """
    values = {name: unstructure(getattr(what, name)) for name in _field_names(type(what))}
    fields = pack(values) if values else b""
    frame = what.frame if isinstance(what, FrameMessage) else None
    header = make_header(what.NUMBER, fields, frame)
    header.check_caps(what.FIELD_BYTES, frame is not None)
    return header.pack() + fields, frame


def decode(
    kind: type[M], header: Header, fields: bytes | bytearray | memoryview, stored: memoryview
) -> M:
    """Return the message that `encode` took apart; checksums were compared by the caller.

    Raises:
        ValueError: the fields are not those of `kind`, or the frame's encoding is unknown.
    """
    values = unpack(memoryview(fields)) if len(fields) else {}
    try:
        values = strict(values, dict)
        what = structure(
            {name: values[name] for name in _field_names(kind) if name in values}, kind
        )
    except Exception as error:
        # cattrs raises groups, of whatever the hooks and validators raise.
        raise ValueError(f"the fields of its {kind.__name__} are wrong") from error
    if not isinstance(what, FrameMessage):
        return what
    require_known(header.encoding)
    frame = EncodedFrame(stored, Encoding(header.encoding), header.frame_checksum)
    return attrs.evolve(what, frame=frame)


def _field_names(kind: type[Message]) -> tuple[str, ...]:
    """Return the fields that travel as msgpack."""
    return tuple(name for name in attrs.fields_dict(kind) if name != "frame")
