"""`ckpt diff`: what changed between two checkpoints of a chain."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from ckpt.cli.keys import access_of, identity_option
from ckpt.cli.output import emit_json, json_option, progress, say
from ckpt.cli.processes import file_as_json, mapping_as_json, printable, title_of
from ckpt.engine.differing import Difference, ProcessChange, compare
from ckpt.engine.examining import examine
from ckpt.engine.portrait import FileView, MappingView, ProcessView
from ckpt.image.chain import Chain
from ckpt.image.keys import PrivateKey

_EXAMPLE = """\b
Example:
  ckpt diff /var/ckpt/job 3 4            what was done between two checkpoints
  ckpt diff --json /var/ckpt/job 0 7
"""


@click.command("diff", epilog=_EXAMPLE)
@identity_option
@json_option
@click.argument("image_dir")
@click.argument("before", type=click.IntRange(min=0), metavar="M")
@click.argument("after", type=click.IntRange(min=0), metavar="N")
def command(
    private: tuple[PrivateKey, ...], as_json: bool, image_dir: str, before: int, after: int
) -> None:
    """Say what is not the same in generation N of IMAGE_DIR as it was in generation M.

    That is: processes and threads, mappings and how many pages of each hold something else, open
    files. Pages are compared byte for byte; a delta says itself which need not be read.
    """
    chain = Chain.open(Path(image_dir), access_of(private))
    with chain.in_use(), progress() as report:
        difference = compare(
            examine(chain, before),
            examine(chain, after),
            report=lambda done_bytes: report("comparing memory", done_bytes),
        )
    if as_json:
        emit_json(
            {
                "chain": chain.chain_id,
                "before": before,
                "after": after,
                "page_size": difference.page_size,
                "come": [_process_as_json(one) for one in difference.come],
                "gone": [_process_as_json(one) for one in difference.gone],
                "processes": [_change_as_json(one) for one in difference.common],
            }
        )
        return
    for line in _iter_lines(difference):
        say(line)


def _iter_lines(difference: Difference) -> Iterator[str]:
    for one in difference.gone:
        yield f"- process {title_of(one)}"
    for one in difference.come:
        yield f"+ process {title_of(one)}"
    for change in difference.common:
        lines = list(_iter_changes(change))
        yield f"{'~' if lines else '='} process {title_of(change.after)}"
        yield from (f"  {line}" for line in lines)


def _iter_changes(change: ProcessChange) -> Iterator[str]:
    if change.runs_another_program:
        was, now = (printable(one.executable) for one in (change.before, change.after))
        yield f"~ program {was} -> {now}"
    if change.before.stopped != change.after.stopped:
        yield "~ was stopped" if change.after.stopped else "~ runs again"
    yield from (f"- thread {one.tid} {printable(one.name)}" for one in change.threads_gone)
    yield from (f"+ thread {one.tid} {printable(one.name)}" for one in change.threads_come)
    yield from (f"- mapping {_mapping(one)}" for one in change.mappings_gone)
    yield from (f"+ mapping {_mapping(one)}" for one in change.mappings_made)
    yield from _iter_mapping_changes(change)
    yield from (f"- fd {_file(one)}" for one in change.files_closed)
    yield from (f"+ fd {_file(one)}" for one in change.files_opened)
    yield from (f"~ fd {_file(one.before)} -> {_file(one.after)}" for one in change.files_changed)


def _iter_mapping_changes(change: ProcessChange) -> Iterator[str]:
    for one in change.mappings:
        if one.is_reshaped:
            yield f"~ mapping {_mapping(one.before)} -> {_mapping(one.after)}"
        if one.n_changed:
            pages = f"{one.n_changed} of {one.n_common} pages"
            yield f"~ pages {_mapping(one.after)}: {pages}"


def _mapping(one: MappingView) -> str:
    return f"{one.start:x}-{one.end:x} {one.access} {printable(one.name) or '(anonymous)'}"


def _file(one: FileView) -> str:
    return f"{one.fd}{one.access} {one.kind} {printable(one.name)}"


def _process_as_json(one: ProcessView) -> dict[str, object]:
    return {"pid": one.pid, "parent": one.parent, "name": one.name, "command": list(one.command)}


def _change_as_json(change: ProcessChange) -> dict[str, object]:
    return {
        **_process_as_json(change.after),
        "program": _both(change.before.executable, change.after.executable),
        "stopped": _both(change.before.stopped, change.after.stopped),
        "changed_pages": change.n_changed_pages,
        "threads": {
            "come": [{"tid": one.tid, "name": one.name} for one in change.threads_come],
            "gone": [{"tid": one.tid, "name": one.name} for one in change.threads_gone],
        },
        "mappings": {
            "made": _mappings_as_json(change.mappings_made),
            "gone": _mappings_as_json(change.mappings_gone),
            "changed": [
                {
                    **mapping_as_json(one.after),
                    "before": mapping_as_json(one.before) if one.is_reshaped else None,
                    "common_pages": one.n_common,
                    "changed_pages": one.n_changed,
                }
                for one in change.mappings
                if one.is_reshaped or one.n_changed
            ],
        },
        "files": {
            "opened": [file_as_json(one) for one in change.files_opened],
            "closed": [file_as_json(one) for one in change.files_closed],
            "changed": [
                _both(file_as_json(one.before), file_as_json(one.after))
                for one in change.files_changed
            ],
        },
    }


def _mappings_as_json(mappings: Iterable[MappingView]) -> list[dict[str, object]]:
    return [mapping_as_json(one) for one in mappings]


def _both(before: object, after: object) -> dict[str, object]:
    return {"before": before, "after": after}
