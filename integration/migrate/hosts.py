"""Two hosts and a client on one machine, as namespaces, to move process trees between.

         a                b               client         each: network, pid, mount, IPC and UTS
       eth0 .1          eth0 .2          eth0 .3         namespaces of its own, /run/ckpt of its own
         └───────┬────────┴─────────┬──────┘
               port a  ...  bridge "lan"                 switch: a network namespace
                                                         10.77.0.100 is where the service is now

with two_hosts() as hosts:
    work = hosts.a.start(["redis-server", ...])
    with hosts.client.network():
        sock = socket.create_connection((SERVICE, 6379))

The file system is one, as if both had the same installed. Nothing has a name outside: each host
lives by its first process, which ends with this one, and with that everything in it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import attrs

from ckpt.kernel.namespaces import inside
from ckpt.units import Pid
from integration.harness import CKPT
from integration.workloads.build import build_file
from integration.workloads.driver import ANSWER_S, Dialogue

HERE = Path(__file__).parent
PREFIX = "10.77.0."
SERVICE = PREFIX + "100"
"""The address that moves."""
INTERFACE = "eth0"
_BURST_S = 0.004
"""How long a shaped link may be faster: its queue is looked at that often (a timer of 250 Hz)."""
_KINDS = ("--net", "--ipc", "--uts", "--mount", "--pid")
_PIDS_APART = 10_000
"""Where the pids of each host begin: those of one are free on the other."""

Words = Sequence[str | Path]


def _words(command: Words) -> list[str]:
    return [str(word) for word in command]


def run(command: Words) -> str:
    """Run a command that must succeed; return what it says."""
    done = subprocess.run(_words(command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(_words(command))}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def _first_process(*kinds: str) -> Iterator[int]:
    """Make namespaces; yield the pid of the process that they live by. All ends with the block.

    And with this thread, however that ends: its end kills `unshare`, and that one's its child.
    """
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--propagation", "private"]
    command = command if "--mount" in kinds else command[:4]
    command += [*kinds, "--fork", "--kill-child"] + ["--mount-proc"] * ("--pid" in kinds)
    init = subprocess.Popen(
        [*command, sys.executable, "-I", HERE / "host_init.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert init.stdin is not None
    assert init.stdout is not None
    try:
        assert init.stdout.readline() == b"ready\n", f"no namespaces here ({kinds})"
        children = Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text()
        yield int(children)
    finally:
        init.stdin.close()
        try:
            init.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            init.kill()
            init.wait()
        init.stdout.close()


@attrs.frozen(eq=False)
class Host:
    """One host, by its first process."""

    name: str
    init: int
    """Its pid, seen from outside."""
    address: str
    started: "list[Started]" = attrs.field(factory=list, repr=False)

    @property
    def enter(self) -> list[str]:
        """What to put before a command for it to run here, as the leader of a session."""
        kinds = ["--net", "--ipc", "--uts", "--mount", "--pid"]
        # The working directory is that of our mount namespace, and of a name that both have.
        return ["nsenter", "--target", str(self.init), *kinds, f"--wd={os.getcwd()}", "setsid"]

    def run(self, command: Words, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, whatever that is."""
        more = {"stdin": subprocess.DEVNULL, "capture_output": True} | more
        return subprocess.run(
            [*self.enter, *_words(command)], text=True, check=False, timeout=10 * ANSWER_S, **more
        )

    def must(self, command: Words, **more: Any) -> str:
        """Run a command that must succeed; return what it says."""
        done = self.run(command, **more)
        assert done.returncode == 0, f"{self.name}: {' '.join(_words(command))}\n{done.stderr}"
        return done.stdout

    def ckpt(self, *arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run ckpt to its end, whatever that is."""
        return self.run([*CKPT, *arguments], **more)

    def start(self, command: Words, *, cwd: Path | None = None, **more: Any) -> "Started":
        """Start a command, with pipes for standard streams; it is killed when the host ends."""
        return Started(self, command, cwd=cwd, **more)

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Have this thread in the network of the host: sockets that it makes stay there."""
        with inside(Pid(self.init), "net"):
            yield

    def pids(self) -> set[int]:
        """Return who runs here, but the first process; in the host's own numbers."""
        listed = self.must(["sh", "-c", "cd /proc; echo [0-9]* $$"]).split()
        return {int(one) for one in listed[:-1]} - {1, int(listed[-1])}

    def tables(self) -> list[str]:
        """Return the tables of ckpt in its firewall."""
        return [
            line for line in self.must(["nft", "list", "tables"]).splitlines() if "ckpt_" in line
        ]

    def has(self, address: str) -> bool:
        """Tell whether an address is here."""
        return bool(self.must(["ip", "-o", "address", "show", "to", address]))


class Started(Dialogue):
    """A program in a host; `pid` is its number there."""

    def __init__(self, host: Host, command: Words, *, cwd: Path | None = None, **more: Any) -> None:
        self.host = host
        told, tell = os.pipe()
        # The shell that says its number becomes the program.
        say = f'echo $$ >&{tell}; exec {tell}>&-; {f"cd {cwd};" * bool(cwd)} exec "$@"'
        streams = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
        }
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, told)
            try:
                self.process = subprocess.Popen(
                    [*host.enter, "bash", "-c", say, "bash", *_words(command)],
                    pass_fds=[tell],
                    **(streams | more),
                )
            finally:
                os.close(tell)
            self.pid = int(os.read(told, 20) or b"0")
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        super().__init__(self.process.stdin.fileno(), self.process.stdout.fileno())
        host.started.append(self)

    @property
    def outer_pid(self) -> int:
        """Its number outside of the host."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(pids)

    def wait(self) -> int:
        """Wait for its end; return its exit status as a shell does."""
        return self.process.wait(ANSWER_S)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        self.host.run(["sh", "-c", f"kill -{int(number)} {self.pid}"])

    def close(self) -> None:
        """End it, if it has not ended, and close our ends of its pipes."""
        if self.process.poll() is None:
            self.kill()
        self.abandon()

    def abandon(self) -> None:
        """Wait for its end, which comes by itself, and close our ends of its pipes."""
        self.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@attrs.frozen(eq=False)
class Hosts:
    """The whole arrangement."""

    a: Host
    b: Host
    client: Host
    switch: int
    """The pid of a process in the network namespace of the bridge."""

    def __iter__(self) -> Iterator[Host]:
        return iter((self.a, self.b, self.client))

    def other(self, host: Host) -> Host:
        """Return where a move from a host goes."""
        return self.b if host is self.a else self.a

    def part_memory_files(self) -> None:
        """Give each a /dev/shm of its own: what others leave in ours is theirs."""
        for host in (self.a, self.b):
            host.must(["mount", "-t", "tmpfs", "shm", "/dev/shm"])

    def shape(self, rate: str) -> None:
        """Let the links of `a` and `b` carry that much each way (`1gbit`); "" for all they can."""
        for host in (self.a, self.b):
            _shape(host.init, INTERFACE, rate)
            _shape(self.switch, _port(host.name), rate)


def _in_network(pid: int, *command: str) -> str:
    return run(["nsenter", "--target", str(pid), "--net", *command])


def _port(name: str) -> str:
    return f"port-{name}"


def bits_per_s(rate: str) -> float:
    """Return what tc calls `1gbit`, `500mbit`."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise ValueError(f"{rate!r} is no rate")


def _shape(pid: int, interface: str, rate: str) -> None:
    if not rate:
        subprocess.run(
            ["nsenter", "-t", str(pid), "-n", "tc", "qdisc", "del", "dev", interface, "root"],
            check=False,
            capture_output=True,
        )
        return
    burst = max(int(bits_per_s(rate) / 8 * _BURST_S), 128 << 10)
    shaped = ["tbf", "rate", rate, "burst", str(burst), "latency", "20ms"]
    _in_network(pid, "tc", "qdisc", "replace", "dev", interface, "root", *shaped)


def _connect(switch: int, name: str, init: int, address: str) -> None:
    port = _port(name)
    pair = ["name", INTERFACE, "netns", str(init)]
    _in_network(switch, "ip", "link", "add", port, "type", "veth", "peer", *pair)
    _in_network(switch, "ip", "link", "set", port, "master", "lan", "up")
    _in_network(init, "ip", "link", "set", "lo", "up")
    _in_network(init, "ip", "link", "set", INTERFACE, "up")
    _in_network(init, "ip", "address", "add", f"{address}/24", "dev", INTERFACE)


@contextlib.contextmanager
def _one_host(name: str, number: int, switch: int) -> Iterator[Host]:
    Path("/run/ckpt").mkdir(mode=0o700, exist_ok=True)
    with _first_process(*_KINDS) as init:
        host = Host(name, init, f"{PREFIX}{number}")
        _connect(switch, name, init, host.address)
        setup = (
            "mount -t tmpfs -o mode=700 ckpt /run/ckpt && mount -t mqueue mqueue /dev/mqueue;"
            f" hostname {name} && echo {number * _PIDS_APART} >/proc/sys/kernel/ns_last_pid"
        )
        host.must(["sh", "-c", setup])
        yield host
    # The host is gone, and all that ran there.
    for one in host.started:
        one.abandon()


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make the hosts `a` and `b`, and the `client`; the service's address is at `a`."""
    with contextlib.ExitStack() as stack:
        switch = stack.enter_context(_first_process("--net"))
        _in_network(switch, "ip", "link", "add", "lan", "type", "bridge", "forward_delay", "0")
        _in_network(switch, "ip", "link", "set", "lan", "up")
        names = ("a", "b", "client")
        made = [stack.enter_context(_one_host(n, at, switch)) for at, n in enumerate(names, 1)]
        hosts = Hosts(made[0], made[1], made[2], switch)
        hosts.a.must(take_address())
        yield hosts


def take_address() -> list[str]:
    """Return the command by which a host takes the service's address: the hook of an arrival."""
    announce = build_file(HERE / "announce.c")
    return _words([HERE / "address.sh", "take", SERVICE, INTERFACE, announce])


def leave_address() -> list[str]:
    """Return the command by which a host gives it away: the hook of a departure."""
    return _words([HERE / "address.sh", "leave", SERVICE, INTERFACE])


def move_address(source: Host, destination: Host) -> None:
    """Move the service's address from one host to another."""
    source.must(leave_address())
    destination.must(take_address())


def last_json(text: str) -> dict[str, Any]:
    """Return the last line of what a command said, which is JSON."""
    result = json.loads(text.strip().splitlines()[-1])
    assert isinstance(result, dict)
    return result
