"""Every record goes into an image and comes back the same, and a wrong one is refused."""

import typing

import attrs
import cattrs
import pytest

from ckpt.image.codec import pack, unpack
from ckpt.resources import registry
from ckpt.resources.plain import structure

RESOURCES = [*registry.PROCESS, *registry.THREAD]
_to_plain = cattrs.Converter(unstruct_collection_overrides={tuple: list}).unstructure

SAMPLES = {int: 2**64 - 1, str: "text \udcff", bytes: b"\0\xff", bool: True, float: 0.5}


def sample(kind):
    """Return some value of a field's type."""
    if kind in SAMPLES:
        return SAMPLES[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return (sample(arguments[0]),) * 2
        return tuple(map(sample, arguments))
    if attrs.has(kind):
        return sample_record(kind)
    pytest.fail(f"a record holds {kind}, which an image does not")


# Fields that refuse what cannot be.
SIZED = {"prstatus": bytes(216), "xstate": bytes(832)}


def sample_record(record):
    hints = typing.get_type_hints(record)
    names = [field.name for field in attrs.fields(record)]
    return record(**{name: SIZED.get(name) or sample(hints[name]) for name in names})


OWN = [
    *["registers", "thread", "thread_signals", "signals", "scheduling", "credentials"],
    *["task_modes", "identity", "limits", "timers", "clocks"],
]


def test_every_resource_has_a_name_of_its_own():
    names = [resource.name for resource in RESOURCES]
    assert len(set(names)) == len(names)
    assert set(OWN) <= set(names)


@pytest.mark.parametrize("resource", [r for r in RESOURCES if r.name in OWN], ids=lambda r: r.name)
def test_a_record_comes_back_from_an_image(resource):
    record = sample_record(resource.record)
    assert structure(unpack(pack(_to_plain(record))), resource.record) == record


@pytest.mark.parametrize("resource", [r for r in RESOURCES if r.name in OWN], ids=lambda r: r.name)
def test_a_missing_field_is_refused(resource):
    plain = _to_plain(sample_record(resource.record))
    plain.popitem()
    with pytest.raises(Exception, match="structuring"):
        structure(plain, resource.record)
