"""The first process of a host made of namespaces: it says `ready`, and reaps what others leave.

It ends when its input does, that is when nobody holds the host any more, and all processes of its
pid namespace with it. Run by `hosts`, as `python -I host_init.py`, with nothing of ours to import.
"""

import os
import select
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
# Without a handler the first process of a namespace is not woken for anybody's end.
signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
signal.set_wakeup_fd(wake)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
print("ready", flush=True)
while True:
    ready, _, _ = select.select([sys.stdin, woken], [], [])
    if sys.stdin in ready and not os.read(0, 4096):
        sys.exit(0)
    if woken in ready:
        os.read(woken, 4096)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
