"""Boot a kernel in qemu, without KVM, over this machine's own root file system; run one command.

virtme-ng (PyPI) does the booting. Its `virtme-run` is used rather than its `vng`: that one lays
writable overlays over /usr, /lib and more, and a file mapped through an overlay shows another
device and inode in /proc/PID/maps than stat gives. Here the root is plain 9p and read-only. The
guest does not cache that root, which makes a program start ten times slower: the directories that
programs come from are mounted a second time, cached, over themselves.

Inside: /run (so TMPDIR and HOME) and /dev/shm are tmpfs, /tmp is an overlay whose writes are lost,
only the directory of the results is shared and writable. Exit code and output come back as files
there; the console shows what the kernel said.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from integration.kernels.images import SYSTEM_PATH, UnpackedKernel

SCRATCH = "/run/ckpt-vm"
"""A directory inside, on tmpfs: TMPDIR and HOME of the command."""
CACHED_TAG = "ckpt-cached"
"""Mount tag of the host's root file system, the second time."""
CACHED_ROOT = "/run/ckpt-host"
CACHED_OPTIONS = "ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000,access=any"
TAIL_LINES = 40


class VmError(Exception):
    """The machine did not come up, or ended (or had to be ended) before the command did."""


@attrs.frozen
class Outcome:
    """A command that ran to its end inside."""

    exit_code: int
    output: str
    console: str
    boot_s: float
    """From starting qemu to the first line of our script."""
    wall_s: float
    """From starting qemu to its end."""


@attrs.frozen
class Machine:
    """What to boot, and how big."""

    kernel: UnpackedKernel
    busybox: Path
    memory_mib: int = 2048
    n_cpus: int = 2

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        results: Path,
        timeout_s: float,
    ) -> Outcome:
        """Boot, run `argv` in `cwd` (a path of the host) with `env`, power off.

        `results` must be empty; it is at the same path inside, and writable there.

        Raises:
            VmError: there is no exit code of the command; tells the last output and console lines.
        """
        script = results / "run.sh"
        script.write_text(self._script(argv, cwd, env, results))
        with tempfile.TemporaryDirectory() as private:
            started = time.time()
            console, timed_out = _boot(self._command(script), Path(private), timeout_s)
            wall_s = time.time() - started
        output_file, exit_file = results / "output", results / "exit"
        output = output_file.read_text(errors="replace") if output_file.exists() else ""
        if not exit_file.exists():
            what = f"no end within {timeout_s:g} s" if timed_out else "ended before the command did"
            raise VmError(
                f"Linux {self.kernel.release} in qemu: {what}\n"
                f"--- last output of the command\n{_tail(output)}\n"
                f"--- last lines of the console\n{_tail(console)}"
            )
        # The host's clock made this time stamp, when the file was made through 9p.
        boot_s = (results / "started").stat().st_mtime - started
        return Outcome(int(exit_file.read_text()), output, console, boot_s, wall_s)

    def _command(self, script: Path) -> list[str]:
        return [
            _find_virtme_run(),
            *("--kimg", str(self.kernel.vmlinuz), "--mods", "auto"),
            *("--disable-kvm", "--disable-microvm", "--force-9p"),
            *("--memory", f"{self.memory_mib}M", "--cpus", str(self.n_cpus)),
            *("--busybox", str(self.busybox), "--show-boot-console"),
            *("--rwdir", str(script.parent), "--overlay-rwdir", "/tmp"),
            # The same export again: a tag can be mounted once only.
            "--qemu-opt=-fsdev",
            f"--qemu-opt=local,id={CACHED_TAG},path=/,security_model=none,readonly=on,multidevs=remap",
            "--qemu-opt=-device",
            f"--qemu-opt=virtio-9p-pci,fsdev={CACHED_TAG},mount_tag={CACHED_TAG}",
            *("--script-sh", f"sh {shlex.quote(str(script))}"),
        ]

    def _script(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str], results: Path) -> str:
        inside = {
            "PATH": SYSTEM_PATH,
            "HOME": SCRATCH,
            "TMPDIR": SCRATCH,
            "LC_ALL": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        } | dict(env)
        exports = "\n".join(f"export {key}={shlex.quote(value)}" for key, value in inside.items())
        modules = shlex.quote(str(self.kernel.directory))
        shared = shlex.quote(str(results))
        cached = shlex.join(sorted({str(cwd), "/usr", sys.prefix, sys.base_prefix}))
        # The kernel loads modules by itself through a program of a fixed name: ours points it at
        # the unpacked package, for /lib/modules of the host has other kernels' modules or none.
        return f"""#!/bin/sh
{exports}
: >{shared}/started
mkdir -p {SCRATCH} {CACHED_ROOT}
mount -t 9p -o {CACHED_OPTIONS} {CACHED_TAG} {CACHED_ROOT}
for directory in {cached}; do
    mount --bind {CACHED_ROOT}/"$directory" "$directory"
done
cat >{SCRATCH}/modprobe <<'END'
#!/bin/sh
exec /sbin/modprobe -d {modules} "$@"
END
chmod 755 {SCRATCH}/modprobe
echo {SCRATCH}/modprobe >/proc/sys/kernel/modprobe
cd {shlex.quote(str(cwd))} || exit 1
{shlex.join(argv)} </dev/null >{shared}/output 2>&1
echo $? >{shared}/exit.partial
mv {shared}/exit.partial {shared}/exit
"""


def _find_virtme_run() -> str:
    beside = Path(sys.executable).with_name("virtme-run")
    found = str(beside) if beside.exists() else shutil.which("virtme-run")
    if not found:
        raise VmError("virtme-run is missing: pip install virtme-ng")
    return found


def _boot(command: Sequence[str], private: Path, timeout_s: float) -> tuple[str, bool]:
    """Run the machine to its end; return the console, and whether it was ended by us.

    The console must be a pipe: qemu opens its output anew and would cut a file to nothing.
    """
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    vm = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PATH": path, "TMPDIR": str(private)},
        # A group of its own, so that qemu ends with whatever started it.
        start_new_session=True,
    )
    timed_out = False
    try:
        raw, _ = vm.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(vm.pid, signal.SIGKILL)
        raw, _ = vm.communicate()
    except BaseException:
        os.killpg(vm.pid, signal.SIGKILL)
        vm.communicate()
        raise
    text = raw.decode(errors="replace").replace("\r", "")
    return re.sub(r"\x1b\[[0-9;?=]*[A-Za-z]|\x1bc", "", text), timed_out


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL_LINES:])
