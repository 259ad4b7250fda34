"""A listener in a process of its own, and what its sessions do in tests."""

import contextlib
import os
import signal
import traceback

from ckpt.errors import ConnectFailed, Finding, HostMismatch, PeerLost
from ckpt.migrate.channel import Patience
from ckpt.migrate.destination import Address
from ckpt.migrate.dial import Dialer
from ckpt.migrate.listen import Listener
from tests.migrate.spoken import Word

PATIENT = Patience(silence_s=20.0, stall_s=20.0, message_s=20.0, handshake_s=20.0)
"""Only a test that fails comes near these, on however busy a machine."""


def echo(session):
    """Answer each word; joined streams too, once the first channel asks for that."""
    channel = session.channel
    while True:
        word = channel.receive(Word)
        match word.text:
            case "end":
                return word.count
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "bug":
                raise ZeroDivisionError
            case "refuse":
                raise HostMismatch(findings=(Finding("processor", "has no wings"),))
            case "pid":
                channel.send(Word("pid", os.getpid()))
            case "await":
                joined = session.accept(PATIENT.handshake_s)
                joined.channel.send(Word(f"joined to {joined.purpose}"))
                with joined.channel:
                    joined.channel.send(joined.channel.receive(Word))
                channel.send(Word("left"))
            case _:
                channel.send(word)


def survive_a_cut(session):
    """Count words over however many connections the sender needs."""
    channel, n_words = session.channel, 0
    while True:
        try:
            word = channel.receive(Word)
        except PeerLost:
            channel.close()
            channel = session.accept(PATIENT.handshake_s).channel
            continue
        n_words += 1
        channel.send(Word("so far", n_words))
        if word.text == "end":
            return n_words


@contextlib.contextmanager
def serving(handler, *, trust=None, once=False, patience=PATIENT):
    """Yield a listener whose `serve` runs in a child, and a pipe with a line for each end."""
    read_fd, write_fd = os.pipe()
    with Listener(Address("127.0.0.1", 0), trust, handler, once=once, patience=patience) as ours:
        pid = os.fork()
        if pid == 0:
            os.close(read_fd)
            _serve_and_exit(ours, write_fd)
    os.close(write_fd)
    with open(read_fd) as ends:
        try:
            yield ours, ends
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


def _serve_and_exit(listener, write_fd):
    signal.signal(signal.SIGTERM, lambda *_: listener.close() or os._exit(0))
    try:
        listener.serve(lambda end: os.write(write_fd, f"{end.exit_code}\n".encode()))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def dialer_to(listener, **options):
    options.setdefault("patience", PATIENT)
    return Dialer(listener.address, listener.token, **options)


def open_when_there_is_room(listener):
    """Dial where others were sent away: they are counted until their processes have ended."""
    while True:
        with contextlib.suppress(ConnectFailed):
            return dialer_to(listener).open()
