"""CRIU for the comparison: Debian 13's, fetched into a cache and run from there, never installed.

Debian 12's 3.17 does not start on recent kernels. The package of the next release does, with its
own C library: both are unpacked into one folder, and the program is run by that folder's dynamic
linker. The cache is `$XDG_CACHE_HOME/ckpt-bench` (`~/.cache/ckpt-bench`); it may be deleted.
"""

import ctypes
import os
import shutil
import tempfile
from pathlib import Path

from integration.kernels.apt import AptError, PrivateApt, run_tool

SUITE = "trixie"
_PARTIAL = ".partial-"
_CLONE_NEWNS = 0x20000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18


def default_cache() -> Path:
    """Return the directory that outlives a run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ckpt-bench"


def find_criu(cache: Path) -> list[str]:
    """Return the words that start CRIU, which is fetched unless it is in `cache`.

    Raises:
        AptError: it cannot be had, or does not work on this kernel.
    """
    cache.mkdir(parents=True, exist_ok=True)
    roots = sorted(cache.glob("criu-*"))
    root = roots[-1] if roots else _fetch(cache)
    usr = root / "usr"
    linker, libraries = usr / "lib64/ld-linux-x86-64.so.2", usr / "lib/x86_64-linux-gnu"
    command = [str(linker), "--library-path", str(libraries), str(usr / "sbin/criu")]
    run_tool(*command, "check")
    return command


def _fetch(cache: Path) -> Path:
    for leftover in cache.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)
    apt = PrivateApt(cache / "apt", (SUITE,))
    apt.refresh()
    packages = apt.offers(apt.needs("criu"))
    versions = [package.version for package in packages if package.name == "criu"]
    if not versions:
        raise AptError(f"{SUITE} has no criu")
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=cache))
    for package in packages:
        apt.unpack(package, partial)
    root = cache / f"criu-{versions[0]}"
    partial.rename(root)
    return root


def enter_private_run() -> None:
    """Give this process, and all that it starts, a /run on tmpfs: its own, if it has to be made.

    CRIU keeps what it has learnt of the kernel there, and only on a tmpfs; without, it learns it
    anew each time, which is most of the time of a small dump.

    Raises:
        OSError: not permitted.
    """
    if run_tool("stat", "--file-system", "--format=%T", "/run").strip() == "tmpfs":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for call, arguments in (
        (libc.unshare, (_CLONE_NEWNS,)),
        (libc.mount, (b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)),
        (libc.mount, (b"tmpfs", b"/run", b"tmpfs", 0, b"size=16m")),
    ):
        if call(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
