"""Changes of good bytes, at random and always the same for the same seed.

Of msgpack also those that leave it whole: a value for another one, a key or an entry less or more.
Otherwise nearly all would end at the first length that does not fit.
"""

import random

from ckpt.image.codec import pack, unpack

MSGPACK_FROM = {"manifest": 0, "records": 0, "words": 3, "chain": 1}
"""Where it begins in the bytes of a target."""
ODD = (
    *(None, True, False, 0, 1, -1, 7, 255, 4096, 1 << 31, 1 << 32, (1 << 63) - 1, -(1 << 63)),
    *((1 << 64) - 1, 0.0, -1.5, float("nan"), float("inf"), 1e308),
    *("", "x", "\0", "/", "..", "../../etc/passwd", "\udc80", "\x1b[2J", "9" * 40),
    *(b"", b"\0", bytes(8), bytes(25), b"\xff" * 16, [], [[]], [0] * 40, {}, {"": {}}),
)
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 4095, 4096, 65535, (1 << 31) - 1, (1 << 32) - 1)


def change(target, data, draw, others):
    """Return other bytes than `data` (in nearly all cases), perhaps with a part of `others`."""
    start = MSGPACK_FROM.get(target)
    if start is not None and draw.random() < 0.7:
        try:
            value = unpack(data[start:])
        except ValueError:
            value = None
        if isinstance(value, dict | list):
            for _ in range(draw.randrange(1, 4)):
                _change_value(value, draw)
            return data[:start] + pack(value)
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        draw.choice(WAYS)(changed, draw, others)
    return bytes(changed)


def _containers(value):
    yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from _containers(inner)


def _change_value(value, draw):
    """Change one entry, anywhere in plain values."""
    where = draw.choice([one for one in _containers(value) if one] or [value])
    keys = list(where) if isinstance(where, dict) else list(range(len(where)))
    if not keys:
        return
    key, way = draw.choice(keys), draw.randrange(4)
    if way == 0:
        del where[key]
    elif way == 1:
        where[key] = _copy(draw.choice(ODD))
    elif way == 2:
        where[key] = _near(where[key], draw)
    elif isinstance(where, list):
        where.insert(key, _copy(where[key]))
    else:
        where[draw.choice(keys)] = _copy(where[key])


def _copy(value):
    return unpack(pack(value))


def _near(value, draw):
    """Return another one of the same type."""
    if type(value) is int:
        # More would not be packed.
        return max(
            -(1 << 63), min((1 << 64) - 1, value + draw.choice((-1, 1, 1 << 12, -(1 << 40))))
        )
    if type(value) is bytes:
        changed = bytearray(value)
        draw.choice(WAYS)(changed, draw, (value,))
        return bytes(changed)
    if type(value) is str:
        return value + draw.choice(("\0", "/..", "0", "\udcff"))
    return _copy(draw.choice(ODD))


def _flip(changed, draw, _others):
    if changed:
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)


def _write(changed, draw, _others):
    width = draw.choice((1, 2, 4, 8))
    number = draw.choice(NUMBERS) % (1 << 8 * width)
    start = draw.randrange(len(changed) + 1)
    changed[start : start + width] = number.to_bytes(width, draw.choice(("little", "big")))


def _cut(changed, draw, _others):
    start = draw.randrange(len(changed) + 1)
    del changed[start : start + draw.choice((1, 2, 8, 25, len(changed)))]


def _insert(changed, draw, _others):
    start = draw.randrange(len(changed) + 1)
    changed[start:start] = draw.randbytes(draw.choice((1, 2, 8, 25)))


def _repeat(changed, draw, _others):
    start = draw.randrange(len(changed) + 1)
    changed[start:start] = changed[start : start + draw.choice((1, 8, 25, 200))]


def _splice(changed, draw, others):
    other = draw.choice(others)
    start = draw.randrange(len(other) + 1)
    part = other[start : start + draw.choice((4, 25, 200))]
    at = draw.randrange(len(changed) + 1)
    changed[at : at + len(part)] = part


WAYS = (_flip, _flip, _write, _write, _cut, _insert, _repeat, _splice)


def drawn(seed):
    """Return what draws the same for the same seed."""
    return random.Random(seed)
