"""Records to plain values (of an image) and back, strictly: no value is bent to a wanted type.

Back by cattrs, which is imported when the first record is read: never in a dump.
"""

from collections.abc import Mapping
from functools import cache, lru_cache
from types import GenericAlias
from typing import TYPE_CHECKING, TypeVar, get_args

import attrs

if TYPE_CHECKING:
    from cattrs import Converter

R = TypeVar("R")


@lru_cache(maxsize=1)
def _converter() -> "Converter":
    from cattrs import Converter

    converter = Converter()
    for kind in (int, str, bytes, bool, float):
        converter.register_structure_hook(kind, strict)
    converter.register_structure_hook_func(
        lambda kind: isinstance(kind, GenericAlias) and kind.__origin__ is tuple,
        lambda value, kind: _structure_tuple(converter, value, kind),
    )
    return converter


def _structure_tuple(
    converter: "Converter", value: object, kind: type[tuple[object, ...]]
) -> tuple[object, ...]:
    """Take a list and nothing else, of the right length: cattrs alone takes whatever iterates."""
    values: list[object] = strict(value, list)
    kinds = get_args(kind)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    if len(kinds) != len(values):
        raise ValueError(f"{len(kinds)} values expected, {len(values)} found")
    structured = []
    for index, (one, its_kind) in enumerate(zip(values, kinds, strict=True)):
        try:
            structured.append(converter.structure(one, its_kind))
        except Exception as error:
            error.add_note(str(index))
            raise
    return tuple(structured)


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


def unstructure(value: object) -> object:
    """Return a record as plain values: maps, lists, numbers, text, bytes.

    Not by cattrs, which would first compile a function for each class: a quarter of the time of a
    small dump.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, tuple | list):
        return [unstructure(one) for one in value]
    if isinstance(value, dict):
        return {key: unstructure(one) for key, one in value.items()}
    if isinstance(value, int | str):
        # An enum, or another kind of number: msgpack writes what it holds.
        return value
    return {name: unstructure(getattr(value, name)) for name in _field_names(kind)}  # type: ignore[arg-type]


_PLAIN = frozenset({int, str, bytes, bool, float, type(None)})


@cache
def _field_names(record: type) -> tuple[str, ...]:
    """Return the fields of an attrs class.

    Raises:
        NotAnAttrsClassError: it is none, which is a bug of the resource.
    """
    return tuple(field.name for field in attrs.fields(record))
