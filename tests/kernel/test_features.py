import ast
import gzip
import inspect
import os
import subprocess
import sys

import attrs
import pytest

from ckpt.kernel.capabilities import capability_names, capget
from ckpt.kernel.features import Features, probe_features
from ckpt.kernel.procfs.files import list_fds
from ckpt.kernel.procfs.maps import read_maps


def test_probing_twice_gives_the_same(features):
    assert probe_features() == features


def test_who_we_are(features):
    assert features.kernel_release == os.uname().release
    assert features.machine == "x86_64"
    assert features.capabilities == capability_names(capget(0).effective)
    assert features.xsave_bytes >= 576  # x87 and SSE with the header: every x86-64 with XSAVE


def test_what_old_kernels_have_too(features):
    # Debian 12 (6.1) is the oldest that is tested.
    assert features.rseq
    assert features.timens
    assert features.pidfd_getfd


def test_one_feature_needs_the_other(features):
    assert features.pagemap_scan or not features.uffd_wp_async
    assert features.pagemap_scan or not features.pagemap_scan_soft_dirty
    assert features.pagemap_scan_soft_dirty or not features.pagemap_scan_guard


@pytest.mark.skipif(
    not os.access("/proc/config.gz", os.R_OK), reason="this kernel does not show its options"
)
def test_options_are_those_of_the_kernels_own_list(features):
    with gzip.open("/proc/config.gz", "rt") as file:
        options = {line.strip() for line in file}
    assert features.soft_dirty == ("CONFIG_MEM_SOFT_DIRTY=y" in options)
    assert features.anon_vma_name == ("CONFIG_ANON_VMA_NAME=y" in options)
    assert features.kcmp == ("CONFIG_KCMP=y" in options)
    assert features.timens == ("CONFIG_TIME_NS=y" in options)
    assert features.posix_timers_listed == ("CONFIG_CHECKPOINT_RESTORE=y" in options)


def test_nothing_is_left_behind():
    probe_features()  # the first one loads and allocates
    fds = list_fds(os.getpid())
    maps = [vma for vma in read_maps(os.getpid()) if vma.path != "[heap]"]
    probe_features()
    assert list_fds(os.getpid()) == fds
    after = [vma for vma in read_maps(os.getpid()) if vma.path != "[heap]"]
    assert [vma.span.len_bytes for vma in after] == [vma.span.len_bytes for vma in maps]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def run_limited(setup):
    """Probe in a process that first ran `setup`; the record as a dict."""
    code = f"""
import ctypes, os, attrs
from ckpt.kernel.features import probe_features
{setup}
found = attrs.asdict(probe_features())
found["capabilities"] = sorted(found["capabilities"])
print(found)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(run.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_without_privilege_nothing_fails_and_less_is_there(features):
    found = run_limited("os.setgroups([]); os.setresgid(*[65534]*3); os.setresuid(*[65534]*3)")
    assert found["capabilities"] == []
    assert not found["set_tid"]
    assert found["kernel_release"] == features.kernel_release
    assert found.keys() == attrs.asdict(features).keys()


def test_few_descriptors_are_enough_and_none_is_a_false():
    setup = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (6, 6))"
    assert run_limited(setup)["kernel_release"] == os.uname().release


def test_probing_loads_nothing_heavy():
    code = """
import sys
from ckpt.kernel.features import probe_features
probe_features()
print(sorted(name for name in sys.modules if "." not in name))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "cattrs", "rich", "elftools", "asyncio"} & set(
        ast.literal_eval(run.stdout)
    )


def test_every_field_is_explained():
    source = inspect.getsource(Features)
    flags = [field.name for field in attrs.fields(Features) if field.type is bool]
    for name in flags:
        assert f'    {name}: bool\n    """' in source
