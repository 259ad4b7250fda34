"""A channel: says and hears messages, with a limit on every length and every wait.

Whatever the peer does, a call ends: with a message of a type that was expected, or with a
`MigrateError`. After one of those nothing more is read. Nothing is queued: what the peer sends
waits in its own kernel until it is asked for. Neighbours: `transport` below, `handshake` puts one
to its first use, `message` gives the types.
"""

import contextlib
import math
import select
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar

import attrs

from ckpt import fault
from ckpt.errors import CkptError, Finding, PeerLost, PeerRefused, ProtocolError, printable
from ckpt.migrate.frames import HEADER_BYTES, Header
from ckpt.migrate.message import FrameMessage, Message, decode, encode, find_kind
from ckpt.migrate.messages import KeepAlive, Refusal
from ckpt.migrate.pace import MIN_BYTES_PER_S, Bandwidth, Traffic
from ckpt.migrate.transport import Transport, wait_for

M = TypeVar("M", bound=Message)

Place = Callable[[int], memoryview]
"""Gives the buffer (of exactly that many bytes) into which the page frame of a message is read."""

_CHUNK_BYTES = 1 << 18
"""What is written at once, so that a limit on the bandwidth makes a stream and not bursts."""

_SMALL_BYTES = 1 << 13
"""A frame of up to so many bytes is copied behind its header: one TLS record, one packet."""

_GROW_BYTES = 1 << 20
"""Fields longer than this get their memory as they arrive, not as they are announced."""

_FREE_SIGNS = 100
_SIGNS_PER_S = 20
"""What a peer may send of them: many times what `Channel.kept_alive` does."""

_MAX_REASON = 4000
_MAX_TEXT = 1000
_MAX_FINDINGS = 100


@attrs.frozen
class Patience:
    """How long to wait for a peer, in seconds."""

    silence_s: float = 20.0
    """Without a single byte while we wait for a message (`Channel.kept_alive` keeps us content)."""
    stall_s: float = 20.0
    """Without taking a single byte of what we send."""
    message_s: float = 30.0
    """For one message from its first byte to its last; longer ones get more, by their length."""
    handshake_s: float = 10.0
    """From the connection to the end of the handshake."""
    keep_alive_s: float = 2.0
    """Between two signs of life of ours, in `Channel.kept_alive`."""


def _shorten(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return findings as they are told: not more than somebody reads, and not endless ones."""
    return tuple(
        Finding(one.subject[:_MAX_TEXT], one.problem[:_MAX_TEXT], one.remedy[:_MAX_TEXT])
        for one in islice(findings, _MAX_FINDINGS)
    )


def new_buffer(n_bytes: int) -> memoryview:
    """Be the `Place` of those who have none."""
    return memoryview(bytearray(n_bytes))


class Channel:
    """Messages both ways. One thread may send while another receives; several may send."""

    def __init__(
        self,
        transport: Transport,
        *,
        patience: Patience | None = None,
        bandwidth: Bandwidth | None = None,
    ) -> None:
        """Take over `transport`; page frames keep to `bandwidth`, other messages go at once."""
        self.peer = transport.peer
        self.patience = patience or Patience()
        self.bandwidth = bandwidth or Bandwidth()
        self.traffic = Traffic()
        self.checks_frames = True
        """Compare the checksum of each page frame that comes; False leaves that to whoever decodes
        it, in a thread perhaps (`image.pages.check_frame`): a third of a millisecond for 1 MiB."""
        self._transport = transport
        self._sending = threading.RLock()
        self._receiving = threading.RLock()
        self._made_s = time.monotonic()
        self._n_signs = 0
        self._is_cut = False
        """A message was cut short on its way out, or the peer is gone: nothing can be said."""
        self._is_deaf = False
        """What comes cannot be understood any more: nothing can be heard."""
        self._is_closed = False
        self._ends_s = math.inf
        """When everything has to be over (`within`)."""

    # ---- saying

    def send(self, what: Message) -> None:
        """Send one message; returns when the kernel has taken all of it.

        Raises:
            PeerLost: the connection is gone, or the peer takes nothing for too long.
            PeerRefused: that, after it had said why.
        """
        head, frame = encode(what)
        self._reach("send", what)
        stored = memoryview(b"" if frame is None else frame.stored).cast("B")
        with self._sending:
            if self._is_cut or self._is_closed:
                raise PeerLost(peer=self.peer, reason="the connection was given up")
            self._is_cut = True
            try:
                begun_s = time.monotonic()
                self._send_parts(head, stored, begun_s)
            except PeerLost as error:
                self._raise_last_words(error)
            self._is_cut = False
            if len(stored):
                self.traffic.count_frame(len(head) + len(stored), time.monotonic() - begun_s)
        self._reach("sent", what)

    def _reach(self, happened: str, what: Message) -> None:
        if not self._is_closed:
            fault.reach(f"{happened}:{type(what).__name__}", self._transport.fileno())

    def _send_parts(self, head: bytes, stored: memoryview, begun_s: float) -> None:
        ends_s = begun_s + self._message_s(len(head) + len(stored))
        if len(stored) <= _SMALL_BYTES:
            if len(stored):
                self.bandwidth.wait_for(len(head) + len(stored))
            self._write(memoryview(head + stored), ends_s)
            return
        self._write(memoryview(head), ends_s)
        for start in range(0, len(stored), _CHUNK_BYTES):
            chunk = stored[start : start + _CHUNK_BYTES]
            self.bandwidth.wait_for(len(chunk))
            self._write(chunk, ends_s)

    def _write(self, view: memoryview, ends_s: float) -> None:
        while len(view):
            wait_s = min(self.patience.stall_s, min(ends_s, self._ends_s) - time.monotonic())
            done = self._transport.write(view, wait_s) if wait_s > 0 else None
            if done is None:
                raise PeerLost(peer=self.peer, reason="it takes nothing of what it is sent")
            self.traffic.sent_bytes += done
            view = view[done:]

    def _raise_last_words(self, error: PeerLost) -> None:
        """Raise why the peer went, if it said so before it did; else `error`.

        Raises:
            PeerRefused, PeerLost: always one of them.
        """
        if self._receiving.acquire(blocking=False):
            try:
                self._receive((), 0.0, new_buffer)
            except PeerRefused as refusal:
                raise refusal from error
            except ProtocolError as said:
                # An alert of TLS; anything else came before, and is not the reason.
                if isinstance(said.__cause__, ssl.SSLError):
                    raise
            except CkptError:
                pass
            finally:
                self._receiving.release()
        raise error

    # ---- hearing

    def receive(
        self, *kinds: type[M], timeout_s: float | None = None, place: Place = new_buffer
    ) -> M:
        """Wait for one message of these types.

        Args:
            kinds: what may come now; anything else is an error of the peer.
            timeout_s: how long it may take to begin; None: as long as the peer gives signs of life.
            place: where a page frame goes; called after its length was found allowed.

        Raises:
            PeerRefused: the peer said why it will not go on.
            PeerLost: nothing came in time, or the connection ended.
            ProtocolError: something else came, or it was damaged.
        """
        what = self.try_receive(*kinds, timeout_s=timeout_s, place=place)
        if what is None:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise self._give_up(
                PeerLost(peer=self.peer, reason=f"no {names} within {timeout_s:g} s")
            )
        return what

    def try_receive(
        self, *kinds: type[M], timeout_s: float | None = None, place: Place = new_buffer
    ) -> M | None:
        """Like `receive`, but return None if no message has begun within `timeout_s`."""
        with self._receiving:
            # One of `kinds`: `_read_message` has seen to it.
            return self._receive(kinds, timeout_s, place)  # type: ignore[return-value]

    def _receive(
        self, kinds: tuple[type[Message], ...], timeout_s: float | None, place: Place
    ) -> Message | None:
        ends_s = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
        while True:
            try:
                header = self._read_header(ends_s)
                if header is None:
                    return None
                what = self._read_message(header, kinds, place)
            except ValueError as error:
                raise self._give_up(ProtocolError(peer=self.peer, reason=str(error))) from error
            except (PeerLost, ProtocolError):
                self._is_deaf = True
                raise
            if isinstance(what, Refusal):
                raise self._give_up(self._refused(what))
            if not isinstance(what, KeepAlive):
                self._reach("received", what)
                return what
            self._count_sign()

    def _count_sign(self) -> None:
        """Count a sign of life, over the life of the channel: while nobody listens, they gather."""
        self._n_signs += 1
        age_s = time.monotonic() - self._made_s
        if self._n_signs > _FREE_SIGNS + age_s * _SIGNS_PER_S:
            raise self._give_up(
                ProtocolError(peer=self.peer, reason="it floods us with signs of life")
            )

    def _read_header(self, ends_s: float) -> Header | None:
        """Return the next header; None if not even its first byte came until `ends_s`."""
        if self._is_deaf or self._is_closed:
            raise PeerLost(peer=self.peer, reason="the connection was given up")
        data = bytearray(HEADER_BYTES)
        view = memoryview(data)
        silent_s = time.monotonic() + self.patience.silence_s
        n_read = self._read_some(view, min(ends_s, silent_s))
        if n_read is None:
            if silent_s <= ends_s:
                raise self._silent()
            return None
        self._read_exactly(view[n_read:], time.monotonic() + self.patience.message_s)
        return Header.parse(data)

    def _read_message(
        self, header: Header, kinds: tuple[type[Message], ...], place: Place
    ) -> Message:
        kind = find_kind(header.number)
        if kind is None or not (kind in (KeepAlive, Refusal) or kind in kinds):
            name = f"message {header.number}" if kind is None else kind.__name__
            wanted = " or ".join(one.__name__ for one in kinds) or "nothing"
            raise ValueError(f"{name} came, {wanted} was expected")
        header.check_caps(kind.FIELD_BYTES, issubclass(kind, FrameMessage))
        ends_s = time.monotonic() + self._message_s(header.n_field_bytes + header.n_frame_bytes)
        fields = self._read_fields(header.n_field_bytes, ends_s)
        if zlib.crc32(fields) != header.field_checksum:
            raise ValueError(f"the fields of a {kind.__name__} are damaged")
        stored = memoryview(b"")
        if header.n_frame_bytes:
            stored = place(header.n_frame_bytes)
            self._read_exactly(stored, ends_s)
        if self.checks_frames and zlib.crc32(stored) != header.frame_checksum:
            raise ValueError(f"the page frame of a {kind.__name__} is damaged")
        return decode(kind, header, fields, stored)

    def _read_fields(self, n_bytes: int, ends_s: float) -> bytearray:
        if n_bytes <= _GROW_BYTES:
            fields = bytearray(n_bytes)
            self._read_exactly(memoryview(fields), ends_s)
            return fields
        fields = bytearray()
        while len(fields) < n_bytes:
            piece = bytearray(min(_GROW_BYTES, n_bytes - len(fields)))
            self._read_exactly(memoryview(piece), ends_s)
            fields += piece
        return fields

    def _read_exactly(self, view: memoryview, ends_s: float) -> None:
        while len(view):
            silent_s = time.monotonic() + self.patience.silence_s
            n_read = self._read_some(view, min(ends_s, silent_s))
            if n_read is None:
                raise PeerLost(peer=self.peer, reason="it stopped in the middle of a message")
            view = view[n_read:]

    def _read_some(self, view: memoryview, ends_s: float) -> int | None:
        wait_s = min(ends_s, self._ends_s) - time.monotonic()
        n_read = self._transport.read_into(view, max(0.0, wait_s))
        if n_read == 0:
            raise PeerLost(peer=self.peer, reason="it ended the connection")
        if n_read is not None:
            self.traffic.received_bytes += n_read
        return n_read

    def _message_s(self, n_bytes: int) -> float:
        return self.patience.message_s + n_bytes / MIN_BYTES_PER_S

    def _silent(self) -> PeerLost:
        return PeerLost(peer=self.peer, reason=f"no sign of life for {self.patience.silence_s:g} s")

    def _refused(self, refusal: Refusal) -> PeerRefused:
        """Turn what the peer says into an error; it is shown, and shall not fill the screen."""
        return PeerRefused(
            peer=self.peer,
            peer_code=printable(refusal.code)[:64],
            reason=printable(refusal.reason)[:_MAX_REASON],
            findings=_shorten(refusal.findings),
        )

    # ---- around both

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """In the block, all waits together take no longer than `seconds`; a late peer is lost."""
        self._ends_s = time.monotonic() + seconds
        try:
            yield
        finally:
            self._ends_s = math.inf

    def is_readable(self, timeout_s: float) -> bool:
        """Tell whether something came (a sign of life, perhaps), or comes in time."""
        return self._transport.has_buffered() or wait_for(self.fileno(), select.POLLIN, timeout_s)

    def fileno(self) -> int:
        """Return the descriptor to poll for input, together with others; see `has_buffered`."""
        return self._transport.fileno()

    def has_buffered(self) -> bool:
        """Tell whether a message (or some of it) is here that `fileno` does not show."""
        return self._transport.has_buffered()

    @contextlib.contextmanager
    def kept_alive(self) -> Iterator[None]:
        """While we are busy in the block, a thread gives the peer signs of life."""
        done = threading.Event()

        def give_signs() -> None:
            while not done.wait(self.patience.keep_alive_s):
                try:
                    self.send(KeepAlive())
                except CkptError:
                    # Whoever uses the channel next is told.
                    return

        thread = threading.Thread(target=give_signs, name="ckpt-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def refuse(self, error: CkptError) -> None:
        """Tell the peer why we will not go on, and close; never raises for the peer's sake."""
        findings = _shorten(getattr(error, "findings", ()))
        reason = error.message()
        if findings:
            # Its further lines are the findings, which travel as such.
            reason = reason.partition("\n")[0].removesuffix(":")
        self.say_last(Refusal(code=error.code, reason=reason[:_MAX_REASON], findings=findings))

    def say_last(self, what: Message) -> None:
        """Send a message if that is still possible, and close."""
        with contextlib.suppress(CkptError):
            self.send(what)
            self._drain()
        self.close()

    def _drain(self) -> None:
        """Let the peer read our last word: closing on unread input would reset the connection."""
        ends_s = time.monotonic() + 1.0
        waste = memoryview(bytearray(1 << 16))
        while (wait_s := ends_s - time.monotonic()) > 0:
            if not self._transport.read_into(waste, wait_s):
                return

    def close(self) -> None:
        """End the connection; may be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._transport.close()

    def abandon(self) -> None:
        """In a forked child: let go of our descriptors, and of nothing else."""
        self._is_closed = True
        self._transport.abandon()

    def _give_up(self, error: CkptError) -> CkptError:
        """Nothing that comes after this is understood; telling the peer why is still possible."""
        self._is_deaf = True
        return error

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; a trouble of ours (`CkptError`) is told to the peer before."""
        if isinstance(error, CkptError) and not isinstance(error, PeerLost | PeerRefused):
            self.refuse(error)
        self.close()
