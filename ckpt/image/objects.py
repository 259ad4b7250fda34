"""Object storage, as far as chains need it: whole objects under one URL, and errors with a meaning.

fsspec speaks to the store (s3:// by s3fs, gs:// by gcsfs); its packages do the retrying. Every
request goes through `Objects`, so that a test can let any single one be the last. What a store
raises becomes an error of ours here and nowhere above. Neighbours: `remote` reads a chain here,
`sending` writes one; names given to this module are made by `format`, never taken from a listing.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any, Protocol

import attrs

from ckpt.errors import (
    CkptError,
    ConnectFailed,
    ImageCorrupt,
    ImageUnusable,
    NotPermitted,
    UsageError,
    printable,
)

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
"""Which package speaks to which store; each is an extra of ckpt of the name of the scheme."""

WHOSE = (
    "nothing tells who wrote what is there, and a restore runs it: give --trust-image if only those"
    " can write there whom you trust"
)
"""Why it is not restored just so."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.ASCII | re.DOTALL)
_MARKS = ("ETag", "etag", "generation", "created")
"""What stores call that which changes whenever an object is written."""
_REFUSED = frozenset({errno.EACCES, errno.EPERM})


class UrlPath(PosixPath):
    """A URL for those who expect a path, to be shown in messages only."""

    def __str__(self) -> str:
        """Return it as it was given: a path has one slash where a URL has two."""
        return super().__str__().replace(":/", "://", 1)


def is_url(place: str) -> bool:
    """Tell a URL from a directory."""
    return _URL.fullmatch(place) is not None


def parse_place(place: str) -> Path | str:
    """Return a directory of this machine, or a URL of an object store.

    `file://` is a directory: it has locks and renames, which stores have not.

    Raises:
        UsageError: it is a URL of which we know nothing.
    """
    match = _URL.fullmatch(place)
    if match is None:
        return Path(place)
    scheme, rest = match.groups()
    if scheme == "file":
        if not rest.startswith("/"):
            raise UsageError(f"{place}: a file:// URL has three slashes and a whole path")
        return Path(rest)
    if scheme not in PACKAGES:
        known = ", ".join(f"{one}://" for one in (*PACKAGES, "file"))
        raise UsageError(f"{place}: this is no kind of storage that ckpt knows ({known})")
    parts = rest.rstrip("/").split("/")
    if not all(parts) or {".", ".."} & set(parts) or not printable(rest) == rest:
        raise UsageError(f"{place}: give a bucket and a name in it, {scheme}://BUCKET/NAME")
    return f"{scheme}://{'/'.join(parts)}"


@attrs.frozen
class Stored:
    """An object that is there."""

    size_bytes: int
    mark: str
    """Changes whenever the object is written; "" if the store tells nothing like it."""


class FileSystem(Protocol):
    """What is used of fsspec's `AbstractFileSystem`, which has no types."""

    def invalidate_cache(self) -> None:
        """Remember no listing."""

    def find(self, path: str, *, detail: bool) -> dict[str, dict[str, Any]]:
        """List all files below."""

    def info(self, path: str) -> dict[str, Any]:
        """Tell size and more."""

    def cat_file(self, path: str, *, start: int, end: int) -> bytes:
        """Read a range."""

    def pipe_file(self, path: str, value: bytes, *, mode: str = ...) -> object:
        """Write a file."""

    def put_file(self, lpath: str, rpath: str, *, callback: object) -> object:
        """Write a file from one of this machine."""


class Objects:
    """What is under one URL. A test may subclass it: every method is one request, or a few."""

    def __init__(self, filesystem: FileSystem, root: str, url: str) -> None:
        """Use `open_objects`. `root` is what `filesystem` calls `url`, without a slash behind."""
        self._filesystem = filesystem
        self._root = root
        self.url = url

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def list(self, key: str = "") -> dict[str, Stored]:
        """Return all objects under the URL, or under `key`, by their name behind the URL's.

        The names are whatever somebody put there.

        Raises:
            ConnectFailed, NotPermitted: the store does not tell.
        """
        with self._errors(key, "list"):
            self._filesystem.invalidate_cache()
            found = self._filesystem.find(self._path(key), detail=True)
            start = len(self._root) + 1
            return {path[start:]: _stored(info) for path, info in found.items()}

    def look(self, key: str) -> Stored:
        """Return what is known of one object.

        Raises:
            ImageCorrupt: it is not there.
            ConnectFailed, NotPermitted: the store does not tell.
        """
        with self._errors(key, "look at"), self._missing(key):
            self._filesystem.invalidate_cache()
            return _stored(self._filesystem.info(self._path(key)))

    def read(self, key: str, start: int, end: int) -> bytes:
        """Return bytes `start` to `end`, exactly; safe in any thread.

        Raises:
            ImageCorrupt: it is not there, or shorter.
            ConnectFailed, NotPermitted: the store does not give it.
        """
        if start == end:
            return b""
        with self._errors(key, "read"), self._missing(key):
            data = bytes(self._filesystem.cat_file(self._path(key), start=start, end=end))
        if len(data) != end - start:
            raise ImageCorrupt(f"{self.url}/{key}", "it is shorter than the store said")
        return data

    def put(self, key: str, data: bytes) -> None:
        """Write an object, in place of one that is there.

        Raises:
            ConnectFailed, NotPermitted, ImageUnusable: the store does not take it.
        """
        with self._errors(key, "write"):
            self._filesystem.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; tell whether it was written.

        Stores that can (S3, GCS) decide that in one step.

        Raises:
            ConnectFailed, NotPermitted, ImageUnusable: the store does not take it.
        """
        with self._errors(key, "write"):
            try:
                self._filesystem.pipe_file(self._path(key), data, mode="create")
            except FileExistsError:
                return False
            except Exception as error:
                # Whatever it is made of it, the answer itself is behind it.
                answer = f"{error} {error.__cause__}"
                if "PreconditionFailed" in answer:
                    return False
                if "NotImplemented" not in answer:
                    raise
                # A store that only resembles S3: whoever looked before has to do.
                self._filesystem.pipe_file(self._path(key), data)
        return True

    def send(self, key: str, path: Path, report: Callable[[int], None]) -> None:
        """Write an object from a file; `report` is told how many bytes are under way.

        Raises:
            ConnectFailed, NotPermitted, ImageUnusable: the store does not take it.
        """
        with self._errors(key, "write"):
            self._filesystem.put_file(os.fspath(path), self._path(key), callback=_callback(report))

    @contextlib.contextmanager
    def _missing(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ImageCorrupt(f"{self.url}/{key}", "it is missing") from error

    @contextlib.contextmanager
    def _errors(self, key: str, action: str) -> Iterator[None]:
        """Whatever the store's package raises is the store's trouble, or the network's."""
        try:
            yield
        except CkptError:
            raise
        except Exception as error:
            raise _meaning(error, f"{self.url}/{key}".rstrip("/"), action) from error


def _stored(info: dict[str, Any]) -> Stored:
    mark = next((info[name] for name in _MARKS if info.get(name) is not None), "")
    # A time comes as such, or in seconds.
    seconds = getattr(mark, "timestamp", None)
    return Stored(int(info["size"]), str(seconds() if seconds else mark))


def _callback(report: Callable[[int], None]) -> object:
    from fsspec.callbacks import Callback

    return Callback(hooks={"report": lambda size, value, **_: report(min(value, size or value))})


def _meaning(error: Exception, url: str, action: str) -> CkptError:
    """Return the error of ours; types of packages that may not be installed go by their names."""
    text = printable(" ".join(str(error).split()) or type(error).__name__)
    kind = type(error).__name__
    no_key = "Credential" in kind or kind in ("RefreshError", "InvalidToken", "TokenRetrievalError")
    if no_key or isinstance(error, PermissionError) or getattr(error, "errno", 0) in _REFUSED:
        remedy = f"{text} (keys are looked for where the tools of the store have them, for the user"
        return NotPermitted(f"{action} {url}", f"{remedy} that ckpt runs as)")
    if isinstance(error, FileNotFoundError):
        return ImageUnusable(url, f"cannot {action} it: there is no such bucket ({text})")
    return ConnectFailed(
        url, f"cannot {action} it: {text}; once that works, the same command goes on from here"
    )


def open_objects(url: str) -> Objects:
    """Return what is under a URL of `parse_place`; nothing is asked of the store yet.

    Raises:
        UsageError: the package for this kind of store is not installed.
        NotPermitted, ConnectFailed: it cannot even begin.
    """
    # Imported when needed: start-up counts, and hardly any command asks for a store.
    from fsspec.core import url_to_fs

    scheme = url.partition(":")[0]
    try:
        filesystem, root = url_to_fs(url)
    except ImportError as error:
        raise UsageError(
            f"{scheme}:// takes the Python package {PACKAGES[scheme]}, which is not installed:"
            f" pip install 'ckpt[{scheme}]'"
        ) from error
    except Exception as error:
        raise _meaning(error, url, "open") from error
    return Objects(filesystem, root.rstrip("/"), url)
