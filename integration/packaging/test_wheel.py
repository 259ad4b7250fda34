"""The promise: one wheel, installed where nothing of the checkout is, gives command and API."""

import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

pytestmark = pytest.mark.slow

PIP = ("-m", "pip", "--no-input", "--disable-pip-version-check", "--quiet")


def run(*command, cwd, **options):
    ended = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert ended.returncode == 0, f"{command}:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def top(request):
    return request.config.rootpath


@pytest.fixture(scope="module")
def project(top):
    return tomllib.loads((top / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(top, tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    run(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", directory, top, cwd=directory)
    (path,) = directory.iterdir()
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return the `bin` of a fresh environment that holds the wheel and what it declares."""
    directory = tmp_path_factory.mktemp("installed")
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    run(python, *PIP, "install", "--root-user-action=ignore", wheel, cwd=directory)
    return directory / "bin"


def test_the_wheel_holds_the_package_its_types_and_its_licence(wheel, top, project):
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = f"ckpt-{project['version']}.dist-info"
    modules = {str(path.relative_to(top)) for path in (top / "ckpt").rglob("*.py")}
    assert modules <= names
    assert {"ckpt/py.typed", "ckpt/cli/report.html"} <= names
    assert any(name.startswith(f"{metadata}/") and name.endswith("/LICENSE") for name in names), (
        names
    )
    assert {name.partition("/")[0] for name in names} == {"ckpt", metadata}


def test_the_wheel_installs_everywhere(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.timeout(600)
def test_the_installed_command_runs(installed, project, tmp_path):
    version = run(installed / "ckpt", "--version", cwd=tmp_path)
    assert version == f"ckpt {project['version']}\n"
    assert "restore" in run(installed / "ckpt", "--help", cwd=tmp_path)


def test_every_installed_module_imports(installed, top, tmp_path):
    """What a module needs must be declared as a dependency: the tools of development are absent."""
    modules = sorted(
        ".".join(path.relative_to(top).with_suffix("").parts).removesuffix(".__init__")
        for path in (top / "ckpt").rglob("*.py")
    )
    program = "\n".join(f"import {module}" for module in modules)
    where = run(
        installed / "python", "-c", f"{program}\nprint(ckpt.__file__)", cwd=tmp_path
    ).strip()
    assert where.startswith(str(installed.parent))
    assert run(installed / "python", *PIP, "check", cwd=tmp_path) == ""
