"""Which workloads there are: programs, cases, steps and damages, by the protocol's names.

A test that runs every one of them under `ckpt` walks these tables; `test_workloads_alone.py` holds
them against what the programs themselves say.
"""

from __future__ import annotations

# `tracker_cases CASE`: its steps.
TRACKER_CASES: dict[str, list[str]] = {
    "t_write": ["one", "many", "page", "across"],
    "t_kernel_write": ["read", "recv", "pread"],
    "t_foreign_write": ["one"],
    "t_remap_same": ["part", "write", "one", "most"],
    "t_dontneed": ["part", "write", "one", "most"],
    "t_free": ["part", "reclaim", "write", "page"],
    "t_mremap": ["move", "grow", "shrink", "move_grow", "move_shrink", "move_keep", "one"],
    "t_mprotect": ["readonly", "writable", "cycle", "none"],
    "t_brk_stack": ["brk_grow", "stack_grow", "brk_shrink"],
    "t_file_private": ["write", "look", "relocate", "drop"],
    "t_fork": ["write", "only"],
    "t_thp": ["one", "drop", "protect", "collapse", "zero"],
    "t_tables": ["exchange", "one"],
    "t_first_touch": ["write", "read", "kernel"],
    "t_full_speed": ["run"],
    "t_exec": ["exec"],
}

# `blocking CASE [SECONDS]`: ended by somebody, by a timeout, or never.
BLOCKING_RELEASED = ["poll", "futex", "read", "epoll", "sigwait", "wait4", "accept"]
BLOCKING_TIMED = [
    *["nanosleep", "clock_nanosleep", "clock_nanosleep_abs"],
    *["poll_timed", "select_timed", "epoll_timed"],
    *["futex_timed", "futex_abs", "sigtimedwait"],
]
BLOCKING_ENDLESS = ["nanosleep_long"]
# wait4 needs a child, so it can be stopped and let go, but not dumped as a single process.
BLOCKING_NOT_ALONE = ["wait4"]

# Programs that need no argument: their steps, and the damages that a check must notice.
STATES: dict[str, list[str]] = {
    "s_files": ["read", "log", "write", "pipe", "eventfd"],
    "s_registers": ["run"],
    "s_threads": ["respawn"],
    "s_signals": ["raise"],
    "s_timers": ["tick"],
    "s_memory": ["write", "grow", "fork", "shared"],
    "s_shared": ["write", "zero"],
    "s_shared_tree": ["write"],
    "s_forked": ["write", "drop"],
    "s_sweepers": [],
    "s_memfd": ["write", "grow", "seal"],
    "s_ghost": ["write", "append"],
    "s_listen": ["reopen"],
    "s_datagram": ["send"],
    "s_tcp": ["send", "read"],
    "s_unix": ["send"],
    "s_unix_named": ["exchange"],
    "s_epoll": ["fire", "drain", "knock"],
    "s_locks": ["ranges", "lease", "pipe", "terminal"],
    "s_pty": ["interrupt", "resize", "type", "settings"],
    "s_creds": ["use"],
    "s_rseq": ["run"],
    "s_limits": ["change"],
    "s_clocks": ["run"],
    "s_timerfd": ["tick", "expire"],
    "s_signalfd": ["change"],
    "s_inotify": ["renew"],
    "s_special": ["move", "pass"],
    "s_seccomp": ["confine", "sync"],
    "s_sysv": ["write", "reattach"],
    "s_namespaces": ["rename"],
    "s_mqueue": ["exchange"],
    "heartbeat": ["write", "cluster"],
}
DAMAGES: dict[str, list[str]] = {
    "s_files": [
        *["offset", "append", "cloexec", "sharing", "identity", "pipe"],
        *["pipe_size", "packets", "eventfd", "semaphore", "closed"],
    ],
    "s_registers": ["gpr", "syscall", "x87", "sse", "avx", "avx512"],
    "s_threads": [
        *["name", "tls", "specific", "robust", "mutex", "stack"],
        *["mask", "pending", "order"],
    ],
    "s_signals": [
        *["handler", "flags", "restorer", "mask", "ignored", "blocked"],
        *["pending", "value", "order", "shared"],
    ],
    "s_timers": [
        *["gone", "later", "sooner", "interval", "stopped", "started"],
        *["id", "itimer"],
    ],
    "s_memory": [
        *["unreachable", "relocated", "sparse", "shared", "heap", "low"],
        *["protection", "fork", "wipe", "huge", "locked", "unmapped"],
        *["break", "arguments"],
    ],
    "s_shared_tree": ["apart", "content", "memfd"],
    "s_forked": ["parent", "child", "hole"],
    "s_sweepers": ["page"],
    "s_memfd": [
        *["content", "mapped", "behind", "size", "mode", "seals"],
        *["offset", "name", "sharing"],
    ],
    "s_ghost": [
        *["content", "sparse", "mapped", "private", "mode", "owner"],
        *["offset", "time", "cwd", "folder"],
    ],
    "s_shared": [
        *["anonymous", "part", "sparse", "unlinked", "private", "name"],
        *["offset", "open", "apart"],
    ],
    "s_listen": ["closed", "flags", "backlog", "option", "deaf", "port"],
    "s_tcp": ["lost", "more", "option", "flags", "closed", "address"],
    "s_datagram": ["lost", "more", "peer", "group", "netlink", "option"],
    "s_unix_named": [
        *["renamed", "mode", "backlog", "waiting", "order", "queue"],
        *["connection", "message", "caller", "sender"],
    ],
    "s_unix": [
        *["content", "packet", "order", "buffer", "option", "flags"],
        *["shutdown", "closed", "sharing", "writer", "maker"],
    ],
    "s_epoll": [
        *["data", "events", "removed", "inner", "spent", "edge"],
        *["content"],
    ],
    "s_locks": ["child", "range", "description", "flock", "lease", "signal", "owner", "async"],
    "s_pty": [
        *["size", "settings", "packets", "exclusive", "lock", "mode"],
        *["left", "signal", "flag"],
    ],
    "s_creds": [
        *["uid", "fsuid", "gid", "groups", "bounding", "securebits"],
        *["ambient", "privs", "effective"],
    ],
    "s_rseq": ["registration", "count"],
    "s_limits": [
        *["slack", "policy", "io", "reset", "affinity", "nice"],
        *["umask", "cwd", "oom", "personality", "dumpable", "parent"],
        *["subreaper", "huge", "limit"],
    ],
    "s_clocks": ["back", "jump"],
    "s_timerfd": ["later", "interval", "flags", "armed", "beat", "epoll", "lost", "ticks"],
    "s_special": ["content", "size", "offset", "pidfd", "epoll", "namespace", "memory"],
    "s_inotify": ["mask", "removed", "unread", "added", "epoll"],
    "s_signalfd": ["mask", "signal", "order", "epoll", "sharing"],
    "s_seccomp": ["own", "main"],
    "s_sysv": ["content", "removed", "parts", "mode", "detached"],
    "s_namespaces": ["host", "domain", "loopback"],
    "s_mqueue": ["flag", "message", "mode", "closed"],
    "heartbeat": ["page"],
}

# Programs of several processes; each has a test of its own in `integration/states`.
TREES = ["s_family", "s_unix_tree", "s_clones", "s_leader"]

# Arguments that add what is rare, and may be refused by name.
VARIANTS: dict[str, list[str]] = {
    "s_creds": ["dropped"],
    "s_listen": ["bound"],
    "s_memory": ["guard"],
    "s_seccomp": ["strict", "shared", "listener"],
    "s_sysv": ["keep", "own"],
    "s_namespaces": ["down"],
    "s_signals": ["all"],
}
