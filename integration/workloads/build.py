"""Compile the workload programs, once for each content of their sources.

The binaries lie in a cache directory beside the sources, named by a hash of everything that went
into them, so a restored process keeps the executable it was dumped with while a changed source gets
a new one. The directory is visible to whatever shares this tree, such as a virtual machine over the
host's root. `CKPT_WORKLOAD_CACHE` names another one.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")


def names() -> list[str]:
    """Return the names of all workload programs, sorted."""
    return sorted(path.stem for path in SOURCES.glob("*.c"))


def build(name: str) -> Path:
    """Return the compiled program `name`, compiling it if no current binary is there.

    Safe for callers at the same time: each compiles into a name of its own and renames; the last
    one wins with the same content.

    Raises:
        FileNotFoundError: there is no such program, or no gcc.
        RuntimeError: gcc refused it; the message holds what gcc said.
    """
    return build_file(SOURCES / f"{name}.c")


def build_file(source: Path) -> Path:
    """Return a program compiled from a source file that need not be a workload; see `build`."""
    name = source.stem
    binary = _cache() / f"{name}-{_digest(source)}"
    if binary.exists():
        return binary
    handle, scratch = tempfile.mkstemp(prefix=f".{name}-", dir=binary.parent)
    os.close(handle)
    try:
        command = ["gcc", *FLAGS, "-o", scratch, str(source), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        Path(scratch).chmod(0o755)  # some programs give up root before they are looked at
        Path(scratch).rename(binary)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return binary


def _cache() -> Path:
    chosen = os.environ.get("CKPT_WORKLOAD_CACHE")
    cache = Path(chosen) if chosen else SOURCES / ".build"
    if not cache.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        (cache / ".gitignore").write_text("*\n")
    return cache


def _digest(source: Path) -> str:
    parts = [source, *sorted(SOURCES.glob("*.h"))]
    content = b"\0".join(path.name.encode() + b"\0" + path.read_bytes() for path in parts)
    return hashlib.sha256(" ".join(FLAGS).encode() + content).hexdigest()[:16]
