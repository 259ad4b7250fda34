"""Records to plain values (of an image) and back, strictly: no value is bent to a wanted type.

By cattrs, which is imported when the first record is converted: after the target runs again.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from cattrs import Converter

R = TypeVar("R")


@lru_cache(maxsize=1)
def _converter() -> "Converter":
    from cattrs import Converter

    converter = Converter(unstruct_collection_overrides={tuple: list})
    for kind in (int, str, bytes, bool, float):
        converter.register_structure_hook(kind, strict)
    return converter


def strict(value: object, kind: type[R]) -> R:
    """Return `value` if it is of exactly this type.

    Raises:
        TypeError: it is not.
    """
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def structure(values: Mapping[str, object], record: type[R]) -> R:
    """Return the `record` that `values` describe; fields it does not know are left alone.

    Raises:
        Exception: a field is missing or has a wrong type (cattrs raises groups of errors).
    """
    return _converter().structure(values, record)


def unstructure(record: object) -> object:
    """Return a record as plain values: maps, lists, numbers, text, bytes."""
    return _converter().unstructure(record)
