"""`ckpt completion`: what makes a shell complete the words of a `ckpt` command line."""

import click

from ckpt.cli.output import emit_json, json_option, say

_EXAMPLE = """\b
Example:
  ckpt completion bash > /etc/bash_completion.d/ckpt
  ckpt completion zsh > "${fpath[1]}/_ckpt"
  ckpt completion fish > ~/.config/fish/completions/ckpt.fish
"""


@click.command("completion", epilog=_EXAMPLE)
@json_option
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, as_json: bool, shell: str) -> None:
    """Print the completion script of SHELL: bash (4.4 or newer), zsh or fish.

    It asks this very command for the words, so it need not be made anew with a new version.
    """
    from click.shell_completion import ShellComplete, get_completion_class

    from ckpt.cli.completing import VARIABLE

    kind = get_completion_class(shell)
    if kind is None:
        raise TypeError(f"click does not know {shell}")
    group = ctx.find_root().command
    # Not the shell's own `source`, which looks for that shell on this host.
    script = ShellComplete.source(kind(group, {}, "ckpt", VARIABLE)).strip()
    if as_json:
        emit_json({"shell": shell, "script": script})
    else:
        say(script)
