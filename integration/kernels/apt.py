"""Fetch Debian packages without touching the machine's own apt configuration.

apt is given private directories for its sources and its state, and reads everything else (proxies,
for instance) from the machine's configuration. The mirror is the one that the machine's own sources
name. Nothing is installed: packages are downloaded and handed over as files.
"""

import shlex
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import attrs

DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
INDEX_VALID_S = 24 * 3600.0
"""How long a downloaded package index is taken for current."""


class AptError(Exception):
    """apt, or dpkg, did not do what it was asked for; the message holds its own words."""


@attrs.frozen
class Package:
    """One version of a package that the mirror offers."""

    name: str
    version: str

    def __str__(self) -> str:
        """Write it the way apt-get wants it."""
        return f"{self.name}={self.version}"


def run_tool(*argv: str | Path, cwd: Path | None = None) -> str:
    """Run a command to its end and return its output.

    Raises:
        AptError: it is not there, or did not succeed.
    """
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as exc:
        raise AptError(f"{words[0]} is not on this machine") from exc
    if done.returncode:
        name = Path(words[0]).name
        raise AptError(f"{name} failed: {done.stderr.strip()}\nThe command was {shlex.join(words)}")
    return done.stdout


@attrs.frozen
class PrivateApt:
    """An apt of our own below `directory`, over `suites` of the machine's Debian mirror."""

    directory: Path
    suites: tuple[str, ...]

    def refresh(self) -> None:
        """Make the package index current; asks the network at most once a day.

        Raises:
            AptError: the mirror cannot be found or reached, or lacks one of the suites.
        """
        wanted = self._sources()
        sources, stamp = self.directory / "sources.list", self.directory / "updated"
        if (
            stamp.exists()
            and sources.read_text() == wanted
            and 0 <= time.time() - stamp.stat().st_mtime < INDEX_VALID_S
        ):
            return
        for private in ("lists/partial", "cache/archives/partial"):
            (self.directory / private).mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        sources.write_text(wanted)
        self._apt("apt-get", "update", "-o", "APT::Update::Error-Mode=any")
        stamp.touch()

    def names(self, prefix: str) -> list[str]:
        """Return the names of all known packages that begin with `prefix`."""
        return sorted(self._apt("apt-cache", "pkgnames", prefix).split())

    def offers(self, names: Iterable[str]) -> list[Package]:
        """Return those of `names` that can be downloaded, each version of each."""
        wanted = list(names)
        if not wanted:
            return []
        lines = self._apt("apt-cache", "madison", *wanted).splitlines()
        columns = [[column.strip() for column in line.split("|")] for line in lines]
        return [Package(name, version) for name, version, _ in columns]

    def needs(self, name: str) -> list[str]:
        """Return the names of a package and of all that it cannot do without."""
        weak = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
        without = [f"--no-{relation}" for relation in weak]
        lines = self._apt("apt-cache", "depends", "--recurse", *without, name).splitlines()
        # A package stands at the beginning of its line; what it depends on is indented below it.
        return [line for line in lines if line and line[0].isalnum()]

    def unpack(self, package: Package, into: Path) -> None:
        """Download `package` and unpack its files below `into`, an empty directory."""
        self._apt("apt-get", "download", str(package), cwd=into)
        (archive,) = into.glob("*.deb")
        run_tool("dpkg", "-x", archive, into)
        archive.unlink()

    def _apt(self, tool: str, *words: str, cwd: Path | None = None) -> str:
        private = {
            "Dir::Etc::sourcelist": self.directory / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": self.directory / "lists",
            "Dir::Cache": self.directory / "cache",
            "Acquire::Languages": "none",
            # The unprivileged user of apt cannot reach a private directory.
            "APT::Sandbox::User": "root",
        }
        options = [word for key, value in private.items() for word in ("-o", f"{key}={value}")]
        return run_tool(tool, *options, *words, cwd=cwd)

    def _sources(self) -> str:
        signed = f"[signed-by={DEBIAN_KEYRING}] " if DEBIAN_KEYRING.exists() else ""
        mirror = find_debian_mirror()
        return "".join(f"deb {signed}{mirror} {suite} main\n" for suite in self.suites)


def find_debian_mirror() -> str:
    """Return the address of the Debian archive that this machine's sources name.

    Raises:
        AptError: they name none.
    """
    fields = ("REPO_URI", "RELEASE", "COMPONENT", "ORIGIN", "LABEL")
    form = "|".join(f"$({field})" for field in fields)
    text = run_tool("apt-get", "indextargets", "--format", form, "Created-By: Packages")
    targets = [dict(zip(fields, line.split("|"), strict=True)) for line in text.splitlines()]
    in_main = [target for target in targets if target["COMPONENT"] == "main"]
    # Origin and label come from the downloaded index; a machine that never ran `apt-get update`
    # has none, and there only the name of the suite tells.
    by_label = [t for t in in_main if (t["ORIGIN"], t["LABEL"]) == ("Debian", "Debian")]
    by_suite = [t for t in in_main if t["RELEASE"] == _own_codename()]
    for target in by_label + by_suite:
        return target["REPO_URI"]
    raise AptError("the apt sources of this machine name no Debian mirror")


def _own_codename() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == "VERSION_CODENAME":
            return value.strip('"')
    return ""
