import pytest

from ckpt.errors import UsageError
from ckpt.migrate.destination import Address, SshTarget, parse_destination
from ckpt.migrate.ssh import plan_command


@pytest.mark.parametrize(
    ("text", "destination"),
    [
        ("host:7000", Address("host", 7000)),
        ("10.0.0.2:1", Address("10.0.0.2", 1)),
        ("[fe80::1%eth0]:7000", Address("fe80::1%eth0", 7000)),
        ("ssh://host", SshTarget(None, "host", None)),
        ("ssh://me@host.example:2222/", SshTarget("me", "host.example", 2222)),
        ("ssh://me@[::1]:22", SshTarget("me", "::1", 22)),
    ],
)
def test_a_destination_is_read_and_written(text, destination):
    assert parse_destination(text) == destination
    assert parse_destination(str(destination)) == destination


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":7000",
        "host:",
        "host:0",
        "host:65536",
        "::1:7000",
        "me@host:22",
        "host name:1",
        "ssh://",
        "ssh://-oProxyCommand=x",
        "ssh://-l@host",
        "ssh://host:0",
        "ssh://host/path",
        "ssh://host:99999",
        "ssh://me@",
        "http://host:80",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(UsageError):
        parse_destination(text)


@pytest.mark.parametrize("text", [":7000", "*:7000"])
def test_to_listen_no_host_is_needed(text):
    assert Address.parse(text) == Address("", 7000)


def test_ssh_is_told_nothing_that_could_be_an_option():
    target = SshTarget("me", "host", 2222)
    assert plan_command(target, "sudo ckpt", "ssh -i 'a key'") == [
        *("ssh", "-i", "a key", "-T", "-p", "2222", "-l", "me", "--", "host"),
        "sudo ckpt receive --stdio",
    ]
