"""Each kernel's own facts, and every test that ran inside it."""

import pytest

from integration.kernels.images import release_of
from integration.kernels.inside_run import INSIDE, parse_junit

INSIDE_MODULES = sorted(path.stem for path in INSIDE.glob("test_*.py"))
NEEDED = ("MEM_SOFT_DIRTY", "CHECKPOINT_RESTORE", "TIME_NS", "USERFAULTFD", "RSEQ")
TOLD = (*NEEDED, "ANON_VMA_NAME")


def test_kernel_is_built_with_what_checkpoints_need(machine, tell_config):
    config = machine.kernel.read_config()
    state = {option: config.get(option, "n") for option in TOLD}
    values = " ".join(f"{option}={value}" for option, value in state.items())
    tell_config(f"{machine.kernel.release}: {values}")
    assert {option: state[option] for option in NEEDED} == dict.fromkeys(NEEDED, "y")


@pytest.mark.timeout(1800)
def test_kernel_boots_and_runs_all_tests_inside(inside_run):
    # pytest: 0, all passed; 1, some failed, which `test_inside` tells; more, it gave up.
    exit_code = inside_run.outcome.exit_code
    some_failed = any(case.trouble for case in inside_run.cases)
    assert exit_code == int(some_failed), inside_run.outcome.output
    assert {case.module for case in inside_run.cases} == set(INSIDE_MODULES)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("module", INSIDE_MODULES)
def test_inside(inside_run, module):
    cases = [case for case in inside_run.cases if case.module == module]
    print(*cases, sep="\n")
    assert cases, f"no test of {module} ran:\n{inside_run.outcome.output}"
    failed = [str(case) for case in cases if case.trouble]
    assert not failed, f"Linux {inside_run.kernel.release}:\n" + "\n".join(failed)


def test_a_skipped_and_a_failed_case_are_trouble():
    report = """<testsuites><testsuite>
      <testcase classname="a.inside.test_x" name="good" time="0.5"/>
      <testcase classname="a.inside.test_x.TestY" name="bad"><failure message="1 == 2"/></testcase>
      <testcase classname="a.inside.test_z" name="out"><skipped message="no such"/></testcase>
      <testcase classname="" name="a.inside.test_w"><error message="import"/></testcase>
    </testsuite></testsuites>"""
    cases = parse_junit(report)
    assert [bool(case.trouble) for case in cases] == [False, True, True, True]
    assert [case.module for case in cases[:3]] == ["test_x", "test_x", "test_z"]


@pytest.mark.parametrize(
    ("package", "release"),
    [
        ("linux-image-6.1.0-50-amd64", "6.1.0-50-amd64"),
        ("linux-image-6.12.90+deb12.1-amd64", "6.12.90+deb12.1-amd64"),
        ("linux-image-6.12.95+deb12-amd64-unsigned", "6.12.95+deb12-amd64"),
        ("linux-image-6.12.95+deb12-cloud-amd64", None),
        ("linux-image-6.1.0-50-rt-amd64", None),
        ("linux-image-6.1.0-50-amd64-dbg", None),
        ("linux-image-amd64", None),
    ],
)
def test_only_the_plain_kernel_is_taken(package, release):
    assert release_of(package) == release
