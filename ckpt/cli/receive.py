"""`ckpt receive`: take trees that `ckpt migrate` sends from another host."""

import sys
from typing import TYPE_CHECKING

import click

from ckpt.cli.keys import encrypt_to_option
from ckpt.cli.output import emit_json, json_option, note, say
from ckpt.cli.peers import listen_options, parse_listen, read_certificates
from ckpt.errors import CkptError, UsageError
from ckpt.image.keys import Recipient

if TYPE_CHECKING:
    from ckpt.migrate.listen import Listener
    from ckpt.migrate.messages import Running

_EXAMPLE = """\b
Example:
  ckpt receive --listen :7000 --token-file /run/ckpt.token     then copy the token to the source
  ckpt receive --listen :7000 --tls-cert c.pem --tls-key k.pem --tls-ca ca.pem
"""


@click.command("receive", epilog=_EXAMPLE)
@listen_options
@click.option("--detach", is_flag=True, help="With --once: end when the tree runs here.")
@click.option(
    "--image-dir", metavar="DIR", default="", help="Keep what arrives there, as a chain of its own."
)
@click.option(
    "--on-arrival",
    metavar="COMMAND",
    default="",
    help="Run COMMAND before the tree's sockets are made, when no packet for its TCP connections is"
    " answered any more: to give this host the address that they need.",
)
@click.option(
    "--on-return",
    metavar="COMMAND",
    default="",
    help="Run COMMAND when --on-arrival has begun and the tree does not run here after all: to undo"
    " it.",
)
@click.option(
    "--no-cgroups", is_flag=True, help="Leave what arrives in the control groups of this command."
)
@encrypt_to_option
@json_option
def command(
    listen: str | None,
    stdio: bool,
    once: bool,
    token_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    tls_ca: str | None,
    detach: bool,
    image_dir: str,
    on_arrival: str,
    on_return: str,
    no_cgroups: bool,
    encrypt_to: tuple[Recipient, ...],
    as_json: bool,
) -> int:
    """Take trees of processes from other hosts, and run them here.

    What arrives runs with its pids of there. Standard streams of it that led to a terminal or to
    another process lead where those of this command do. Without certificates of an authority it
    makes its own, and prints a token that is as good as a key: a source that has it can run
    programs here.
    """
    if encrypt_to and not image_dir:
        raise UsageError("--encrypt-to is for what is kept: give --image-dir, too")
    certificates = read_certificates(tls_cert, tls_key, tls_ca)
    address = parse_listen(listen, stdio, token_file, certificates)
    from ckpt.migrate.arrival import ReceiveOptions
    from ckpt.migrate.receiver import Receiver

    options = ReceiveOptions(
        image_dir=image_dir,
        encrypt_to=encrypt_to,
        on_arrival=on_arrival,
        on_return=on_return,
        no_cgroups=no_cgroups,
        stays=once and not detach,
    )
    if address is None:
        from ckpt.migrate.stdio import serve_stdio

        # Standard output is the connection; whatever is said goes to standard error.
        return serve_stdio(Receiver(options, _tell_in_words, note))
    receiver = Receiver(options, _tell_as_json if as_json else _tell_in_words, note)
    from ckpt.migrate.listen import Listener, SessionEnd

    ends: list[SessionEnd] = []
    with Listener(address, certificates, receiver, once=once) as listener:
        _say_where(listener, token_file, as_json=as_json)
        listener.serve(ends.append)
    return ends[-1].exit_code if once and ends else 0


def _say_where(listener: "Listener", token_file: str | None, *, as_json: bool) -> None:
    """Say where we listen, and by which token; at once, for whoever waits for it."""
    from ckpt.migrate.pairing import write_token

    token = listener.token
    if token is not None and token_file:
        write_token(token, token_file)
    shown = token.line() if token is not None and not token_file else None
    if as_json:
        emit_json({"listening": str(listener.address), "token": shown})
    else:
        say(f"listening on {listener.address}" + (f"\ntoken {shown}" if shown else ""))
    sys.stdout.flush()


def _tell_in_words(came: "Running | CkptError | None") -> None:
    if came is None:
        note("the source has kept its tree")
    elif isinstance(came, CkptError):
        note(came.message())
    else:
        note(f"process {came.pid} runs here")
        for warning in came.warnings:
            note(warning)


def _tell_as_json(came: "Running | CkptError | None") -> None:
    if came is None:
        emit_json({"kept": True})
    elif isinstance(came, CkptError):
        emit_json({"error": {"code": came.code, "message": came.message()}})
    else:
        emit_json({"pid": came.pid, "warnings": list(came.warnings)})
    sys.stdout.flush()
