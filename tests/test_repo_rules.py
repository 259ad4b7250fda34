"""What the repository promises about itself: each rule is a test, and each names the offenders.

Exceptions, where a rule has any, stand in `tests/allowed.toml` with their reason.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import PurePosixPath

import pytest

from tests.plugins.allowed import AllowedUse, matches, read_allowed
from tests.plugins.tree import (
    TOP,
    iter_calls,
    iter_import_time,
    iter_imports,
    parse,
    python_files,
    source_files,
    tracked_files,
)

TOP_LEVEL = frozenset(
    {
        ".ci",
        ".gitignore",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "ckpt",
        "images",
        "integration",
        "pyproject.toml",
        "tests",
    }
)
MAX_MODULE_LINES = 500
MAX_ARCHITECTURE_LINES = 200
DUMPING_GROUNDS = frozenset({"utils", "util", "common", "misc"})
UNSAFE_DECODERS = frozenset({"pickle", "cPickle", "dill", "marshal", "shelve"})
HEAVY = frozenset(
    {
        *("cattrs", "cryptography", "elftools", "fsspec", "hypothesis", "numpy"),
        *("prometheus_client", "rich", "subprocess", "tempfile"),
    }
)
HEAVY_AT_IMPORT = frozenset(
    {"cattrs", "cryptography", "fsspec", "numpy", "prometheus_client", "rich"}
)
DEVELOPMENT_PATH = re.compile(rb"(?<![\w.])/(?:home|work|farm|Users)/[\w.]|/root/\.")
SPDX = re.compile(rb"SPDX-License-Identifier: *([\w.+-]+)")

ALL_PYTHON = python_files("ckpt", "tests", "integration")
OF_CKPT = python_files("ckpt")
OF_TESTS = python_files("tests", "integration")


def is_allowed(path: str, entries: tuple[AllowedUse, ...]) -> bool:
    return any(matches(path, entry.file) for entry in entries)


def test_there_is_something_to_judge():
    assert "ckpt/errors.py" in OF_CKPT
    assert "tests/test_repo_rules.py" in OF_TESTS


def test_the_top_level_holds_what_it_should_and_nothing_else():
    assert {path.partition("/")[0] for path in tracked_files()} == TOP_LEVEL


def test_no_module_is_too_long():
    n_lines = {path: (TOP / path).read_bytes().count(b"\n") for path in ALL_PYTHON}
    assert {path: n for path, n in n_lines.items() if n > MAX_MODULE_LINES} == {}


def test_no_module_is_a_dumping_ground():
    assert [
        path
        for path in ALL_PYTHON
        if DUMPING_GROUNDS & {PurePosixPath(part).stem for part in PurePosixPath(path).parts}
    ] == []


def test_every_module_of_ckpt_says_what_it_is():
    assert [path for path in OF_CKPT if not ast.get_docstring(parse(path))] == []


def test_no_star_imports():
    assert [
        path
        for path in ALL_PYTHON
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ] == []


def test_nothing_decodes_what_it_would_run():
    imports = [
        f"{path}: {module}"
        for path in OF_CKPT
        for module in iter_imports(parse(path))
        if module.partition(".")[0] in UNSAFE_DECODERS
    ]
    calls = [
        f"{path}:{line}: {name}"
        for path in OF_CKPT
        for name, line in iter_calls(parse(path))
        if name in {"eval", "exec", "builtins.eval", "builtins.exec"}
    ]
    assert imports + calls == []


def test_only_the_commands_write_to_the_terminal():
    assert [
        f"{path}:{line}"
        for path in OF_CKPT
        if not path.startswith("ckpt/cli/")
        for name, line in iter_calls(parse(path))
        if name in {"print", "click.echo", "sys.stdout.write", "sys.stderr.write"}
    ] == []


def test_no_test_sleeps():
    allowed = read_allowed().sleep
    assert [
        f"{path}:{line}: wait for what the test waits for, by a handshake"
        for path in OF_TESTS
        if not is_allowed(path, allowed)
        for name, line in iter_calls(parse(path))
        if name == "time.sleep"
    ] == []


def test_every_exception_is_still_needed():
    listed = (*read_allowed().sleep, *read_allowed().heavy_import)
    assert [
        entry.file
        for entry in listed
        if "*" not in entry.file and not any(matches(path, entry.file) for path in ALL_PYTHON)
    ] == []


def test_no_path_of_a_development_machine():
    assert [
        f"{path}: {found.group().decode()}"
        for path in source_files()
        if path != "tests/test_repo_rules.py"
        if (found := DEVELOPMENT_PATH.search((TOP / path).read_bytes()))
    ] == []


def test_the_licence_is_one_everywhere():
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    assert project["license"] == "GPL-2.0-only"
    first_words = " ".join((TOP / "LICENSE").read_text().split()[:7])
    assert first_words == "GNU GENERAL PUBLIC LICENSE Version 2, June"
    assert [
        f"{path}: {tag.decode()}"
        for path in source_files()
        for tag in SPDX.findall((TOP / path).read_bytes())
        if tag != b"GPL-2.0-only"
    ] == []


def test_the_changelog_has_a_place_for_what_is_new():
    assert "\n## Unreleased\n" in (TOP / "CHANGELOG.md").read_text()


def test_the_architecture_fits_in_the_head():
    path = TOP / "ARCHITECTURE.md"
    if path.exists():
        assert len(path.read_text().splitlines()) < MAX_ARCHITECTURE_LINES


# Start-up: what a command costs before its first step is paid by everyone, every time.


def test_nothing_heavy_is_imported_at_import_time():
    allowed = read_allowed().heavy_import
    assert [
        f"{path}: {module}"
        for path in OF_CKPT
        if not is_allowed(path, allowed)
        for statement in iter_import_time(parse(path))
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for module in iter_imports(statement)
        if module.partition(".")[0] in HEAVY_AT_IMPORT
    ] == []


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("module", ["ckpt", *map(module_name, python_files("ckpt/cli"))])
def test_a_command_starts_without_anything_heavy(module):
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=TOP,
    )
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert module in loaded
    assert {name for name in loaded if name.partition(".")[0] in HEAVY} == set()
