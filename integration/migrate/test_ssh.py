"""`ssh://`: the channel over the standard streams of a command, with a stand-in for ssh itself.

It starts the command here, with pipes or with the socket it was given, as sshd may; the command
goes on when the stand-in is ended.
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

from ckpt.errors import ConnectFailed, PeerLost, PeerRefused
from ckpt.migrate.destination import SshTarget
from ckpt.migrate.dial import Dialer
from ckpt.migrate.messages import Purpose
from tests.migrate.ends import SHORT
from tests.migrate.receivers import PATIENT
from tests.migrate.spoken import Word

RECEIVER = Path(__file__).with_name("remote_receiver.py")
TOP = RECEIVER.parents[2]

STAND_IN = shlex.join([sys.executable, str(RECEIVER.with_name("stand_in_ssh.py"))])
SOCKET, PIPES = (f'exec {STAND_IN} {how} "$@"' for how in ("socket", "pipes"))

TARGET = SshTarget("me", "there", None)


@pytest.fixture
def directory():
    # A path of a socket may not be as long as that of pytest's own directories.
    with tempfile.TemporaryDirectory(prefix="ckpt-") as directory:
        yield Path(directory)


@pytest.fixture
def install(directory, monkeypatch):
    def install(how):
        ssh = directory / "ssh"
        ssh.write_text(f"#!/bin/sh\n{how}\n")
        ssh.chmod(0o700)
        monkeypatch.setenv("CKPT_SSH", f"{ssh} -o Some=Option")
        monkeypatch.setenv("PYTHONPATH", str(TOP))

    return install


@pytest.fixture(params=[SOCKET, PIPES], ids=["socket", "pipes"])
def ssh(install, request):
    install(request.param)


@pytest.fixture
def dialer(directory):
    def dial(handler, **options):
        options.setdefault("patience", PATIENT)
        command = shlex.join([sys.executable, str(RECEIVER), str(directory), handler])
        return Dialer(TARGET, remote_ckpt=command, **options)

    return dial


def say(channel, text, count=0):
    channel.send(Word(text, count))
    return channel.receive(Word)


@pytest.mark.usefixtures("ssh")
def test_a_session_over_standard_streams(dialer, directory):
    with dialer("echo").open() as channel:
        pid = say(channel, "pid").count
        pidfd = os.pidfd_open(pid)
        assert say(channel, "hello").text == "hello"
        assert [path.suffix for path in directory.iterdir() if path.name != "ssh"] == [".session"]
        channel.send(Word("end"))
        with pytest.raises(PeerLost):
            channel.receive(Word)
    wait_for_end(pidfd)
    assert [path.name for path in directory.iterdir()] == ["ssh"]


def wait_for_end(pidfd):
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(20_000)
    os.close(pidfd)


@pytest.mark.usefixtures("ssh")
def test_a_further_stream_comes_to_the_same_process(dialer):
    dial = dialer("echo")
    with dial.open() as channel:
        channel.send(Word("await"))
        with dial.attach(Purpose.STREAM) as stream:
            assert stream.receive(Word).text == "joined to stream"
            assert say(stream, "over the stream").text == "over the stream"
        assert channel.receive(Word).text == "left"
        assert say(channel, "hello").text == "hello"


@pytest.mark.usefixtures("ssh")
def test_a_cut_session_is_resumed(dialer):
    dial = dialer("survive_a_cut")
    channel = dial.open()
    for count in (1, 2):
        assert say(channel, "again").count == count
        channel.close()
        channel = dial.attach(Purpose.RESUME)
    with channel:
        assert say(channel, "end").count == 3


@pytest.mark.usefixtures("ssh")
def test_a_session_that_has_ended_is_unknown(dialer):
    dial = dialer("echo")
    with dial.open() as channel:
        pidfd = os.pidfd_open(say(channel, "pid").count)
        channel.send(Word("end"))
        wait_for_end(pidfd)
    with pytest.raises(PeerRefused) as raised:
        dial.attach(Purpose.RESUME)
    assert raised.value.peer_code == "unknown-session"


@pytest.mark.usefixtures("ssh")
def test_a_trouble_over_there_is_told(dialer):
    with dialer("echo").open() as channel, pytest.raises(PeerRefused, match="has no wings"):
        say(channel, "refuse")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("echo Permission denied >&2; exit 255", "ssh could not connect"),
        ("exit 127", "no such command"),
        ("echo Welcome to this host; cat", "no message of ckpt"),
        ("exit 0", "no 'ckpt receive' answers there"),
    ],
)
def test_what_is_no_receiver_is_told_apart(install, dialer, how, reason):
    install(how)
    with pytest.raises(ConnectFailed, match=reason):
        dialer("echo").open()


def test_a_host_that_says_nothing_is_given_up(install, dialer):
    install("exec cat >/dev/null")
    with pytest.raises(ConnectFailed):
        dialer("echo", patience=SHORT).open()


def test_without_ssh_that_is_said(monkeypatch):
    monkeypatch.setenv("CKPT_SSH", "no-such-command")
    with pytest.raises(ConnectFailed, match="no no-such-command on this host"):
        Dialer(TARGET).open()


def test_ctrl_c_does_not_reach_ssh(install, dialer):
    install("kill -INT $$; " + SOCKET)
    with dialer("echo").open() as channel:
        assert say(channel, "hello").text == "hello"
