"""Load on a redis server by many connections, one request at a time on each, and what came of it.

python -m integration.migrate.redis_load HOST PORT --connections 20 --rate 5000 --keys 100000

Every second request of a connection is a SET of a key that only it writes, the others GET one of
those and compare. RATE is of SETs, in all. Commands, a line each, answered by a line:

    go          begin, or go on                          "goes"
    wait N      until N more replies have come           "waited"
    pause       once no reply is under way               "paused"
    report      figures since the last report, JSON      {"replies": ..., "longest_gap_ms": ...}
    verify      GET every key that was ever acknowledged {"checked": ..., "lost": ...}

The gap of a connection is the time between two replies; a pause counts to none.
"""

import argparse
import collections
import json
import os
import select
import socket
import sys
import time

VALUE_BYTES = 400
CATCH_UP_S = 0.01


class Connection:
    """One connection, its keys, and what the server has acknowledged."""

    def __init__(self, address, number, args):
        self.sock = socket.create_connection(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.number, self.step, self.n_keys = number, args.connections, args.keys
        self.sequence = 0
        self.acknowledged = {}
        self.order = []
        self.asked = None
        self.held = b""
        self.sent_at_s = self.replied_at_s = 0.0
        self.longest_gap_s = 0.0
        self.longest_reply_s = 0.0

    def key_of(self, sequence):
        """Return a key of its own, in an order that goes all over the data."""
        n_own = self.n_keys // self.step
        return self.number + self.step * (sequence * 7919 % n_own)

    def value_of(self, key, sequence):
        return f"{key}/{sequence}/".ljust(VALUE_BYTES, "x").encode()

    def send(self):
        self.sequence += 1
        if self.sequence % 2 or not self.order:
            key = self.key_of(self.sequence)
            self.asked = ("SET", key, self.sequence)
            words = [b"SET", b"key:%d" % key, self.value_of(key, self.sequence)]
        else:
            key = self.order[self.sequence * 31 % len(self.order)]
            self.asked = ("GET", key, self.acknowledged[key])
            words = [b"GET", b"key:%d" % key]
        self.put(words)

    def ask(self, key):
        self.asked = ("GET", key, self.acknowledged[key])
        self.put([b"GET", b"key:%d" % key])

    def put(self, words):
        parts = [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
        raw = b"*%d\r\n%s" % (len(parts), b"".join(parts))
        self.sent_at_s = time.monotonic()
        assert self.sock.send(raw) == len(raw), "one request fits into any buffer"

    def read(self):
        """Take what has come; True if that is a whole reply, which is judged."""
        try:
            chunk = self.sock.recv(1 << 16)
        except BlockingIOError:
            return False
        if not chunk:
            raise ConnectionResetError("the server has closed the connection")
        self.held += chunk
        line, end, rest = self.held.partition(b"\r\n")
        if not end:
            return False
        if line[:1] == b"$" and line != b"$-1":
            n_bytes = int(line[1:])
            if len(rest) < n_bytes + 2:
                return False
            reply = rest[:n_bytes]
        else:
            reply = line
        self.held = b""
        self.judge(reply)
        return True

    def judge(self, reply):
        what, key, sequence = self.asked
        now = time.monotonic()
        self.longest_gap_s = max(self.longest_gap_s, now - (self.replied_at_s or now))
        self.longest_reply_s = max(self.longest_reply_s, now - self.sent_at_s)
        self.replied_at_s = now
        if what == "SET":
            assert reply == b"+OK", f"SET was answered by {reply[:100]!r}"
            if key not in self.acknowledged:
                self.order.append(key)
            self.acknowledged[key] = sequence
        else:
            wanted = self.value_of(key, sequence)
            assert reply == wanted, f"key:{key} is {reply[:40]!r}, not {wanted[:40]!r}"


class Load:
    """All connections, and who asks for figures."""

    def __init__(self, args):
        address = (args.host, args.port)
        self.connections = [Connection(address, n, args) for n in range(args.connections)]
        self.poll = select.epoll()
        self.by_fd = {one.sock.fileno(): one for one in self.connections}
        for fd in self.by_fd:
            self.poll.register(fd, select.EPOLLIN)
        self.poll.register(0, select.EPOLLIN)
        self.idle = collections.deque(self.connections)
        self.period_s = 1 / (2 * args.rate)
        self.due_s = 0.0
        self.going = False
        self.n_replies = self.n_reported = 0
        self.wait_for = None
        self.reported_s = time.monotonic()

    def run(self):
        while True:
            self.begin_due()
            for fd, _ in self.poll.poll(self.timeout_s()):
                if fd == 0:
                    if not self.obey():
                        return
                elif self.by_fd[fd].read():
                    self.n_replies += 1
                    self.idle.append(self.by_fd[fd])
            if self.wait_for is not None and self.n_replies >= self.wait_for:
                self.wait_for = None
                say("waited")

    def timeout_s(self):
        if not self.going or not self.idle:
            return None
        return max(self.due_s - time.monotonic(), 0.0)

    def begin_due(self):
        now = time.monotonic()
        # Who waited long goes on at the rate, and does not catch up.
        self.due_s = max(self.due_s, now - CATCH_UP_S)
        while self.going and self.idle and self.due_s <= now:
            self.idle.popleft().send()
            self.due_s += self.period_s

    def obey(self):
        words = os.read(0, 4096).decode().split()
        if not words:
            return False
        if words[0] == "go":
            self.going = True
            for one in self.connections:
                one.replied_at_s = 0.0
            say("goes")
        elif words[0] == "wait":
            self.wait_for = self.n_replies + int(words[1])
        elif words[0] == "pause":
            self.pause()
            say("paused")
        elif words[0] == "report":
            say(json.dumps(self.report()))
        elif words[0] == "verify":
            say(json.dumps(self.verify()))
        return True

    def pause(self):
        self.going = False
        while len(self.idle) < len(self.connections):
            for fd, _ in self.poll.poll():
                if fd and self.by_fd[fd].read():
                    self.n_replies += 1
                    self.idle.append(self.by_fd[fd])

    def report(self):
        now = time.monotonic()
        n_replies, took_s = self.n_replies - self.n_reported, now - self.reported_s
        self.n_reported, self.reported_s = self.n_replies, now
        gaps = [one.longest_gap_s for one in self.connections]
        replies = [one.longest_reply_s for one in self.connections]
        for one in self.connections:
            one.longest_gap_s = one.longest_reply_s = 0.0
        return {
            "replies": n_replies,
            "replies_per_s": round(n_replies / took_s),
            "longest_gap_ms": round(max(gaps) * 1000, 2),
            "shortest_of_longest_gaps_ms": round(min(gaps) * 1000, 2),
            "longest_reply_ms": round(max(replies) * 1000, 2),
            "acknowledged_keys": sum(len(one.acknowledged) for one in self.connections),
        }

    def verify(self):
        """Ask for everything; `judge` raises at the first that is lost."""
        self.pause()
        n_checked = 0
        for one in self.connections:
            one.sock.setblocking(True)
            for key in one.order:
                one.ask(key)
                while not one.read():
                    pass
                n_checked += 1
            one.sock.setblocking(False)
        return {"checked": n_checked, "lost": 0}


def say(text):
    print(text, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=20)
    parser.add_argument("--rate", type=float, default=5000)
    parser.add_argument("--keys", type=int, default=100_000)
    load = Load(parser.parse_args())
    say("connected")
    try:
        load.run()
    except (AssertionError, OSError) as error:
        say(f"failed: {type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
