"""nf_tables by netlink: a table of ours that drops the packets of the connections in it, no others.

No program and no library is needed for it. What is made looks to `nft list ruleset` like this:

    table inet NAME {
        set v4 { type ipv4_addr . ipv4_addr . inet_service . inet_service }      local . peer . ...
        set v6 { ... }
        chain input  { hook input,  meta mark != MARK, peer -> local in a set: drop }
        chain output { hook output, meta mark != MARK, local -> peer in a set: drop }
    }

Source: include/uapi/linux/netfilter/nf_tables.h, nfnetlink.h; netlink(7). A table with the flag
`OWNER` (5.12) vanishes with the socket that made it, however its process ends.
"""

import contextlib
import errno
import struct
from _socket import socket as Socket  # noqa: N812 - `socket` takes 20 ms to load
from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from ckpt.errors import FeatureMissing, NotPermitted

_AF_INET, _AF_INET6, _AF_NETLINK = 2, 10, 16
_SOCK_RAW, _SOCK_CLOEXEC = 3, 0o2000000
_NETLINK_NETFILTER = 12
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10
_REQUEST, _ACK, _CREATE, _EXCL = 1, 4, 0x400, 0x200
_NLMSG_ERROR = 2
_NLMSG = struct.Struct("=IHHII")
_NLA = struct.Struct("=HH")
_NESTED = 0x8000

_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _GETTABLE, _DELTABLE = 0, 1, 2
_NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM, _DELSETELEM = 3, 6, 9, 12, 14
_NFPROTO_INET, _NFPROTO_IPV4, _NFPROTO_IPV6 = 1, 2, 10
_LOCAL_IN, _LOCAL_OUT = 1, 3
_PRIORITY = -400
"""Before connection tracking: it is not to learn of packets that never arrive."""
_TABLE_F_OWNER = 2
_META_MARK, _META_NFPROTO, _META_L4PROTO = 3, 15, 16
_NETWORK, _TRANSPORT = 1, 2
_EQ, _NEQ = 0, 1
_REG_VERDICT, _REG_1, _REG32_00 = 0, 1, 8
_NF_DROP = 0
_TCP = 6
_TYPE_IPV4, _TYPE_IPV6, _TYPE_PORT, _TYPE_BITS = 7, 8, 13, 6
"""How `nft` numbers the types of keys (include/datatype.h there); the kernel does not look."""
_ELEMENTS_AT_ONCE = 500

MARK: Final = 0x636B7074
"""A packet that has this mark (SO_MARK) passes: our own may."""

_FAMILIES = {_AF_INET: ("v4", _NFPROTO_IPV4, 4, 12), _AF_INET6: ("v6", _NFPROTO_IPV6, 16, 8)}
"""Family -> its set, its number, bytes of an address, offset of the source in a header."""


@attrs.frozen(slots=True)
class Flow:
    """One connection as its packets show it."""

    family: int
    """AF_INET or AF_INET6."""
    local: bytes
    """4 or 16 bytes."""
    local_port: int
    peer: bytes
    peer_port: int

    @property
    def key(self) -> bytes:
        """The element of its set."""
        return self.local + self.peer + struct.pack("!HxxHxx", self.local_port, self.peer_port)


def make_table(name: str, flows: Iterable[Flow]) -> None:
    """Make a table that drops the packets of these connections until it is removed.

    State: any; takes effect at once, all or nothing.

    Raises:
        FeatureMissing: this kernel has no nf_tables.
        NotPermitted: no CAP_NET_ADMIN.
        OSError: EEXIST, there is one of this name.
    """
    with _connected() as sock:
        _run(sock, [*_table(name, 0), *_elements(name, flows)])


def remove_table(name: str) -> bool:
    """Remove a table; False if there is none of this name.

    Raises:
        NotPermitted: no CAP_NET_ADMIN.
        OSError: the kernel refused.
    """
    try:
        with _connected() as sock:
            _run(sock, [_message(_DELTABLE, 0, _string(1, name))])
    except FileNotFoundError:
        return False
    return True


def has_table(name: str) -> bool:
    """Tell whether there is a table of this name in our network namespace.

    Raises:
        FeatureMissing, NotPermitted, OSError: as `make_table`.
    """
    try:
        with _connected() as sock:
            raw = _header(_SUBSYSTEM << 8 | _GETTABLE, _REQUEST | _ACK, 1, _NFPROTO_INET)
            _exchange(sock, [raw + _string(1, name)])
    except FileNotFoundError:
        return False
    return True


class OwnedTable:
    """A table that vanishes when it is closed, or when this process ends in any way."""

    def __init__(self, name: str) -> None:
        """Make it, holding no connection yet.

        Raises:
            FeatureMissing, NotPermitted, OSError: as `make_table`.
        """
        self.name = name
        self._sock = _connect()
        self._held: set[Flow] = set()
        try:
            self._is_owned = self._make()
        except BaseException:
            self._sock.close()
            raise

    def _make(self) -> bool:
        try:
            _run(self._sock, _table(self.name, _TABLE_F_OWNER))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            # Before 5.12 nobody owns a table: it is removed by `close` alone.
            _run(self._sock, _table(self.name, 0))
            return False
        return True

    def add(self, flows: Iterable[Flow]) -> None:
        """Drop the packets of these connections, too."""
        new = [flow for flow in dict.fromkeys(flows) if flow not in self._held]
        if new:
            _run(self._sock, _elements(self.name, new))
            self._held.update(new)

    def let_through(self) -> None:
        """Hold no connection any more. Removing the table waits for all processors, this does not.

        Raises:
            OSError: the kernel refused.
        """
        if self._held:
            sets = (_string(2, name) for name, *_ in _FAMILIES.values())
            _run(
                self._sock, [_message(_DELSETELEM, 0, _string(1, self.name) + one) for one in sets]
            )
            self._held.clear()

    def close(self) -> None:
        """Remove it; may be called again."""
        if self._sock.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            _run(self._sock, [_message(_DELTABLE, 0, _string(1, self.name))])
        self._sock.close()


def _connect() -> Socket:
    try:
        sock = Socket(_AF_NETLINK, _SOCK_RAW | _SOCK_CLOEXEC, _NETLINK_NETFILTER)
    except OSError as error:
        raise FeatureMissing(
            "netfilter (CONFIG_NETFILTER_NETLINK)", "load the module nfnetlink, or use --tcp-close"
        ) from error
    sock.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
    return sock


@contextlib.contextmanager
def _connected() -> Iterator[Socket]:
    sock = _connect()
    try:
        yield sock
    finally:
        sock.close()


def _run(sock: Socket, messages: Iterable[bytes]) -> None:
    """Do all of it, or nothing."""
    bare = list(messages)
    numbered = [
        raw[:8] + struct.pack("=II", number, 0) + raw[16:] for number, raw in enumerate(bare, 1)
    ]
    begin = _header(_BATCH_BEGIN, _REQUEST, 0, 0, _SUBSYSTEM)
    end = _header(_BATCH_END, _REQUEST, len(bare) + 1, 0, _SUBSYSTEM)
    _exchange(sock, [begin, *numbered, end])


def _exchange(sock: Socket, messages: list[bytes]) -> None:
    """Send messages and look for the first that failed; the kernel answers before send returns."""
    sized = (struct.pack("=I", len(raw)) + raw[4:] for raw in messages)
    sock.send(b"".join(sized))
    failed: list[int] = []
    while True:
        try:
            answer = sock.recv(1 << 16, _DONTWAIT)
        except BlockingIOError:
            break
        failed += _iter_failures(answer)
    if failed:
        _turn(failed[0])


_DONTWAIT = 0x40


def _iter_failures(answer: bytes) -> Iterator[int]:
    at = 0
    while at + _NLMSG.size + 4 <= len(answer):
        size, kind, *_ = _NLMSG.unpack_from(answer, at)
        (code,) = struct.unpack_from("=i", answer, at + _NLMSG.size)
        if kind == _NLMSG_ERROR and code:
            yield -code
        at += (size + 3) & ~3


def _turn(number: int) -> None:
    error = OSError(number, errno.errorcode.get(number, "?"))
    if number == errno.EPERM:
        raise NotPermitted(
            "hold the network still", "run ckpt as root or with CAP_NET_ADMIN, or use --tcp-close"
        ) from error
    if number in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
        raise FeatureMissing(
            "nf_tables (CONFIG_NF_TABLES_INET)", "load the module nf_tables, or use --tcp-close"
        ) from error
    raise error


def _header(kind: int, flags: int, number: int, family: int, resource: int = 0) -> bytes:
    """`struct nlmsghdr` without its length, and `struct nfgenmsg`."""
    return _NLMSG.pack(0, kind, flags, number, 0) + struct.pack("!BBH", family, 0, resource)


def _message(kind: int, flags: int, attributes: bytes) -> bytes:
    header = _header(_SUBSYSTEM << 8 | kind, _REQUEST | _ACK | flags, 0, _NFPROTO_INET)
    return header + attributes


def _attribute(kind: int, value: bytes) -> bytes:
    return _NLA.pack(_NLA.size + len(value), kind) + value + bytes(-len(value) % 4)


def _string(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _word(kind: int, value: int) -> bytes:
    """Numbers of nf_tables are big endian."""
    return _attribute(kind, struct.pack("!I", value & 0xFFFF_FFFF))


def _nested(kind: int, *parts: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(parts))


def _table(name: str, flags: int) -> list[bytes]:
    """Return what makes the table, with its sets, chains and rules; it holds nothing."""
    messages = [_message(_NEWTABLE, _CREATE | _EXCL, _string(1, name) + _word(2, flags))]
    for number, (set_name, _, size, _) in enumerate(_FAMILIES.values(), 1):
        address = _TYPE_IPV4 if size == 4 else _TYPE_IPV6
        kind = 0
        for part in (address, address, _TYPE_PORT, _TYPE_PORT):
            kind = kind << _TYPE_BITS | part
        wanted = _string(1, name) + _string(2, set_name) + _word(3, 0) + _word(4, kind)
        messages.append(
            _message(_NEWSET, _CREATE, wanted + _word(5, 2 * size + 8) + _word(10, number))
        )
    for chain, hook in (("input", _LOCAL_IN), ("output", _LOCAL_OUT)):
        place = _nested(4, _word(1, hook), _word(2, _PRIORITY))
        kind_of = _string(7, "filter")
        messages.append(
            _message(_NEWCHAIN, _CREATE, _string(1, name) + _string(3, chain) + place + kind_of)
        )
        for family in _FAMILIES:
            messages.append(_rule(name, chain, family, incoming=hook == _LOCAL_IN))
    return messages


def _rule(table: str, chain: str, family: int, *, incoming: bool) -> bytes:
    set_name, number, size, source = _FAMILIES[family]
    destination = source + size
    here, there = (destination, source) if incoming else (source, destination)
    here_port, there_port = (2, 0) if incoming else (0, 2)
    second = _REG32_00 + size // 4
    ports = _REG32_00 + size // 2
    expressions = [
        *_compare(_META_MARK, _NEQ, struct.pack("=I", MARK)),
        *_compare(_META_NFPROTO, _EQ, bytes([number])),
        *_compare(_META_L4PROTO, _EQ, bytes([_TCP])),
        _load(_REG32_00, _NETWORK, here, size),
        _load(second, _NETWORK, there, size),
        _load(ports, _TRANSPORT, here_port, 2),
        _load(ports + 1, _TRANSPORT, there_port, 2),
        _expression("lookup", _string(1, set_name), _word(2, _REG32_00)),
        _expression(
            "immediate", _word(1, _REG_VERDICT), _nested(2, _nested(2, _word(1, _NF_DROP)))
        ),
    ]
    attributes = _string(1, table) + _string(2, chain) + _nested(4, *expressions)
    return _message(_NEWRULE, _CREATE, attributes)


def _compare(key: int, operator: int, value: bytes) -> Iterator[bytes]:
    yield _expression("meta", _word(1, _REG_1), _word(2, key))
    wanted = _nested(3, _attribute(1, value))
    yield _expression("cmp", _word(1, _REG_1), _word(2, operator), wanted)


def _load(register: int, base: int, offset: int, size: int) -> bytes:
    parts = (_word(1, register), _word(2, base), _word(3, offset), _word(4, size))
    return _expression("payload", *parts)


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nested(1, _string(1, name), _nested(2, *attributes))


def _elements(table: str, flows: Iterable[Flow]) -> Iterator[bytes]:
    unique = dict.fromkeys(flows)
    for family, (set_name, *_) in _FAMILIES.items():
        keys = [flow.key for flow in unique if flow.family == family]
        for start in range(0, len(keys), _ELEMENTS_AT_ONCE):
            some = keys[start : start + _ELEMENTS_AT_ONCE]
            listed = [_nested(1, _nested(1, _attribute(1, key))) for key in some]
            into = _string(1, table) + _string(2, set_name) + _nested(3, *listed)
            yield _message(_NEWSETELEM, _CREATE, into)
