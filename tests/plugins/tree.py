"""The files of this repository, as git sees them, and what the rules ask of Python files."""

import ast
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TOP = Path(__file__).parents[2]
UNTRACKED_DIRS = frozenset({".git", ".venv", "build", "dist", "__pycache__"})


@cache
def tracked_files() -> tuple[str, ...]:
    """Return the paths that git tracks; of an unpacked archive, all that is there."""
    files = _git_ls_files("--cached")
    return files if files is not None else tuple(_walk())


@cache
def source_files() -> tuple[str, ...]:
    """Return the tracked paths and those that would be with the next `git add`."""
    files = _git_ls_files("--cached", "--others", "--exclude-standard")
    return files if files is not None else tuple(_walk())


def python_files(*tops: str) -> tuple[str, ...]:
    """Return the Python files below the named directories."""
    prefixes = tuple(f"{top}/" for top in tops)
    return tuple(
        path for path in source_files() if path.startswith(prefixes) and path.endswith(".py")
    )


@cache
def parse(path: str) -> ast.Module:
    return ast.parse((TOP / path).read_bytes(), path)


def iter_imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of every module that is imported anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def iter_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run when the module is imported, inner ones of if/try/class too."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        yield node
        pending.extend(_inner_statements(node))


def iter_calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each call's dotted name, `from` imports resolved, and its line."""
    origin = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    } | {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.asname
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := dotted(node.func)):
            head, dot, rest = name.partition(".")
            yield origin.get(head, head) + dot + rest, node.lineno


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for such an expression, or nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (head := dotted(node.value)):
        return f"{head}.{node.attr}"
    return ""


def _inner_statements(node: ast.AST) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        elif isinstance(child, ast.ExceptHandler | ast.match_case):
            yield from child.body


def _git_ls_files(*options: str) -> tuple[str, ...] | None:
    # A checkout that belongs to somebody else (a container, CI) is refused without safe.directory.
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", *options]
    try:
        run = subprocess.run(command, cwd=TOP, capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    paths = (os.fsdecode(path) for path in run.stdout.split(b"\0") if path)
    return tuple(sorted({path for path in paths if (TOP / path).exists()}))


def _walk() -> Iterator[str]:
    for top, dirs, files in os.walk(TOP):
        dirs[:] = sorted(
            name
            for name in dirs
            if name not in UNTRACKED_DIRS and not name.endswith(("_cache", ".egg-info"))
        )
        for name in sorted(files):
            yield str((Path(top) / name).relative_to(TOP))
