"""`ckpt verify`: whether all that an image directory holds is what was written."""

import click

from ckpt.cli.keys import access_of, identity_option
from ckpt.cli.output import emit_json, json_option, note, progress, say
from ckpt.cli.stores import open_image
from ckpt.errors import ImageCorrupt
from ckpt.image.keys import PrivateKey
from ckpt.image.verify import verify

_EXAMPLE = """\b
Example:
  ckpt verify /var/ckpt/job           everything that is wrong, a line each
  ckpt verify --json /var/ckpt/job    the same for programs
"""


@click.command("verify", epilog=_EXAMPLE)
@identity_option
@json_option
@click.argument("image_dir")
def command(private: tuple[PrivateKey, ...], as_json: bool, image_dir: str) -> int:
    """Check that every checkpoint of IMAGE_DIR is what was written, and has all of its pages.

    Structure, digests, checksums of all frames, and that they decode. Everything that is wrong is
    listed; the exit code is 31 then. Nothing is changed. Without the private key of an encrypted
    IMAGE_DIR the checksums are compared, and nothing is decoded.
    """
    chain = open_image(image_dir, access_of(private))
    with chain.in_use():
        numbers = chain.generations()
        with progress() as report:
            findings = verify(chain, numbers, report=lambda n_bytes: report("checking", n_bytes))
    if as_json:
        emit_json(
            {
                "chain": chain.chain_id,
                "generations": numbers,
                "decoded": bool(private or not chain.recipients),
                "findings": [
                    {"generation": finding.subject, "problem": finding.problem}
                    for finding in findings
                ],
            }
        )
    else:
        if chain.recipients and not private:
            note("it is encrypted: checksums were compared, nothing was decoded (see --identity)")
        for finding in findings:
            say(f"wrong: {finding}")
        if not findings:
            say(f"{_count(len(numbers))} in {image_dir}: all is well")
    return ImageCorrupt.exit_code if findings else 0


def _count(n_generations: int) -> str:
    return "1 generation" if n_generations == 1 else f"{n_generations} generations"
