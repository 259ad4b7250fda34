"""Plain values (of an image) to records, strictly: no value is bent to the type that is wanted.

For records that hold other records whose class is told by a name beside them. cattrs is imported
when the first one is converted: a dump never needs it while the target stands still.
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

    converter = Converter()
    for kind in (int, str, bytes, bool, float):
        converter.register_structure_hook(kind, _strict)
    return converter


def _strict(value: object, kind: type[R]) -> R:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def structure(values: Mapping[str, object], record: type[R]) -> R:
    """Return the `record` that `values` describe; fields it does not know are left alone.

    Raises:
        Exception: a field is missing or has a wrong type (cattrs raises groups of errors).
    """
    return _converter().structure(values, record)
