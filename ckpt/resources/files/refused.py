"""What a process may have open that is refused by name, and why.

These have no other file: nothing of them can be captured. Their names are those that /proc/PID/fd
shows, `anon_inode:` left away.

Kernel: anon_inode_getfile in the source of each; fanotify(7), bpf(2), io_uring(7), userfaultfd(2),
perf_event_open(2), seccomp_unotify(2), landlock(7).
"""

from ckpt.resources.files.open_file import OpenFile, Problem

_UNSUPPORTED = "which is not supported"
_BPF = "which lives in the kernel and would have to be loaded anew, not supported"
_REASONS = {
    "[fanotify]": "is a fanotify group, whose marks and unanswered questions cannot be moved",
    "bpf-map": f"is a map of BPF, {_BPF}",
    "bpf-prog": f"is a program of BPF, {_BPF}",
    "bpf_link": f"is an attached program of BPF, {_BPF}",
    "btf": f"is type information of BPF, {_BPF}",
    "bpf_iter": f"is an iterator of BPF, {_BPF}",
    "[io_uring]": "is an io_uring, whose requests under way and buffers the kernel holds,"
    f" {_UNSUPPORTED}",
    "[userfaultfd]": f"is a userfaultfd: the process handles page faults itself, {_UNSUPPORTED}",
    "[perf_event]": f"is a performance counter, {_UNSUPPORTED}",
    "seccomp notify": "answers for the seccomp filter of another process, not supported",
    "[landlock-ruleset]": f"is a ruleset of Landlock, {_UNSUPPORTED}",
    "kvm-vm": f"is a virtual machine of KVM, {_UNSUPPORTED}",
    "[fscontext]": f"is a file system about to be mounted (fsopen), {_UNSUPPORTED}",
    "sync_file": f"is a fence of a graphics driver, {_UNSUPPORTED}",
}
_REMEDIES = {
    "[io_uring]": "have the program do without it (many have a switch), or end it before the dump",
    "[userfaultfd]": "end what uses it before the dump",
}


def problem_of(file: OpenFile) -> Problem:
    """Tell why a description that no kind knows cannot be captured."""
    name = file.link.removeprefix("anon_inode:")
    text = _REASONS.get(name)
    if text is None:
        text = f"is {_describe(file.link)}, which is not supported yet"
    return Problem(text, _REMEDIES.get(name, ""))


def _describe(link: str) -> str:
    """Return the kernel's name of an object that has no path: `xyz` of `anon_inode:[xyz]`."""
    name = link.removeprefix("anon_inode:")
    return name.strip("[]") if name != link else link.partition(":")[0]
