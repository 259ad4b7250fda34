"""Compiles the C programs of the bench, once for each content of their sources."""

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "programs"
_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-pthread")


def build(name: str, *, shared: bool = False) -> Path:
    """Return the program `name`, or with `shared` the library, compiling it where it is missing.

    Raises:
        FileNotFoundError: there is no gcc.
        RuntimeError: gcc refused it; the message holds what gcc said.
    """
    flags = [*_FLAGS, *(["-shared", "-fPIC"] if shared else [])]
    source = SOURCES / f"{name}.c"
    content = b"\0".join(path.read_bytes() for path in (source, SOURCES / "beat.h"))
    digest = hashlib.sha256(" ".join(flags).encode() + content).hexdigest()[:16]
    binary = SOURCES / ".build" / f"{name}-{digest}"
    if binary.exists():
        return binary
    binary.parent.mkdir(exist_ok=True)
    (binary.parent / ".gitignore").write_text("*\n")
    handle, scratch = tempfile.mkstemp(dir=binary.parent)
    os.close(handle)
    command = ["gcc", *flags, "-o", scratch, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        os.unlink(scratch)
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    os.chmod(scratch, 0o755)
    os.rename(scratch, binary)
    return binary
