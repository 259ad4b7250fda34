"""`ckpt keygen`: make the private key of encrypted images, or say whose a key is."""

import click

from ckpt.cli.output import emit_json, json_option, say
from ckpt.image.keys import PrivateKey, read_private_keys, write_private_key

_EXAMPLE = """\b
Example:
  ckpt keygen /root/ckpt.key                               prints ckpt1...
  ckpt dump --pid 4711 --encrypt-to ckpt1... /var/ckpt/job
  ckpt restore --identity /root/ckpt.key /var/ckpt/job
  ckpt dump --pid 4711 --encrypt-to /root/ckpt.key /var/ckpt/job    one file for both
"""


@click.command("keygen", epilog=_EXAMPLE)
@click.option("--recipient", "only_show", is_flag=True, help="Say whose the key in FILE is.")
@json_option
@click.argument("file")
def command(only_show: bool, as_json: bool, file: str) -> None:
    """Make a private key in FILE, which must not exist, and print its recipient.

    Whoever knows the recipient can encrypt images with 'ckpt dump --encrypt-to'; only the private
    key opens them: keep it off the hosts that dump, and keep a copy.
    """
    if only_show:
        recipients = [str(key.recipient) for key in read_private_keys(file)]
    else:
        key = PrivateKey.generate()
        write_private_key(file, key)
        recipients = [str(key.recipient)]
    if as_json:
        emit_json({"file": file, "recipients": recipients})
        return
    for recipient in recipients:
        say(recipient)
