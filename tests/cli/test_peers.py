import click
import pytest

from ckpt.cli.peers import (
    dial_options,
    listen_options,
    make_dialer,
    parse_listen,
    read_certificates,
)
from ckpt.errors import UsageError
from ckpt.migrate.destination import Address
from ckpt.migrate.pairing import Token, write_token
from ckpt.migrate.tls import CertificateFiles

FILES = CertificateFiles("cert", "key", "ca")


def options_of(decorate):
    return {parameter.name for parameter in click.command(decorate(lambda: None)).params}


def test_the_options_are_those_that_are_documented():
    both = {"token_file", "tls_cert", "tls_key", "tls_ca"}
    assert options_of(dial_options) == {*both, "to", "bandwidth", "remote_ckpt"}
    assert options_of(listen_options) == {*both, "listen", "stdio", "once"}


def test_three_files_or_none():
    assert read_certificates(None, None, None) is None
    assert read_certificates("cert", "key", "ca") == FILES
    with pytest.raises(UsageError, match="all three"):
        read_certificates("cert", "key", None)


def dialer(to, token_file=None, certificates=None, bandwidth=None):
    return make_dialer(to, token_file, certificates, bandwidth, "ckpt")


def test_a_dialer_is_made_of_what_belongs_together(tmp_path):
    path = str(tmp_path / "token")
    write_token(Token.make(bytes(32)), path)
    dialer("host:1", token_file=path, bandwidth="1G")
    dialer("host:1", certificates=FILES)
    dialer("ssh://host")


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"to": "host"}, "HOST:PORT"),
        ({"to": "host:1"}, "token"),
        ({"to": "host:1", "token_file": "no-such-file"}, "no-such-file"),
        ({"to": "host:1", "token_file": "F", "certificates": FILES}, "two ways"),
        ({"to": "ssh://host", "token_file": "F"}, "ssh"),
        ({"to": "ssh://host", "certificates": FILES}, "ssh"),
        ({"to": "ssh://host", "bandwidth": "quick"}, "quick"),
    ],
)
def test_what_does_not_is_refused_before_anything_is_tried(options, phrase):
    with pytest.raises(UsageError, match=phrase):
        dialer(**options)


def test_a_receiver_listens_or_takes_its_streams():
    assert parse_listen(None, True, None, None) is None
    assert parse_listen("*:0", False, None, FILES) == Address("", 0)
    for options in [
        (None, False, None, None),
        (":1", True, None, None),
        (None, True, "F", None),
        (None, True, None, FILES),
        (":1", False, "F", FILES),
        ("host", False, None, None),
    ]:
        with pytest.raises(UsageError):
            parse_listen(*options)
