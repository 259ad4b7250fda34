import os

from ckpt.kernel.fork import fork_sharing_descriptors


def test_what_the_child_opens_the_parent_has_even_after_its_end():
    read, write = os.pipe()
    pid = fork_sharing_descriptors()
    if pid == 0:
        try:
            made = os.memfd_create("made")
            os.write(made, b"by the child")
            os.write(write, bytes([made]))
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0) == (pid, 0)
    (made,) = os.read(read, 1)
    assert os.pread(made, 100, 0) == b"by the child"
    for fd in (read, write, made):
        os.close(fd)
