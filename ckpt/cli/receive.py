"""`ckpt receive`: take trees that `ckpt migrate` sends from another host."""

import sys
from typing import TYPE_CHECKING

import click

from ckpt.cli.channel import TlsFiles, tls_options
from ckpt.cli.output import emit_json, json_option, note, say
from ckpt.errors import CkptError, UsageError

if TYPE_CHECKING:
    from ckpt.migrate.messages import Running
    from ckpt.migrate.receiver import Receiver

_EXAMPLE = """\b
Example:
  ckpt receive --listen :7000 --token-file /run/ckpt.token     then copy the token to the source
  ckpt receive --listen :7000 --tls-cert c.pem --tls-key k.pem --tls-ca ca.pem
"""


@click.command("receive", epilog=_EXAMPLE)
@click.option("--listen", metavar="HOST:PORT", help="Where to wait; port 0 takes any that is free.")
@click.option(
    "--stdio", is_flag=True, help="Serve one source over standard input and output (ssh)."
)
@click.option(
    "--token-file",
    metavar="FILE",
    help="Write the token, by which a source and this command trust each other, there (mode 0600)"
    " instead of to standard output.",
)
@tls_options
@click.option("--once", is_flag=True, help="Take one tree, and end as it ends.")
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
    "--no-cgroups", is_flag=True, help="Leave what arrives in the control groups of this command."
)
@json_option
def command(
    listen: str | None,
    stdio: bool,
    token_file: str | None,
    tls: TlsFiles,
    once: bool,
    detach: bool,
    image_dir: str,
    on_arrival: str,
    no_cgroups: bool,
    as_json: bool,
) -> int:
    """Take trees of processes from other hosts, and run them here.

    What arrives runs with its pids of there. Standard streams of it that led to a terminal or to
    another process lead where those of this command do. Without certificates of an authority it
    makes its own, and prints a token that is as good as a key: a source that has it can run
    programs here.
    """
    if stdio == bool(listen):
        raise UsageError("give either --listen HOST:PORT or --stdio")
    if tls.given and token_file:
        raise UsageError("with --tls-cert there is no token: leave --token-file out")
    from ckpt.migrate.arrival import ReceiveOptions
    from ckpt.migrate.receiver import Receiver

    options = ReceiveOptions(
        image_dir=image_dir,
        on_arrival=on_arrival,
        no_cgroups=no_cgroups,
        stays=once and not detach,
    )
    if stdio:
        from ckpt.migrate.stdio import serve_stdio

        # Standard output is the connection; whatever is said goes to standard error.
        return serve_stdio(Receiver(options, _tell_in_words))
    assert listen is not None
    receiver = Receiver(options, _tell_as_json if as_json else _tell_in_words)
    return _serve(listen, token_file, tls, receiver, once=once, as_json=as_json)


def _serve(
    listen: str,
    token_file: str | None,
    tls: TlsFiles,
    receiver: "Receiver",
    *,
    once: bool,
    as_json: bool,
) -> int:
    from ckpt.migrate.destination import Address
    from ckpt.migrate.listen import Listener, SessionEnd
    from ckpt.migrate.pairing import write_token

    ends: list[SessionEnd] = []
    with Listener(Address.parse(listen), tls.load(), receiver, once=once) as listener:
        token = listener.token
        if token is not None and token_file:
            write_token(token, token_file)
        if as_json:
            # One object a line, flushed: whoever reads waits for the first.
            shown = token.line() if token is not None and not token_file else None
            emit_json({"listening": str(listener.address), "token": shown})
        else:
            say(f"listening on {listener.address}")
            if token is not None and not token_file:
                say(f"token {token.line()}")
        sys.stdout.flush()
        listener.serve(ends.append)
    return ends[-1].exit_code if once and ends else 0


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
