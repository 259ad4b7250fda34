"""Work that meets with a fault in a fork of ours, and a comparison of an image with the living.

ended = in_child(lambda: dump(pid, image), "dump-frozen=kill")
dump(pid, image)
compare_newest(image, pid)
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

from ckpt import fault
from ckpt.engine.pages import own_mappings
from ckpt.engine.records import decode_tree
from ckpt.errors import CkptError
from ckpt.image.chain import Chain
from ckpt.image.reader import PageReader
from ckpt.image.runs import Fate
from ckpt.kernel import process_vm
from ckpt.kernel.arch import NR
from ckpt.kernel.features import probe_features
from ckpt.process.keeper import NAME, PIDFD, stop_keeper
from ckpt.process.tree import list_tree
from ckpt.tracker.epoch import read_epoch, read_void
from ckpt.tracker.populated import opened_pagemap, scan_populated
from ckpt.tracker.spans import intersect, subtract
from ckpt.units import addr_range
from integration.procview import is_at_rest

KILLED = -signal.SIGKILL
NOT_PERMITTED, HOST_FULL = 12, 13


def in_child(work, planned):
    """Do `work` in a fork with a fault; return how that ends: a signal, or an exit code of ours."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            fault.plan(planned)
            work()
            code = 0
        except CkptError as error:
            code = error.exit_code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ending_of(action):
    """Return how a command ends that meets with it."""
    return {"kill": KILLED, "fail": NOT_PERMITTED, "full": HOST_FULL}[action]


def settle(pid):
    """Wait until a program that has answered waits for its next command, and changes nothing."""
    reading = f"{int(NR.read)} 0x0 "
    while not (Path(f"/proc/{pid}/syscall").read_text().startswith(reading) and is_at_rest(pid)):
        os.sched_yield()


def stop_watching(pid):
    """End what tracks a process between dumps, so that the next one begins anew."""
    for epoch in (read_epoch(pid), read_void(pid)):
        if epoch is not None and epoch.keeper is not None:
            stop_keeper(epoch.keeper)


def temporaries(image):
    return sorted(path.name for path in image.glob(".tmp-*"))


def compare_newest(image, root):
    """Hold that the newest generation has each page of a tree that does nothing, as it is now."""
    chain = Chain.open(image)
    reader = PageReader(chain, chain.newest())
    tree = decode_tree(reader.manifest, str(image))
    assert {one.pid for one in tree.processes} == set(list_tree(root))
    return sum(_compare_process(reader, one) for one in tree.processes)


def _compare_process(reader, process):
    """Return how many pages were compared."""
    if not process.has_memory:
        return 0
    own = own_mappings(process.resources["memory"])
    runs = reader.resolve(process.space)
    stored = [
        (start, start + n * runs.page_size)
        for start, n, fate in zip(runs.starts, runs.n_pages, runs.fates, strict=True)
        if fate == int(Fate.DATA)
    ]
    with opened_pagemap(process.pid) as fd:
        there = scan_populated(fd, own, probe_features())
    for start, end in subtract(intersect(there, own.all), stored):
        live = bytearray(end - start)
        process_vm.read_mem(process.pid, [addr_range(start, end - start)], live)
        assert not any(live), f"the image lacks {start:#x}-{end:#x}"
    wrong, n_pages = [], 0
    # The kernel writes there on which processor a thread runs.
    threads = [thread.resources["thread"] for thread in process.threads]
    rseqs = sorted((one.rseq_at, one.rseq_at + one.rseq_bytes) for one in threads if one.rseq_at)

    def compare(raw, pieces):
        nonlocal n_pages
        for address, offset, len_bytes in pieces:
            live = bytearray(len_bytes)
            process_vm.read_mem(process.pid, [addr_range(address, len_bytes)], live)
            n_pages += len_bytes // runs.page_size
            image = bytearray(raw[offset : offset + len_bytes])
            for start, end in intersect(rseqs, [(address, address + len_bytes)]):
                live[start - address : end - address] = image[start - address : end - address]
            if image != live:
                pairs = enumerate(zip(image, live, strict=True))
                at, (was, now) = next(one for one in pairs if one[1][0] != one[1][1])
                wrong.append(f"{address + at:#x}: {was:#x} is {now:#x}")

    reader.for_each_frame(runs, compare)
    assert not wrong, f"pages are not as in the image, first at {wrong[:4]}"
    return n_pages


def n_keepers(pid):
    """Return how many keepers hold a tracker of a process."""
    found = 0
    for one in Path("/proc").iterdir():
        if one.name.isdecimal():
            with contextlib.suppress(OSError):
                if (one / "comm").read_text() == f"{NAME}\n":
                    found += f"Pid:\t{pid}\n" in (one / f"fdinfo/{PIDFD}").read_text()
    return found
