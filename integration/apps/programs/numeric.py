"""Eight threads that compute with numpy or sleep, and check themselves.

Usage: numeric.py           commands on stdin, one JSON object a line on stdout

    2 threads   a long integer recurrence, element by element; any step has a closed form
    2 threads   a matrix product that shifts columns, in floating point but exact (BLAS)
    1 thread    naps of 5 ms, none of which may end early
    3 threads   sleep when told to: time.sleep, a condition with a timeout, select

mark TEXT       remember TEXT              {"mark": TEXT}
check           verify every array         {"check": "ok", "steps": [...], "mark": TEXT}
sleep SECONDS   three threads sleep        {"sleeping": 3}, then thrice {"slept": HOW, ...}
quit            end with status 0
"""

import abc
import json
import os
import select
import sys
import threading
import time

import numpy as np

N_ELEMENTS = 200_000
MULTIPLIER, INCREMENT = 6_364_136_223_846_793_005, 1_442_695_040_888_963_407
MODULUS = 1 << 64
N_COLUMNS = 192
NAP_S = 0.005
PROGRESS_EVERY_S = 0.25

output = threading.Lock()


def say(**what: object) -> None:
    """Write one line in one system call, so that no line is ever torn."""
    with output:
        os.write(1, json.dumps(what).encode() + b"\n")


class Computing(threading.Thread, abc.ABC):
    """Repeats a step as fast as it can; `check` compares with what the count of steps demands."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.lock = threading.Lock()
        self.turn = threading.Lock()
        self.n_steps = 0

    @abc.abstractmethod
    def step(self) -> None:
        """Compute a little more."""

    @abc.abstractmethod
    def is_right(self) -> bool:
        """Tell whether what was computed is what so many steps give."""

    def run(self) -> None:
        said_at = time.monotonic()
        while True:
            with self.turn:
                # Who waits to check comes first: a lock by itself is not fair.
                self.lock.acquire()
            self.step()
            self.n_steps += 1
            self.lock.release()
            if time.monotonic() - said_at > PROGRESS_EVERY_S:
                said_at = time.monotonic()
                say(progress=self.name, steps=self.n_steps)


class Recurrence(Computing):
    """x -> a x + c modulo 2**64."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name)
        self.first = np.arange(seed, seed + N_ELEMENTS, dtype=np.uint64)
        self.now = self.first.copy()

    def step(self) -> None:
        self.now *= np.uint64(MULTIPLIER)
        self.now += np.uint64(INCREMENT)

    def is_right(self) -> bool:
        power = pow(MULTIPLIER, self.n_steps, MODULUS * (MULTIPLIER - 1))
        added = (power - 1) // (MULTIPLIER - 1) * INCREMENT % MODULUS
        wanted = self.first * np.uint64(power % MODULUS) + np.uint64(added)
        return bool(np.array_equal(self.now, wanted))


class Shifting(Computing):
    """M -> M P, where P shifts columns by one: sums of zeros and one small integer are exact."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name)
        cells = np.arange(seed, seed + N_COLUMNS * N_COLUMNS, dtype=np.float64)
        self.first = cells.reshape(N_COLUMNS, N_COLUMNS)
        self.shift = np.roll(np.eye(N_COLUMNS), 1, axis=1)
        self.now = self.first.copy()

    def step(self) -> None:
        self.now = self.now @ self.shift

    def is_right(self) -> bool:
        return bool(np.array_equal(self.now, np.roll(self.first, self.n_steps, axis=1)))


class Napping(Computing):
    """Sleeps again and again, and remembers the shortest."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.shortest_s = NAP_S

    def step(self) -> None:
        began = time.monotonic()
        time.sleep(NAP_S)
        self.shortest_s = min(self.shortest_s, time.monotonic() - began)

    def is_right(self) -> bool:
        return self.shortest_s >= NAP_S


def wait_on_condition(seconds: float) -> None:
    condition = threading.Condition()
    with condition:
        condition.wait(seconds)


def select_nothing(seconds: float) -> None:
    select.select([], [], [], seconds)


class Sleeping(threading.Thread):
    """Sleeps as long as it is told, in its own way."""

    def __init__(self, name: str, sleep) -> None:
        super().__init__(name=name, daemon=True)
        self.sleep = sleep
        self.asked = threading.Semaphore(0)
        self.asleep = threading.Semaphore(0)
        self.seconds = 0.0

    def run(self) -> None:
        while True:
            self.asked.acquire()
            began = time.monotonic()
            self.asleep.release()
            self.sleep(self.seconds)
            say(slept=self.name, asked_s=self.seconds, took_s=time.monotonic() - began)

    def begin(self, seconds: float) -> None:
        self.seconds = seconds
        self.asked.release()
        self.asleep.acquire()


def check(computing: list[Computing], mark: str) -> None:
    wrong = []
    steps = []
    for thread in computing:
        with thread.turn, thread.lock:
            steps.append(thread.n_steps)
            if not thread.is_right():
                wrong.append(thread.name)
    say(check=" ".join(wrong) or "ok", steps=steps, mark=mark)


def main() -> None:
    computing = [
        *(Recurrence(f"recurrence {seed}", seed) for seed in (1, 2)),
        *(Shifting(f"shifting {seed}", seed) for seed in (3, 4)),
        Napping("napping"),
    ]
    sleeping = [
        Sleeping("time.sleep", time.sleep),
        Sleeping("condition", wait_on_condition),
        Sleeping("select", select_nothing),
    ]
    for thread in (*computing, *sleeping):
        thread.start()
    mark = ""
    say(ready=threading.active_count())
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "mark":
            mark = argument
            say(mark=mark)
        elif command == "check":
            check(computing, mark)
        elif command == "sleep":
            for thread in sleeping:
                thread.begin(float(argument))
            say(sleeping=len(sleeping))
        elif command == "quit":
            # The end of an interpreter whose threads are inside BLAS waits for ever now and then
            # (once in about forty times): BLAS waits for a thread that the interpreter has ended.
            os._exit(0)
    os._exit(1)


if __name__ == "__main__":
    main()
