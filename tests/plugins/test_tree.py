"""A rule that cannot find its offender is worth nothing: each finder is shown one."""

import ast

from tests.plugins import tree


def test_calls_are_found_under_any_name():
    program = """
import time, time as t
from time import sleep as nap
time.sleep(1)
t.sleep(2)
nap(3)
eval("4")
obj().sleep(5)
"""
    calls = dict(map(reversed, tree.iter_calls(ast.parse(program))))
    assert calls == {4: "time.sleep", 5: "time.sleep", 6: "time.sleep", 7: "eval", 8: "obj"}


def test_imports_in_functions_do_not_count_as_import_time():
    program = """
import a
if TYPE_CHECKING:
    import hidden_1
elif x:
    import b
if typing.TYPE_CHECKING:
    import hidden_2
try:
    import c
except ImportError:
    import d
finally:
    import e
class Class:
    import f
    def method(self):
        import hidden_3
with x:
    import g
match x:
    case 1:
        import h
def function():
    import hidden_4
"""
    statements = tree.iter_import_time(ast.parse(program))
    names = [name for s in statements if isinstance(s, ast.Import) for name in tree.iter_imports(s)]
    assert sorted(names) == list("abcdefgh")


def test_an_unpacked_archive_has_files_too(monkeypatch, tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "x.py").touch()
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "y.py").touch()
    monkeypatch.setattr(tree, "TOP", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert tree.tracked_files.__wrapped__() == ("ckpt/y.py",)
