"""A tree that says of itself whether all its numbers are what they were, and mean what they meant.

Not under its own /proc: that is the host's, and shows the numbers that the host sees.
"""

PROGRAM = """
import fcntl, queue, select, signal, socket, struct, threading, time

me = os.getpid()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGRTMIN])
kid = child()
ended = os.fork()
if ended == 0:
    os._exit(7)
os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)

asked, told = queue.Queue(), queue.Queue()

def answer():
    while asked.get():
        told.put(threading.get_native_id())

threading.Thread(target=answer, daemon=True).start()

def number_of_thread():
    asked.put(True)
    return told.get()

tid = number_of_thread()
of_kid = os.pidfd_open(kid)
out, into = os.pipe()
alarms = []
signal.signal(signal.SIGUSR2, lambda sig, frame: alarms.append(sig))
fcntl.fcntl(out, fcntl.F_SETSIG, signal.SIGUSR2)
F_SETOWN_EX, F_GETOWN_EX = 15, 16
OWNERS = {"thread": struct.pack("ii", 0, me), "process": struct.pack("ii", 1, me)}
fcntl.fcntl(out, F_SETOWN_EX, OWNERS["thread"])
fcntl.fcntl(out, fcntl.F_SETFL, os.O_ASYNC)

def last_number(text):
    return int(text.partition("NSpid:")[2].splitlines()[0].split()[-1])

def seen_as(number):
    space = os.readlink("/proc/self/ns/pid")
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = open(f"/proc/{name}/status").read()
            if os.readlink(f"/proc/{name}/ns/pid") == space and last_number(text) == number:
                return name
        except OSError:
            continue

near, far = socket.socketpair()
status, command = open("/proc/self/status"), open(f"/proc/{seen_as(kid)}/comm")
os.kill(me, signal.SIGUSR1)

TICK = signal.SIGRTMIN
timer = ctypes.c_void_p()
event = struct.pack("<Qiii", 0, TICK, 4, me).ljust(64, bytes(1))
if libc.timer_create(1, event, ctypes.byref(timer)):
    raise OSError("timer_create")

def ticks():
    libc.timer_settime(timer, 0, struct.pack("<4q", 0, 0, 0, 1000000), None)
    info = signal.sigtimedwait([TICK], 20)
    return info and info.si_code == -2

def last_word(line):
    status.seek(0)
    return int(next(text for text in status if text.startswith(line)).split()[-1])

def sender():
    info = signal.sigtimedwait([signal.SIGUSR1], 0)
    os.kill(me, signal.SIGUSR1)
    return info and info.si_pid

def name_of_child():
    command.seek(0)
    return command.read()

def rings():
    alarms.clear()
    os.write(into, b"x")
    return os.read(out, 1) and len(alarms)

def a_new_child():
    pid = os.fork()
    if pid == 0:
        os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def orphans_are_reaped():
    r, w = os.pipe()
    held, hold = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hold)
        orphan = os.fork()
        if orphan:
            os.write(w, b"%d" % orphan)
        else:
            os.read(held, 1)
        os._exit(0)
    orphan = int(os.read(r, 8))
    os.waitpid(pid, 0)
    watched = os.pidfd_open(orphan)
    os.close(hold)
    select.select([watched], [], [], 20)
    for fd in (r, w, held, watched):
        os.close(fd)
    return True

def problem(what, ask):
    try:
        return "" if ask() else what
    except Exception as error:
        return f"{what}: {error}"

def check(*but):
    is_so = {
        "pid": lambda: os.getpid() == me,
        "thread": lambda: number_of_thread() == tid,
        "child": lambda: os.kill(kid, 0) is None and os.waitpid(kid, os.WNOHANG) == (0, 0),
        "ended": lambda: os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT).si_status == 7,
        "pidfd": lambda: not select.select([of_kid], [], [], 0)[0],
        "signal by pidfd": lambda: signal.pidfd_send_signal(of_kid, 0) is None,
        "owner": lambda: fcntl.fcntl(out, F_GETOWN_EX, bytes(8)) == OWNERS["thread"],
        "alarm": lambda: rings() == 1,
        "peer": lambda: struct.unpack("iII", near.getsockopt(1, 17, 12))[0] == me,
        "sender": lambda: sender() == me,
        "timer of a thread": lambda: ticks(),
        "status": lambda: last_word("NSpid:") == me,
        "command": lambda: name_of_child() == open("/proc/self/comm").read(),
        "birth": lambda: a_new_child() == 3,
        "orphans": lambda: orphans_are_reaped(),
    }
    problems = (problem(what, ask) for what, ask in is_so.items() if what not in but)
    return [told for told in problems if told] or "ok"
"""
