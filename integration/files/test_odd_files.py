"""Files as programs come to have them, all in one process: by the command, and at each generation.

Each case prepares something, and has one question with one answer, which is asked only afterwards.
"""

from integration.harness import Restored, become_subreaper, dump
from integration.procview import lasting_differences
from integration.trees.test_trees import Tree, places, python, views
from integration.workloads.driver import descendants, end_orphans

become_subreaper()

# What it is: how it comes about (in a directory of its own), a question, the answer.
CASES = {
    "a symbolic link by itself": (
        "os.symlink('nowhere', 'link'); fd = os.open('link', os.O_PATH | os.O_NOFOLLOW)",
        "os.readlink('', dir_fd=fd)",
        "nowhere",
    ),
    "a deleted directory": (
        "os.mkdir('d'); fd = os.open('d', os.O_RDONLY); os.rmdir('d')",
        "os.listdir(fd), os.fstat(fd).st_nlink",
        ([], 0),
    ),
    "a deleted file, by its path only": (
        "open('f', 'w').write('hello'); fd = os.open('f', os.O_PATH); os.unlink('f')",
        "os.stat(fd).st_size, os.stat(fd).st_nlink",
        (5, 0),
    ),
    "a deleted file with holes": (
        "f = open('f', 'w+b'); f.seek(500_000); f.write(b'end'); f.flush(); os.unlink('f')",
        "os.fstat(f.fileno()).st_size, os.fstat(f.fileno()).st_blocks < 100, f.tell()",
        (500_003, True, 500_003),
    ),
    "a file that never had a name": (
        "fd = os.open('.', os.O_TMPFILE | os.O_RDWR); os.write(fd, b'hello')",
        "os.pread(fd, 9, 0), os.lseek(fd, 0, 1)",
        (b"hello", 5),
    ),
    "a renamed file": (
        "f = open('a', 'w+'); f.write('hello'); f.flush(); os.rename('a', 'b')",
        "os.path.samestat(os.fstat(f.fileno()), os.stat('CASE/b')), f.tell()",
        (True, 5),
    ),
    "a renamed file whose name another has": (
        "f = open('a', 'w+'); f.write('hello'); f.flush(); os.rename('a', 'b')\n"
        "open('a', 'w').write('other')",
        "os.pread(f.fileno(), 9, 0), os.path.samestat(os.fstat(f.fileno()), os.stat('CASE/b'))",
        (b"hello", True),
    ),
    "a file that another has replaced": (
        "f = open('a', 'w+'); f.write('hello'); f.flush()\n"
        "open('b', 'w').write('other'); os.rename('b', 'a')",
        "os.pread(f.fileno(), 9, 0), open('CASE/a').read(), os.fstat(f.fileno()).st_nlink",
        (b"hello", "other", 0),
    ),
    "a file that has another name elsewhere": (
        "f = open('a', 'w+'); f.write('hello'); f.flush()\n"
        "os.mkdir('d'); os.link('a', 'd/z'); os.unlink('a')",
        "os.path.samestat(os.fstat(f.fileno()), os.stat('CASE/d/z')), f.tell()",
        (True, 5),
    ),
    "a file around the page cache": (
        "fd = os.open('f', os.O_RDWR | os.O_CREAT | os.O_DIRECT)",
        "bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)",
        True,
    ),
    "a mapped file that is deleted": (
        "f = open('f', 'w+b'); f.write(b'old' * 2000); f.flush()\n"
        "m = mmap.mmap(f.fileno(), 6000); os.unlink('f'); m[:3] = b'new'",
        "m[:6], os.pread(f.fileno(), 6, 0), os.pwrite(f.fileno(), b'now', 0), m[:3]",
        (b"newold", b"newold", 3, b"now"),
    ),
    "a mapped file": (
        "f = open('f', 'w+b'); f.write(b'old' * 2000); f.flush(); m = mmap.mmap(f.fileno(), 6000)",
        "m.__setitem__(slice(3), b'new'), open('CASE/f', 'rb').read(6)",
        (None, b"newold"),
    ),
    "a pipe of packets": (
        "r, w = os.pipe2(os.O_DIRECT); os.write(w, b'one'); os.write(w, b'two')",
        "os.read(r, 100), os.read(r, 100)",
        (b"one", b"two"),
    ),
    "an epoll that watches an epoll": (
        "a, b, (r, w) = select.epoll(), select.epoll(), os.pipe()\n"
        "b.register(r, select.EPOLLIN); a.register(b.fileno(), select.EPOLLIN)",
        "a.poll(0), os.write(w, b'x'), a.poll(0) == [(b.fileno(), select.EPOLLIN)]",
        ([], 1, True),
    ),
    "a sealed memfd": (
        "fd = os.memfd_create('m', os.MFD_ALLOW_SEALING); os.write(fd, b'abc')\n"
        "fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 15)",
        "fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.pread(fd, 9, 0), os.lseek(fd, 0, 1)",
        (15, b"abc", 3),
    ),
    "a lease": (
        "fd = os.open('f', os.O_RDWR | os.O_CREAT); fcntl.fcntl(fd, fcntl.F_SETLEASE, 1)",
        "fcntl.fcntl(fd, fcntl.F_GETLEASE)",
        1,
    ),
    "a file of the kernel": (
        "fd = os.open('/proc/self/status', os.O_RDONLY)\n"
        "other = os.open('/sys/kernel/mm/transparent_hugepage/enabled', os.O_RDONLY)\n"
        "os.read(other, 5)",
        "b'\\tpython' in os.pread(fd, 99, 0), os.lseek(other, 0, 1)",
        (True, 5),
    ),
    "a child by its pidfd": (
        "pid = child(); fd = os.pidfd_open(pid)",
        "signal.pidfd_send_signal(fd, 9), os.waitid(os.P_PIDFD, fd, os.WEXITED).si_status",
        (None, 9),
    ),
    "memory that a child gets empty": (
        """
m = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
m[:3] = b"abc"
m.madvise(mmap.MADV_WIPEONFORK if hasattr(mmap, "MADV_WIPEONFORK") else 18)
r, w = os.pipe()
def look(ready):
    os.write(w, m[:3])
    ready()
""",
        "child(look) > 0, os.read(r, 3), m[:3]",
        (True, bytes(3), b"abc"),
    ),
    # The last one: it leaves the directory of all others.
    "a working directory that is deleted": (
        "os.mkdir('d'); os.chdir('d'); os.rmdir('../d')",
        "os.readlink('/proc/self/cwd').endswith('/d (deleted)'), os.listdir('.')",
        (True, []),
    ),
}
PREPARE = """
import fcntl, mmap, select
spaces = {}
top = os.getcwd()
def prepare(name, code):
    os.mkdir(f"{top}/{name}")
    os.chdir(f"{top}/{name}")
    spaces[name] = {**globals()}
    exec(code, spaces[name])
def ask(name, question):
    return eval(question.replace("CASE", f"{top}/{name}"), spaces[name])
"""


def program():
    prepared = [f"prepare({name!r}, {code!r})" for name, (code, _, _) in CASES.items()]
    return python(PREPARE + "\n".join(prepared))


def test_all_of_them_come_back(tmp_path):
    image, home = tmp_path / "image", tmp_path / "home"
    home.mkdir()
    with Tree(program(), start_new_session=True, cwd=home) as work:
        kinds = [dump(work.pid, image)["kind"] for _ in range(2)]
        assert kinds == ["full", "delta"]
        stood = places(work.pid)
        seen = views(stood)
        work.family |= descendants(work.pid)
        dump(work.pid, image, "--kill")
        work.process.wait()
        end_orphans(work.family)
    for generation in ("2", "1"):
        with Restored(image, "--at", generation) as back:
            assert places(back.pid) == stood
            for pid, before in seen.items():
                assert lasting_differences(before, pid) == []
            assert dump(back.pid, image)["kind"] == "delta"
            answers = {
                name: back.ask(f"ask({name!r}, {question!r})")
                for name, (_, question, _) in CASES.items()
            }
            assert answers == {name: str(answer) for name, (_, _, answer) in CASES.items()}
