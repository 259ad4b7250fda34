"""The whole error taxonomy: what can go wrong, which exit code it owns, what its fields are.

A message says what happened, what was expected, and what to do. `OSError` is turned into one of
these once, in `kernel/` or by the layer that knows what the path means, and stays its cause. A bug
of ours is not in here: it shows its traceback.
"""

from typing import ClassVar

import attrs

from ckpt.units import GenerationNo, Pid, Tid


class CkptError(Exception):
    """The root: everything that is a user's or a machine's trouble rather than a bug of ours."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "error"
    """A stable name for programs that read `--json`."""

    sentence: ClassVar[str] = ""
    """The message, a format of the error itself; or the class builds it from its fields."""

    def __str__(self) -> str:
        """The one clear sentence."""
        return self.message()

    def as_plain(self) -> dict[str, str | int]:
        """Return what a program is told of it."""
        return {"code": self.code, "message": self.message(), "exit_code": self.exit_code}

    def message(self) -> str:
        """Return the one clear sentence."""
        if not self.sentence:
            raise TypeError(f"{type(self).__name__} has no message")
        return self.sentence.format(self)


@attrs.frozen(eq=False, repr=False, str=False)
class UsageError(CkptError):
    """The command line or the call makes no sense."""

    exit_code = 2
    code = "usage"
    text: str

    def message(self) -> str:
        """See `CkptError.message`."""
        return self.text


class HostError(CkptError):
    """This machine cannot do it (exit codes 10-19)."""

    exit_code = 10
    code = "host"


@attrs.frozen(eq=False, repr=False, str=False)
class FeatureMissing(HostError):
    """The kernel, or the processor, lacks something that was asked for."""

    exit_code = 11
    code = "feature-missing"
    sentence = "this kernel has no {0.feature}: {0.remedy}"
    feature: str
    remedy: str


@attrs.frozen(eq=False, repr=False, str=False)
class NotPermitted(HostError):
    """We may not do it."""

    exit_code = 12
    code = "not-permitted"
    sentence = "not permitted to {0.action}: {0.remedy}"
    action: str
    remedy: str


@attrs.frozen(eq=False, repr=False, str=False)
class HostFull(HostError):
    """No space, no memory, no descriptors left; nothing was changed."""

    exit_code = 13
    code = "host-full"
    sentence = "{0.what}: {0.remedy}"
    what: str
    remedy: str


@attrs.frozen(eq=False, repr=False, str=False)
class HookFailed(HostError):
    """A command of the user, run at one moment of a move, did not do its work."""

    exit_code = 14
    code = "hook-failed"
    option: str
    reason: str
    outcome: str
    """What has become of the tree."""

    def message(self) -> str:
        """See `CkptError.message`."""
        return f"the command of {self.option} failed: {self.reason}; {self.outcome}"


class TargetError(CkptError):
    """The process that should be dumped is the trouble (exit codes 20-29)."""

    exit_code = 20
    code = "target"


@attrs.frozen(eq=False, repr=False, str=False)
class TargetGone(TargetError):
    """The process, or the thread, does not exist (any more)."""

    exit_code = 20
    code = "target-gone"
    pid: Pid | Tid

    def message(self) -> str:
        """See `CkptError.message`."""
        return f"process {self.pid} does not exist (or has just ended)"


def printable(text: str) -> str:
    r"""Return `text` with line ends, control characters and bytes of no UTF-8 as `\n`, `\xff`."""
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@attrs.frozen(slots=True)
class Finding:
    """One thing about the target (or the host) that stands in the way; one line for the user."""

    subject: str
    """Which object: `fd 7`, `vma 7f00-7f10`, `thread 12`."""
    problem: str
    remedy: str = ""
    wants_address: bool = False
    """All that is missing is an IP address of this host."""

    def __str__(self) -> str:
        """One line, whatever is in the names of files."""
        remedy = f" ({self.remedy})" if self.remedy else ""
        return printable(f"{self.subject}: {self.problem}{remedy}")


@attrs.frozen(eq=False, repr=False, str=False)
class UnsupportedState(TargetError):
    """The target owns something that we cannot capture; all findings at once, target untouched."""

    exit_code = 21
    code = "unsupported-state"
    pid: Pid
    findings: tuple[Finding, ...]

    def message(self) -> str:
        """See `CkptError.message`."""
        lines = "".join(f"\n  {finding}" for finding in self.findings)
        return f"process {self.pid} cannot be checkpointed, and was not touched:{lines}"


@attrs.frozen(eq=False, repr=False, str=False)
class FreezeTimeout(TargetError):
    """A task did not stop in time; all were let go."""

    exit_code = 22
    code = "freeze-timeout"
    tid: Tid
    timeout_s: float

    def message(self) -> str:
        """See `CkptError.message`."""
        return (
            f"thread {self.tid} did not stop within {self.timeout_s:g} s (in an uninterruptible"
            " wait, state D in ps?); the process was let go, try again"
        )


@attrs.frozen(eq=False, repr=False, str=False)
class TargetRefused(TargetError):
    """This pid is one that we never touch: ourselves, an ancestor, a kernel thread, one traced."""

    exit_code = 23
    code = "target-refused"
    sentence = "process {0.pid} {0.reason}"
    pid: Pid | Tid
    reason: str


@attrs.frozen(eq=False, repr=False, str=False)
class TargetDamaged(TargetError):
    """Something of ours could not be undone in the target; says exactly what is left."""

    exit_code = 24
    code = "target-damaged"
    sentence = "process {0.pid} goes on, but {0.what}"
    pid: Pid | Tid
    what: str


@attrs.frozen(eq=False, repr=False, str=False)
class DumpTimeout(TargetError):
    """It took longer than it may; the process was let go."""

    exit_code = 25
    code = "dump-timeout"
    sentence = "process {0.pid} has no checkpoint after {0.timeout_s:g} s, and goes on: {0.outcome}"
    pid: Pid
    timeout_s: float
    outcome: str
    """What has become of the chain."""


class ImageError(CkptError):
    """The image directory is the trouble (exit codes 30-39)."""

    exit_code = 30
    code = "image"


@attrs.frozen(eq=False, repr=False, str=False)
class ImageUnusable(ImageError):
    """The path is no image directory, or cannot be made or read as one."""

    exit_code = 30
    code = "image-unusable"
    path: str
    reason: str

    def message(self) -> str:
        """See `CkptError.message`."""
        return f"{self.path}: {self.reason}"


@attrs.frozen(eq=False, repr=False, str=False)
class ImageCorrupt(ImageError):
    """A checksum, a digest or the structure is wrong."""

    exit_code = 31
    code = "image-corrupt"
    sentence = "{0.path} is damaged: {0.reason}"
    path: str
    reason: str


@attrs.frozen(eq=False, repr=False, str=False)
class ImageVersion(ImageError):
    """The image was written by a newer format than this ckpt reads."""

    exit_code = 32
    code = "image-version"
    path: str
    found: str
    supported: str

    def message(self) -> str:
        """See `CkptError.message`."""
        return (
            f"{self.path} has format {self.found}, this ckpt reads {self.supported}:"
            " use the ckpt that wrote it, or a newer one"
        )


@attrs.frozen(eq=False, repr=False, str=False)
class ChainBroken(ImageUnusable):
    """A generation's ancestor is missing, or is not the one that it was made against."""

    exit_code = 33
    code = "chain-broken"


@attrs.frozen(eq=False, repr=False, str=False)
class NoGeneration(ImageError):
    """The generation that was asked for is not in this chain."""

    exit_code = 34
    code = "no-generation"
    path: str
    generation: GenerationNo
    available: str

    def message(self) -> str:
        """See `CkptError.message`."""
        return f"{self.path} has no generation {self.generation}; it has {self.available}"


@attrs.frozen(eq=False, repr=False, str=False)
class ImageBusy(ImageError):
    """Another ckpt works in this image directory."""

    exit_code = 35
    code = "image-busy"
    sentence = "{0.path} is in use by another ckpt: wait until it has ended"
    path: str


@attrs.frozen(eq=False, repr=False, str=False)
class ImageUntrusted(ImageUnusable):
    """Somebody else owns it, or can write to it; a restore would run what he put there."""

    exit_code = 36
    code = "image-untrusted"


@attrs.frozen(eq=False, repr=False, str=False)
class ImageSealed(ImageUnusable):
    """It is encrypted, and no private key that opens it was given."""

    exit_code = 37
    code = "image-sealed"


class RestoreError(CkptError):
    """The process could not be brought back; nothing was left behind (exit codes 40-49)."""

    exit_code = 40
    code = "restore"


@attrs.frozen(eq=False, repr=False, str=False)
class RestoreFailed(RestoreError):
    """The kernel refused one step of the restore."""

    exit_code = 40
    code = "restore-failed"
    step: str
    reason: str

    def message(self) -> str:
        """See `CkptError.message`."""
        return f"restore failed at {self.step}: {self.reason}; everything it made was removed"


@attrs.frozen(eq=False, repr=False, str=False)
class PidTaken(RestoreError):
    """A pid or tid of the image is in use here."""

    exit_code = 41
    code = "pid-taken"
    pid: Pid | Tid
    holder: str
    remedy: str = "end it, or wait until it is reaped"

    def message(self) -> str:
        """See `CkptError.message`."""
        return printable(
            f"pid {self.pid} is taken by {self.holder}: {self.remedy} (or use --new-pids)"
        )


@attrs.frozen(eq=False, repr=False, str=False)
class HostMismatch(RestoreError):
    """This host lacks what the process needs (processor, kernel, limits)."""

    exit_code = 43
    code = "host-mismatch"
    summary: ClassVar[str] = "this host cannot run the process of the image"
    findings: tuple[Finding, ...]

    def message(self) -> str:
        """See `CkptError.message`."""
        return f"{self.summary}:" + "".join(f"\n  {finding}" for finding in self.findings)


@attrs.frozen(eq=False, repr=False, str=False)
class FileChanged(HostMismatch):
    """Files that the process holds open or mapped are missing or not what they were."""

    exit_code = 42
    code = "file-changed"
    summary = "files of the process are not as they were"


class MigrateError(CkptError):
    """A move to another host did not come about (exit codes 50-59)."""

    exit_code = 50
    code = "migrate"


@attrs.frozen(eq=False, repr=False, str=False)
class PeerTrouble(MigrateError):
    """Whoever is at the other end, or should be, is the trouble."""

    says: ClassVar[str] = "{}: {}"
    peer: str
    reason: str

    def message(self) -> str:
        """See `CkptError.message`."""
        return printable(self.says.format(self.peer, self.reason))


@attrs.frozen(eq=False, repr=False, str=False)
class ConnectFailed(PeerTrouble):
    """Nobody who speaks our protocol answers there, or we cannot listen."""

    exit_code = 50
    code = "connect-failed"


@attrs.frozen(eq=False, repr=False, str=False)
class NotTrusted(PeerTrouble):
    """One side could not prove that it is the one that was paired."""

    exit_code = 51
    code = "not-trusted"
    says = "{} is not trusted: {}"


@attrs.frozen(eq=False, repr=False, str=False)
class PeerVersion(MigrateError):
    """The two sides have no version of the protocol in common."""

    exit_code = 52
    code = "peer-version"
    peer: str
    theirs: str
    ours: str

    def message(self) -> str:
        """See `CkptError.message`."""
        versions = f"protocol {self.theirs}, this ckpt {self.ours}"
        return printable(f"{self.peer} speaks {versions}: use the same ckpt on both hosts")


@attrs.frozen(eq=False, repr=False, str=False)
class ProtocolError(PeerTrouble):
    """What the peer sent is damaged, too much, or not what may come now; nothing of it was used."""

    exit_code = 53
    code = "protocol"
    says = "{} does not keep to the protocol: {}"


@attrs.frozen(eq=False, repr=False, str=False)
class PeerLost(PeerTrouble):
    """The connection was cut, or the peer fell silent."""

    exit_code = 54
    code = "peer-lost"
    says = "lost {}: {}"


@attrs.frozen(eq=False, repr=False, str=False)
class PeerRefused(MigrateError):
    """The peer says, in words of its own, why it will not go on."""

    exit_code = 55
    code = "peer-refused"
    peer: str
    peer_code: str
    """The stable code of the error there; `unknown-session` where it knows none of that id."""
    reason: str
    findings: tuple[Finding, ...] = ()

    def message(self) -> str:
        """See `CkptError.message`."""
        lines = "".join(f"\n  {finding}" for finding in self.findings)
        return printable(f"{self.peer} refuses: {self.reason}") + lines


@attrs.frozen(eq=False, repr=False, str=False)
class NotMoved(MigrateError):
    """It writes faster than it can be sent, or the destination could not let it go at the last."""

    exit_code = 56
    code = "not-moved"
    fate: ClassVar[str] = "the tree goes on here"
    reason: str

    def message(self) -> str:
        """See `CkptError.message`."""
        return printable(f"{self.fate}: {self.reason}")


@attrs.frozen(eq=False, repr=False, str=False)
class TreeLost(NotMoved):
    """It ran at the destination before all of its memory had come (`--lazy`), and ended there."""

    exit_code = 57
    code = "tree-lost"
    fate = "the tree is lost"


class TrackerLost(CkptError):
    """The tracker no longer covers the range; treat all of it as written. Never reaches a user."""

    code = "tracker-lost"

    def message(self) -> str:
        """See `CkptError.message`."""
        return "the dirty-page tracker was lost"
