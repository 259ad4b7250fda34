"""The order of credential changes, judged by a model of the kernel (capabilities(7))."""

import struct

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.kernel.arch import NR
from ckpt.kernel.prctl import PR_CAP_AMBIENT_CLEAR_ALL, PR_CAP_AMBIENT_RAISE, Prctl
from ckpt.resources.credentials import CredentialsRecord, _iter_changes

N_CAPS = 41
ALL = (1 << N_CAPS) - 1
SETGID, SETUID, SETPCAP = 1 << 6, 1 << 7, 1 << 8
NO_SETUID_FIXUP, KEEP_CAPS, NO_AMBIENT_RAISE = 1 << 2, 1 << 4, 1 << 6
SECUREBITS = [0, KEEP_CAPS, NO_SETUID_FIXUP, NO_SETUID_FIXUP << 1, 0x2F, NO_AMBIENT_RAISE, 0xEF]

ROOT = CredentialsRecord(
    uids=(0, 0, 0, 0),
    gids=(0, 0, 0, 0),
    groups=(),
    inheritable=0,
    permitted=ALL,
    effective=ALL,
    bounding=ALL,
    ambient=0,
    securebits=0,
    no_new_privs=False,
)


class Kernel:
    """security/commoncap.c and kernel/sys.c, as far as the calls reach."""

    def __init__(self, now):
        self.now = now

    def run(self, asked):
        handlers = {
            NR.setresuid: self.setresuid,
            NR.setresgid: self.setresgid,
            NR.setfsuid: self.setfsuid,
            NR.setfsgid: self.setfsgid,
            NR.setgroups: self.setgroups,
            NR.capset: self.capset,
            NR.prctl: self.prctl,
        }
        handlers[asked.nr](*asked.args)

    def change(self, **fields):
        self.now = attrs.evolve(self.now, **fields)

    def need(self, capability):
        assert self.now.effective & capability, f"EPERM, without {capability:#x}"

    def setresuid(self, *ids):
        self.need(SETUID)
        before = self.now
        self.change(uids=(*ids, ids[1]))
        if not before.securebits & NO_SETUID_FIXUP:
            if 0 in before.uids[:3] and 0 not in ids and not before.securebits & KEEP_CAPS:
                self.change(permitted=0, effective=0, ambient=0)
            if before.uids[1] == 0 and ids[1] != 0:
                self.change(effective=0)

    def setfsuid(self, number):
        self.need(SETUID)
        self.change(uids=(*self.now.uids[:3], number))

    def setresgid(self, *ids):
        self.need(SETGID)
        self.change(gids=(*ids, ids[1]))

    def setfsgid(self, number):
        self.need(SETGID)
        self.change(gids=(*self.now.gids[:3], number))

    def setgroups(self, n_groups, raw):
        self.need(SETGID)
        self.change(groups=struct.unpack(f"<{n_groups}I", raw.data) if n_groups else ())

    def capset(self, _header, raw):
        low_e, low_p, low_i, high_e, high_p, high_i = struct.unpack("<6I", raw.data)
        effective, permitted = low_e | high_e << 32, low_p | high_p << 32
        inheritable = low_i | high_i << 32
        now = self.now
        assert not permitted & ~now.permitted, "EPERM, permitted grows"
        assert not effective & ~permitted, "EPERM, effective beyond permitted"
        assert not inheritable & ~(now.inheritable | now.bounding), "EPERM, beyond the bounding set"
        if not now.effective & SETPCAP:
            assert not inheritable & ~(now.inheritable | now.permitted), "EPERM, inheritable grows"
        self.change(
            effective=effective,
            permitted=permitted,
            inheritable=inheritable,
            ambient=now.ambient & permitted & inheritable,
        )

    def prctl(self, option, *arguments):
        if option == Prctl.CAPBSET_DROP:
            self.need(SETPCAP)
            self.change(bounding=self.now.bounding & ~(1 << arguments[0]))
        elif option == Prctl.SET_SECUREBITS:
            self.set_securebits(arguments[0])
        elif option == Prctl.SET_NO_NEW_PRIVS:
            self.change(no_new_privs=True)
        else:
            assert option == Prctl.CAP_AMBIENT
            self.set_ambient(*arguments)

    def set_securebits(self, bits):
        self.need(SETPCAP)
        locks = self.now.securebits & 0xAA
        assert bits & locks == locks, "EPERM, a lock would be opened"
        assert not (locks >> 1) & (bits ^ self.now.securebits), "EPERM, a locked bit would change"
        self.change(securebits=bits)

    def set_ambient(self, what, number, *_):
        if what == PR_CAP_AMBIENT_CLEAR_ALL:
            self.change(ambient=0)
            return
        assert what == PR_CAP_AMBIENT_RAISE
        bit = 1 << number
        assert bit & self.now.permitted & self.now.inheritable, "EPERM, not permitted, inheritable"
        assert not self.now.securebits & NO_AMBIENT_RAISE, "EPERM, securebits"
        self.change(ambient=self.now.ambient | bit)


capability_sets = st.integers(0, ALL)
ids = st.tuples(*[st.sampled_from([0, 1000, 65534])] * 4)


@st.composite
def credentials(draw):
    permitted, inheritable = draw(capability_sets), draw(capability_sets)
    return CredentialsRecord(
        uids=draw(ids),
        gids=draw(ids),
        groups=tuple(draw(st.lists(st.integers(0, 2**32 - 2), max_size=5))),
        inheritable=inheritable,
        permitted=permitted,
        effective=permitted & draw(capability_sets),
        bounding=draw(capability_sets),
        ambient=permitted & inheritable & draw(capability_sets),
        securebits=draw(st.sampled_from(SECUREBITS)),
        no_new_privs=draw(st.booleans()),
    )


@given(credentials())
def test_root_can_become_anybody(wanted):
    kernel = Kernel(ROOT)
    for asked in _iter_changes(wanted, ROOT):
        kernel.run(asked)
    assert kernel.now == wanted


@given(credentials())
def test_nothing_is_touched_where_all_is_as_wanted(same):
    assert list(_iter_changes(same, same)) == []


def test_root_that_may_not_raise_ambient_capabilities_lifts_that_first():
    now = attrs.evolve(ROOT, securebits=NO_AMBIENT_RAISE)
    wanted = attrs.evolve(now, inheritable=SETUID, ambient=SETUID)
    kernel = Kernel(now)
    for asked in _iter_changes(wanted, now):
        kernel.run(asked)
    assert kernel.now == wanted


def test_the_model_itself_refuses_a_wrong_order():
    kernel = Kernel(ROOT)
    kernel.setresuid(1000, 1000, 1000)
    with pytest.raises(AssertionError, match="EPERM"):
        kernel.setresgid(1000, 1000, 1000)
