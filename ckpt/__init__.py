"""ckpt: incremental checkpoint and restore of Linux processes, from outside the target.

The public API; everything else may change:

    ckpt.dump(pid, directory, ckpt.DumpOptions(incremental=True)) -> ckpt.DumpResult
    ckpt.restore(directory, at=3) -> ckpt.RestoreResult
    ckpt.look(pid, ckpt.probe_features()) -> list[ckpt.Finding]
    ckpt.Chain.open(directory).generations() -> list[int]

Errors are `ckpt.CkptError` and its subclasses in `ckpt.errors`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt.engine.capture import look
    from ckpt.engine.dump import DumpOptions, DumpResult, dump
    from ckpt.engine.restore import RestoreResult, restore, wait_for_end
    from ckpt.errors import CkptError, Finding
    from ckpt.image.access import Access
    from ckpt.image.chain import Chain
    from ckpt.image.keys import PrivateKey, Recipient
    from ckpt.kernel.features import Features, probe_features
    from ckpt.resources.base import RestoreOptions

__all__ = [
    "Access",
    "Chain",
    "CkptError",
    "DumpOptions",
    "DumpResult",
    "Features",
    "Finding",
    "PrivateKey",
    "Recipient",
    "RestoreOptions",
    "RestoreResult",
    "dump",
    "look",
    "probe_features",
    "restore",
    "wait_for_end",
]

_HOMES = {
    "Access": "ckpt.image.access",
    "Chain": "ckpt.image.chain",
    "CkptError": "ckpt.errors",
    "DumpOptions": "ckpt.engine.dump",
    "DumpResult": "ckpt.engine.dump",
    "Features": "ckpt.kernel.features",
    "Finding": "ckpt.errors",
    "PrivateKey": "ckpt.image.keys",
    "Recipient": "ckpt.image.keys",
    "RestoreOptions": "ckpt.resources.base",
    "RestoreResult": "ckpt.engine.restore",
    "dump": "ckpt.engine.dump",
    "look": "ckpt.engine.capture",
    "probe_features": "ckpt.kernel.features",
    "restore": "ckpt.engine.restore",
    "wait_for_end": "ckpt.engine.restore",
}


def __getattr__(name: str) -> object:
    """Load a public name when it is first used, so that `import ckpt` stays cheap (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ckpt' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)
