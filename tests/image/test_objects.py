"""What object storage says when it will not: each trouble is one of ours, in a sentence."""

import errno
import sys
from pathlib import Path

import pytest

from ckpt.errors import ConnectFailed, ImageCorrupt, ImageUnusable, NotPermitted, UsageError
from ckpt.image.objects import Objects, UrlPath, open_objects, parse_place
from tests.image.bucket import ROOT, URL, Bucket, new_memory


class NoCredentialsError(Exception):
    pass


class Refusing:
    """A file system on which all that is done fails."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        def fail(*_args, **_more):
            raise self.error

        return fail


@pytest.mark.parametrize(
    ("error", "kind", "exit_code"),
    [
        (PermissionError("Access Denied"), NotPermitted, 12),
        (OSError(errno.EPERM, "SignatureDoesNotMatch"), NotPermitted, 12),
        (NoCredentialsError("Unable to locate credentials"), NotPermitted, 12),
        (FileNotFoundError("The specified bucket does not exist"), ImageUnusable, 30),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), ConnectFailed, 50),
        (TimeoutError(), ConnectFailed, 50),
        (RuntimeError("500\nInternal \x1b[31mError"), ConnectFailed, 50),
    ],
)
def test_what_a_store_raises_has_its_exit_code_and_one_line(error, kind, exit_code):
    objects = Objects(Refusing(error), ROOT, URL)
    for ask in (
        objects.list,
        lambda: objects.put("CKPT", b"x"),
        lambda: objects.create("CKPT", b"x"),
        lambda: objects.send("CKPT", Path("/dev/null"), print),
    ):
        with pytest.raises(kind) as told:
            ask()
        assert told.value.exit_code == exit_code
        assert told.value.message().isprintable()
        assert URL in told.value.message()


def test_a_missing_object_is_damage():
    for ask in (lambda: Bucket().read("CKPT", 0, 1), lambda: Bucket().look("CKPT")):
        with pytest.raises(ImageCorrupt, match="CKPT is damaged: it is missing"):
            ask()


def test_no_object_is_made_twice():
    bucket = Bucket()
    assert bucket.create("CKPT", b"first")
    assert not bucket.create("CKPT", b"second")
    assert bucket.content() == {"CKPT": b"first"}


@pytest.mark.parametrize(
    ("says", "made"),
    [
        ("An error occurred (PreconditionFailed)", False),
        ("An error occurred (NotImplemented): A header", True),
    ],
)
def test_how_stores_tell_that_an_object_is_there_already(says, made):
    class Particular(type(new_memory())):
        def pipe_file(self, path, value, mode="overwrite", **more):
            if mode == "create":
                raise OSError(errno.EIO, says)
            super().pipe_file(path, value, mode, **more)

    bucket = Bucket(Particular())
    assert bucket.create("CKPT", b"first") is made
    assert bucket.content() == ({"CKPT": b"first"} if made else {})


def test_places():
    assert parse_place("relative/image") == Path("relative/image")
    assert parse_place("file:///var/ckpt/job") == Path("/var/ckpt/job")
    assert parse_place("s3://backups/job/") == "s3://backups/job"
    assert parse_place("gs://backups") == "gs://backups"


@pytest.mark.parametrize(
    "place",
    [
        "file://host/job",
        "http://host/job",
        "memory://job",
        "simplecache::s3://backups/job",
        "s3://",
        "s3://backups//job",
        "s3://backups/../job",
        "s3://backups/jo\nb",
    ],
)
def test_what_is_no_place(place):
    if "::" in place:
        assert parse_place(place) == Path(place), "fsspec's chains of URLs are none of ours"
        return
    with pytest.raises(UsageError) as told:
        parse_place(place)
    assert told.value.exit_code == 2


def test_a_store_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"pip install 'ckpt\[gs\]'"):
        open_objects("gs://backups/job")


def test_a_url_looks_like_one_in_messages():
    assert str(UrlPath("s3://backups/job") / "gen-000000" / "manifest") == (
        "s3://backups/job/gen-000000/manifest"
    )
