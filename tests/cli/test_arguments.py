"""The promise: a command line that makes no sense is one sentence, exit code 2, and does nothing.

No process and no directory is touched here: what they do to the codes is in `integration/errors`.
"""

import json
import shutil

import pytest

from ckpt.cli.main import COMMANDS, cli, run
from ckpt.image.keys import PrivateKey
from tests.plugins.tree import TOP

GOLDEN = TOP / "images" / "golden" / "format-1.0"
BROKEN = TOP / "images" / "broken"
SOMEBODY = str(PrivateKey(bytes(range(32))).recipient)


@pytest.mark.parametrize(
    ("args", "phrase"),
    [
        (["dump"], "IMAGE_DIR"),
        (["dump", "IMAGES"], "--pid"),
        (["dump", "--pid", "1"], "IMAGE_DIR"),
        (["dump", "--pid", "0", "IMAGES"], "--pid"),
        (["dump", "--pid", "-1", "IMAGES"], "--pid"),
        (["dump", "--pid", "self", "IMAGES"], "self"),
        (["dump", "--pid", "1.5", "IMAGES"], "1.5"),
        (["dump", "--pid", "1", "IMAGES", "MORE"], "MORE"),
        (["dump", "--pid", "1", "--tracker", "telepathy", "IMAGES"], "telepathy"),
        (["dump", "--pid", "1", "--tracker"], "--tracker"),
        (["dump", "--pid", "1", "--incremantal", "IMAGES"], "--incremantal"),
        (["restore"], "IMAGE_DIR"),
        (["restore", "--at", "-1", "IMAGES"], "--at"),
        (["restore", "--at", "newest", "IMAGES"], "newest"),
        (["restore", "--inherit", "1", "IMAGES"], "FD=PATH"),
        (["restore", "--inherit", "=/dev/null", "IMAGES"], "FD=PATH"),
        (["restore", "--inherit", "1=", "IMAGES"], "FD=PATH"),
        (["restore", "--inherit", "one=/dev/null", "IMAGES"], "FD=PATH"),
        (["restore", "--inherit", "pipe:[1]=", "IMAGES"], "KEY=FD"),
        (["restore", "--inherit", "pipe:[1]=777", "IMAGES"], "descriptor 777"),
        (["dump", "--pid", "1", "--external", "pipe", "IMAGES"], "pipe:[4711]"),
        (["restore", "--inherit", "-1=/dev/null", "IMAGES"], "FD=PATH"),
        (["restore", "--allow-changed"], "--allow-changed"),
        (["run"], "IMAGE_DIR"),
        (["run", "IMAGES"], "COMMAND"),
        (["run", "IMAGES", "--"], "behind IMAGE_DIR and --"),
        (["run", "IMAGES", "--every", "5s", "--", "true"], "options before"),
        (["run", "--every", "5", "IMAGES", "true"], "30s"),
        (["run", "--every", "0s", "IMAGES", "true"], "30s"),
        (["run", "--checkpoint-on", "SIGTERM", "IMAGES", "true"], "SIGTERM"),
        (["run", "--checkpoint-on", "9", "IMAGES", "true"], "'9'"),
        (["run", "--keep", "0", "IMAGES", "true"], "--keep"),
        (["run", "--keep", "2", "--keep-all", "IMAGES", "true"], "--keep-all"),
        (["run", "--restart", "always", "IMAGES", "true"], "always"),
        (["show"], "IMAGE_DIR"),
        (["show", "A", "B"], "B"),
        (["show", "--at", "newest", "IMAGES"], "newest"),
        (["show", "--pid", "0", "IMAGES"], "--pid"),
        (["diff", "IMAGES", "1"], "'N'"),
        (["diff", "IMAGES", "1", "newest"], "newest"),
        (["export"], "IMAGE_DIR"),
        (["export", "--at", "newest", "IMAGES"], "newest"),
        (["export", "--pid", "0", "IMAGES"], "--pid"),
        (["export", "-o", ".", "IMAGES"], "directory"),
        (["keygen"], "FILE"),
        (["keygen", "--recipient", "NONE"], "NONE"),
        (["dump", "--pid", "1", "--encrypt-to", "ckpt1abc", "IMAGES"], "ckpt1abc"),
        (["dump", "--pid", "1", "--encrypt-to", "NONE", "IMAGES"], "NONE"),
        (["restore", "--identity", "NONE", "IMAGES"], "NONE"),
        (["receive", "--stdio", "--encrypt-to", SOMEBODY], "--image-dir"),
        (["run", "--encrypt-to", SOMEBODY, "--restart", "on-failure", "D", "true"], "--identity"),
        (["check", "--pid", "0"], "--pid"),
        (["verify"], "IMAGE_DIR"),
        (["squash", "--to", "-1", "IMAGES"], "--to"),
        (["prune", "--keep-last", "0", "IMAGES"], "--keep-last"),
        (["prune", "--keep-every", "soon", "IMAGES"], "soon"),
        (["check", "IMAGES"], "IMAGES"),
        (["undump", "IMAGES"], "undump"),
    ],
)
def test_a_line_that_makes_no_sense(args, phrase, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(cli, args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ckpt: ")
    assert err.count("\n") == 1
    assert phrase in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example(command, capsys):
    assert run(cli, [command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Example:" in out
    assert f"  ckpt {command}" in out.partition("Example:")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_speaks_json(command, capsys):
    run(cli, [command, "--help"])
    assert "--json" in capsys.readouterr().out


IMAGE_COMMANDS = ["show", "restore", "export"]


def fails(args, capsys):
    """Run what must fail, in both languages; return exit code and sentence."""
    code = run(cli, args)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ckpt: ")
    assert err.count("\n") == 1
    assert run(cli, [*args, "--json"]) == code
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["exit_code"], f"ckpt: {error['message']}\n") == (code, err)
    return code, err


@pytest.mark.parametrize("command", IMAGE_COMMANDS)
def test_a_directory_that_is_not_there(command, capsys, tmp_path):
    code, sentence = fails([command, str(tmp_path / "none")], capsys)
    assert (code, "no such directory" in sentence) == (30, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", IMAGE_COMMANDS)
def test_a_directory_of_somebody_else(command, capsys, tmp_path):
    (tmp_path / "letters").write_text("dear")
    code, sentence = fails([command, str(tmp_path)], capsys)
    assert (code, "not an image directory" in sentence) == (30, True)


@pytest.mark.parametrize("command", IMAGE_COMMANDS)
def test_an_image_of_a_newer_format(command, capsys):
    code, sentence = fails([command, str(BROKEN / "newer-major-version")], capsys)
    assert (code, "format 3.0" in sentence) == (32, True)


@pytest.mark.parametrize("command", IMAGE_COMMANDS)
def test_an_image_that_is_damaged(command, capsys):
    code, sentence = fails([command, str(BROKEN / "bit-flip-in-manifest")], capsys)
    assert (code, "gen-000001/manifest is damaged" in sentence) == (31, True)


def test_a_generation_that_does_not_exist(capsys):
    code, sentence = fails(["restore", "--at", "77", str(GOLDEN)], capsys)
    assert (code, "has no generation 77; it has 0" in sentence) == (34, True)


def test_a_chain_without_a_generation(capsys, tmp_path):
    chain = tmp_path / "chain"
    shutil.copytree(GOLDEN, chain, ignore=lambda _, names: [n for n in names if "gen-" in n])
    code, sentence = fails(["restore", str(chain)], capsys)
    assert (code, "none yet" in sentence) == (34, True)
    assert run(cli, ["show", str(chain)]) == 0
    assert "no generation yet" in capsys.readouterr().out


def test_an_image_without_a_process_is_not_restored(capsys):
    """The golden chain is of the image layer alone: its records hold no process of ours."""
    code, sentence = fails(["restore", str(GOLDEN)], capsys)
    assert (code, "records" in sentence) == (31, True)


def test_what_is_shown_in_json(capsys):
    assert run(cli, ["show", "--json", str(GOLDEN)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["generation"] for one in shown["generations"]] == list(
        range(len(shown["generations"]))
    )
    for one in shown["generations"]:
        assert one.keys() >= {"generation", "kind", "tracker", "created", "freeze_ms", "pages"}
        assert one["pages"].keys() == {"data", "parent", "zero"}
        assert (one["kind"] == "full") == (one["parent"] is None)


def test_why_a_generation_is_full_is_shown(capsys):
    assert run(cli, ["show", str(GOLDEN)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "is full" in line] == [
        "generation 0 is full: the chain begins here"
    ]
    assert run(cli, ["show", "--json", str(GOLDEN)]) == 0
    shown = json.loads(capsys.readouterr().out)["generations"]
    assert [one["reason"] for one in shown] == ["the chain begins here", "", ""]
