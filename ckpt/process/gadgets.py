"""Code of the target's own by which a thread ends a call of ours without us.

    syscall; ret            makes the call and takes the next address from the stack
    mov eax, 15; syscall    rt_sigreturn, as every C library has it for the end of a handler

They are looked for in mapped files, the small ones first (the dynamic loader has both), before the
target is stopped; what is found is remembered by file. `way_back.py` reads the bytes again before
it relies on them.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence

import attrs

from ckpt.errors import CkptError
from ckpt.kernel.arch import x86_64 as arch
from ckpt.kernel.procfs import maps
from ckpt.process import memory
from ckpt.units import Pid, RemoteAddr

_MOST_BYTES = 8 << 20
"""So much code of a process is searched."""

_Key = tuple[tuple[int, int], int, int, int]
_found: dict[_Key, tuple[int | None, tuple[int, bytes] | None]] = {}
"""Mapping of a file -> where in it each of the two is, None if nowhere."""
_looked_at: set[tuple[int, int]] = set()
"""Executables by device and inode."""


@attrs.frozen(slots=True, repr=False)
class Gadgets:
    """Where the two are."""

    call_at: RemoteAddr
    return_at: RemoteAddr
    return_code: bytes
    """What stands there."""


def learn(pid: Pid) -> None:
    """Search the code of a process, which may be running, unless its executable is known."""
    with contextlib.suppress(CkptError, OSError):
        exe = os.stat(f"/proc/{pid}/exe")
        if (exe.st_dev, exe.st_ino) not in _looked_at:
            _search(pid, maps.read_maps(pid))
            _looked_at.add((exe.st_dev, exe.st_ino))


def find_gadgets(vmas: Iterable[maps.Vma]) -> Gadgets | None:
    """Return where the two are in a process with these mappings, if that was learnt."""
    call_at = back = None
    for vma in vmas:
        in_call, in_return = (
            _found.get(_key_of(vma), (None, None)) if vma.executable else (None,) * 2
        )
        if call_at is None and in_call is not None:
            call_at = RemoteAddr(vma.span.start + in_call)
        if back is None and in_return is not None:
            back = RemoteAddr(vma.span.start + in_return[0]), in_return[1]
    return None if call_at is None or back is None else Gadgets(call_at, *back)


def _key_of(vma: maps.Vma) -> _Key:
    return vma.dev, vma.inode, vma.offset_bytes, vma.span.len_bytes


def _search(pid: Pid, vmas: Sequence[maps.Vma]) -> None:
    code = [vma for vma in vmas if vma.executable and vma.readable and not vma.writable]
    left = _MOST_BYTES
    for vma in sorted(code, key=lambda vma: vma.span.len_bytes):
        left -= vma.span.len_bytes
        if left < 0 or find_gadgets(vmas) is not None:
            return
        if vma.inode and _key_of(vma) not in _found:
            text = memory.read(pid, vma.span.start, vma.span.len_bytes)
            _found[_key_of(vma)] = _find_call(text), _find_return(text)


def _find_call(text: bytes) -> int | None:
    at = text.find(arch.SYSCALL_RET)
    return None if at < 0 else at


def _find_return(text: bytes) -> tuple[int, bytes] | None:
    places = ((text.find(code), code) for code in arch.SIGRETURN_CODES)
    return next(((at, code) for at, code in places if at >= 0), None)
