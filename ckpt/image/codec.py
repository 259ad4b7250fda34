"""The one place that knows msgpack and byte order: objects and packed columns to bytes and back.

Everything of an image that is not page content goes through here. Neighbours: `format` builds the
manifest out of it, `runs` and `pages` pack their columns with it. Nothing here touches a file; what
is wrong with the bytes is a `ValueError` with a reason, and the caller, who knows the path, turns
it into `ImageCorrupt`.
"""

import sys
from array import array
from typing import NoReturn, TypeVar

import msgpack  # type: ignore[import-untyped]

T = TypeVar("T")

MAX_ARRAY_LEN = 1 << 20
"""Longest msgpack array accepted: an array is allocated by its announced length."""

MAX_MAP_LEN = 1 << 20
"""Most entries of a msgpack map accepted."""


def pack(value: object) -> bytes:
    """Encode dicts, lists, tuples, str, bytes, int, float, bool and None with msgpack.

    Options, each for a reason:
        use_bin_type: bytes and text stay apart, so that page tables are never decoded as text.
        use_single_float=False: times keep all their digits.
        unicode_errors=surrogateescape: a path of the target is bytes to Linux; `os.fsdecode` turns
            what is no UTF-8 into lone surrogates, and they must come back as they were.
        strict_types=False: tuples and int/str enums are written as what they hold; the reading side
            puts types back by its schema, not by what the bytes claim.
        datetime=False: nothing in an image is an extension type.

    Raises:
        TypeError: `value` holds something else; OverflowError: an int of more than 64 bits. Both
            are bugs of the caller.
    """
    packed: bytes = msgpack.packb(
        value,
        use_bin_type=True,
        use_single_float=False,
        unicode_errors="surrogateescape",
        strict_types=False,
        datetime=False,
    )
    return packed


def _refuse_extension(kind: int, _data: bytes) -> NoReturn:
    raise ValueError(f"it holds a msgpack extension of type {kind}, and the format has none")


def unpack(data: bytes | memoryview) -> object:
    """Decode what `pack` made; arrays come back as lists.

    `data` may be hostile. Text and binary values cannot be longer than `data`, which is in memory
    already and was capped by the caller; arrays and maps are allocated by the length they announce,
    so that is capped here, by the bytes there are and absolutely. Options, each for a reason:
        raw=False with surrogateescape: the reverse of `pack`.
        strict_map_key: keys are text (or bytes), never something that compares by surprise.
        use_list: what comes back can be compared with what `pack` was given, if that had lists.
        timestamp=2 and the hook: the one built-in extension becomes a harmless int (then refused by
            any schema that wanted something else), every other one is refused.

    Raises:
        ValueError: it is not msgpack, is cut short, goes on after its end, is nested too deeply,
            or announces too much.
    """
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            unicode_errors="surrogateescape",
            strict_map_key=True,
            use_list=True,
            timestamp=2,
            ext_hook=_refuse_extension,
            max_array_len=min(MAX_ARRAY_LEN, len(data)),
            max_map_len=min(MAX_MAP_LEN, len(data)),
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        # FormatError and StackError have no text of their own.
        raise ValueError(f"not valid msgpack: {str(error) or type(error).__name__}") from error


class Fields:
    """Takes typed values out of a map from an image; `ValueError` names the field."""

    def __init__(self, value: object, where: str) -> None:
        """Take from `value`, which should be a map; `where` names it in messages."""
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where} is not a map with text as keys")
        self._left: dict[str, object] = dict(value)
        self._where = where

    def take(self, name: str, kind: type[T]) -> T:
        """Take out a value of that type."""
        value = self._left.pop(name, None)
        # bool is an int to isinstance, and to no schema.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self._where} has no {kind.__name__} named {name!r}")
        return value

    def look(self, name: str, kind: type[T]) -> T:
        """Return a value of that type, and leave it there."""
        value = self.take(name, kind)
        self._left[name] = value
        return value

    def take_map(self, name: str) -> dict[str, object]:
        """Take out a map with text as keys."""
        return Fields(self._left.pop(name, None), repr(name)).rest()

    def take_optional(self, name: str) -> object:
        """Take out a value, None if there is none."""
        return self._left.pop(name, None)

    def rest(self) -> dict[str, object]:
        """Return what was not taken."""
        return self._left


def pack_column(column: "array[int]") -> bytes:
    """Return the elements of `column` as little endian bytes."""
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column.tobytes()


def unpack_column(typecode: str, data: bytes | memoryview) -> "array[int]":
    """Read a column of `typecode` (`B`, `I` or `Q`: 1, 4 or 8 bytes) written by `pack_column`.

    Raises:
        ValueError: `data` is no whole number of elements.
    """
    column: array[int] = array(typecode)
    column.frombytes(data)
    if sys.byteorder == "big":
        column.byteswap()
    return column
