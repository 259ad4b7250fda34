"""Kernels to boot: found in Debian's archive, unpacked into a cache, never installed.

The cache is `$XDG_CACHE_HOME/ckpt-kernels` (`~/.cache/ckpt-kernels`); it may be deleted at any
time. A kernel appears there whole, by a rename, or not at all. Releases are not fixed here: the
newest of a series is taken, so that a point release of Debian does not break the tests.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs

from integration.kernels.apt import AptError, Package, PrivateApt, run_tool

REPOSITORY = Path(__file__).resolve().parents[2]
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PARTIAL = ".partial-"


@attrs.frozen
class KernelWish:
    """A kernel that the tests want, and what it is known to offer."""

    series: str
    """Major and minor number: `6.12`."""
    suite: str
    offers: frozenset[str]
    """Of `soft_dirty`, `pagemap_scan`, `uffd_wp_async`; told to the tests inside."""
    or_newer: bool = False
    """Take a later series when this one is gone: right where nothing has to be absent."""


WISHES = (
    KernelWish("6.1", "bookworm", frozenset({"soft_dirty"})),
    KernelWish(
        "6.12",
        "bookworm-backports",
        frozenset({"soft_dirty", "pagemap_scan", "uffd_wp_async"}),
        or_newer=True,
    ),
)


@attrs.frozen
class UnpackedKernel:
    """A kernel of the cache, ready to boot."""

    wish: KernelWish
    release: str
    directory: Path
    """Laid out like a root directory: `boot/`, `lib/modules/RELEASE/` with depmod's files."""
    notes: tuple[str, ...] = ()

    @property
    def vmlinuz(self) -> Path:
        """The image to boot."""
        return self.directory / "boot" / f"vmlinuz-{self.release}"

    def read_config(self) -> dict[str, str]:
        """Return the options it was built with: name without `CONFIG_` -> `y`, `m`, a value."""
        text = (self.directory / "boot" / f"config-{self.release}").read_text()
        return dict(re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE))


def default_cache() -> Path:
    """Return the directory that outlives a run."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ckpt-kernels"


def ensure_host_tools() -> None:
    """Install qemu and kmod from Debian's archive where they are missing.

    Raises:
        AptError: they are, and we may not (not root, or CKPT_NO_APT is set) or cannot.
    """
    tools = {"qemu-system-x86_64": "qemu-system-x86", "depmod": "kmod"}
    missing = [
        package for tool, package in tools.items() if not shutil.which(tool, path=SYSTEM_PATH)
    ]
    if not missing:
        return
    if os.environ.get("CKPT_NO_APT"):
        raise AptError(f"missing, and CKPT_NO_APT forbids to install: {' '.join(missing)}")
    run_tool(REPOSITORY / ".ci" / "packages", *missing)


@attrs.frozen
class KernelCache:
    """The cache directory, held by one process at a time while something is added to it."""

    directory: Path

    def prepare(self, wish: KernelWish) -> UnpackedKernel:
        """Return the newest kernel that fulfils `wish`, downloaded unless it is here already.

        Raises:
            AptError: there is none, here or on the mirror, or the mirror is out of reach.
        """
        with self._locked():
            try:
                release, package, notes = self._newest(wish)
            except AptError as exc:
                return self._cached(wish, exc)
            directory = self._unpacked(package, f"kernel-{release}", release)
            return UnpackedKernel(wish, release, directory, notes)

    def prepare_busybox(self) -> Path:
        """Return a static busybox: the initial ram disk, which loads 9p, is made of it."""
        with self._locked():
            here = sorted(self.directory.glob("busybox-*/bin/busybox"))
            if here:
                return here[-1]
            apt = self._apt()
            apt.refresh()
            package = apt.offers(["busybox-static"])[0]
            return self._unpacked(package, f"busybox-{package.version}") / "bin" / "busybox"

    def _apt(self) -> PrivateApt:
        return PrivateApt(self.directory / "apt", tuple(sorted({wish.suite for wish in WISHES})))

    def _newest(self, wish: KernelWish) -> tuple[str, Package, tuple[str, ...]]:
        apt = self._apt()
        apt.refresh()
        names = {name: release_of(name) for name in apt.names("linux-image-")}
        packages = apt.offers(name for name, release in names.items() if release)
        found = [(_sort_key(names[package.name] or ""), package) for package in packages]
        wanted = tuple(int(number) for number in wish.series.split("."))
        exact = [item for item in found if item[0][:2] == wanted]
        later = [item for item in found if wish.or_newer and item[0][:2] > wanted]
        if not exact and not later:
            raise AptError(f"{wish.suite} has no Linux {wish.series} (any more)")
        # Signed and unsigned hold the same kernel: the shorter name, for a stable choice.
        _, package = max(exact or later, key=lambda item: (item[0], -len(item[1].name)))
        release = names[package.name] or ""
        notes = () if exact else (f"Linux {wish.series} is gone from the archive: {release}",)
        return release, package, notes

    def _cached(self, wish: KernelWish, why: AptError) -> UnpackedKernel:
        releases = [path.name.removeprefix("kernel-") for path in self.directory.glob("kernel-*")]
        same = [r for r in releases if r.startswith(f"{wish.series}.")]
        if not same:
            raise why
        release = max(same, key=_sort_key)
        note = f"archive out of reach, cached kernel taken ({str(why).splitlines()[0]})"
        return UnpackedKernel(wish, release, self.directory / f"kernel-{release}", (note,))

    def _unpacked(self, package: Package, name: str, release: str | None = None) -> Path:
        done = self.directory / name
        if done.is_dir():
            return done
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=self.directory))
        self._apt().unpack(package, partial)
        if release:
            depmod = shutil.which("depmod", path=SYSTEM_PATH) or "depmod"
            run_tool(depmod, "-b", partial, release)
        partial.chmod(0o755)
        partial.rename(done)
        return done

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in self.directory.glob(f"{PARTIAL}*"):
                shutil.rmtree(leftover)
            yield


def release_of(package_name: str) -> str | None:
    """Return the release (`uname -r`) in a package's name; None for cloud, rt and dbg variants."""
    shape = r"linux-image-(\d+\.\d+\.[^-]+(?:-\d+)?-amd64)(?:-unsigned)?"
    found = re.fullmatch(shape, package_name)
    return found[1] if found else None


def _sort_key(release: str) -> tuple[int, ...]:
    """Order releases: 6.12.90+deb12 < 6.12.90+deb12.1 < 6.12.95+deb12."""
    return tuple(int(number) for number in re.findall(r"\d+", release.removesuffix("-amd64")))
