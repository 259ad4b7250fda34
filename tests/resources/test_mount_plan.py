import attrs
import pytest

from ckpt.kernel.procfs.mountinfo import Mount, find_mount, parse_mountinfo
from ckpt.resources.mount_plan import MountRecord, plan_mounts

OURS = parse_mountinfo("""\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 27 0:30 / /data rw,relatime - ext4 /dev/vdb rw
31 30 0:31 / /data/sub rw,relatime - tmpfs none rw
32 27 0:32 / /shm rw - tmpfs none rw
33 32 0:33 / /shm rw - tmpfs none rw
""")


def steps(*more, without=(), **changed):
    theirs = [one for one in OURS if one.id not in without]
    theirs = [attrs.evolve(one, **changed) if one.id == 30 else one for one in theirs]
    return plan_mounts(OURS, [*theirs, *more])


def test_a_path_leads_to_what_is_mounted_last():
    assert find_mount(OURS, "/").id == 27
    assert find_mount(OURS, "/proc/1").id == 22
    assert find_mount(OURS, "/data/subway").id == 30
    assert find_mount(OURS, "/data/sub/way").id == 31
    assert find_mount(OURS, "/shm/x").id == 33
    assert find_mount([], "/") is None


def test_a_copy_needs_nothing():
    plan = steps()
    assert (plan.steps, plan.findings) == ((), ())


def test_what_is_gone_is_taken_away_from_the_inside():
    plan = steps(without={30, 31, 33})
    assert [(one.kind, one.path) for one in plan.steps] == [
        ("absent", "/data/sub"),
        ("absent", "/data"),
        ("absent", "/shm"),
    ]


def test_a_directory_is_bound_by_where_it_is_seen_here():
    bound = Mount(90, 27, (0, 30), "/a/b", "/mnt", "ext4", options=("ro",))
    assert steps(bound).steps == (MountRecord("bind", "/mnt", "/data/a/b", "", ("ro",), ""),)


@pytest.mark.parametrize(
    "hidden",
    [Mount(90, 27, (0, 32), "/", "/mnt", "tmpfs"), Mount(90, 27, (0, 30), "/sub", "/m", "x")],
)
def test_what_is_hidden_here_cannot_be_bound(hidden):
    plan = steps(attrs.evolve(hidden, fs_type="ext4"))
    assert plan.steps == ()
    assert [one.subject for one in plan.findings] == [f"mount {hidden.path}"]


def test_another_file_system_at_the_same_path_is_put_in_its_place():
    plan = steps(
        Mount(90, 27, (0, 77), "/", "/shm", "tmpfs", fs_options=("rw", "size=4k")), without={32, 33}
    )
    assert [(one.kind, one.path, one.data) for one in plan.steps] == [
        ("absent", "/shm", ""),
        ("absent", "/shm", ""),
        ("new", "/shm", "size=4k"),
    ]


def test_changed_options_are_set():
    (step,) = steps(options=("ro", "nosuid")).steps
    assert step == MountRecord("changed", "/data", "", "", ("ro", "nosuid"), "")


@pytest.mark.parametrize("path", ["/run", "/run/ckpt", "/"])
def test_what_hides_our_own_state_is_named(path):
    (finding,) = steps(Mount(90, 27, (0, 77), "/", path, "tmpfs")).findings
    assert "/run/ckpt is below it" in str(finding)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "odd"},
        {"path": "mnt"},
        {"source": "mnt"},
        {"path": "/a\0b"},
        {"kind": "new", "fs_type": "xfs"},
    ],
)
def test_an_image_cannot_ask_for_anything_else(fields):
    sound = MountRecord("bind", "/mnt", "/data", "", (), "")
    with pytest.raises(ValueError, match=r" (be|is) "):
        attrs.evolve(sound, **fields)
