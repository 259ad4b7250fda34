"""A few threads that do jobs in the order given; for work that runs without the interpreter lock.

Smaller and quicker to import than `concurrent.futures`, which is why it exists: `ckpt dump` counts
milliseconds until the target can be touched. Neighbours: `writer` compresses with it, `reader` and
`verify` decompress.
"""

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")
A = TypeVar("A")

DEFAULT_THREADS = 2
"""Enough to keep up with copying out of a process, and what small machines have."""


_MOST_THREADS = 8


def count_free_threads() -> int:
    """Return how many threads to work with while the process that matters does not run."""
    return max(DEFAULT_THREADS, min(_MOST_THREADS, len(os.sched_getaffinity(0))))


class Pending(Generic[T]):
    """The result of a job that may still run."""

    def __init__(self, job: Callable[[], T]) -> None:
        """Hold `job` until a worker has time for it."""
        self._job: Callable[[], T] | None = job
        self._done = threading.Event()
        self._results: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the job, in a worker; whatever it raises is kept for `wait`."""
        try:
            if self._job is not None:
                self._results.append(self._job())
        except BaseException as error:
            self._error = error
        finally:
            # The job holds buffers; the result may be kept for long.
            self._job = None
            self._done.set()

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        return self._done.is_set()

    def wait(self) -> T:
        """Block until the job is done and return what it returned, or raise what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]


_NICE = os.getpriority(os.PRIO_PROCESS, 0)
"""Of this process, when it began."""


class Workers:
    """A context manager around a few threads; leaving it waits for all jobs."""

    def __init__(self, n_threads: int = DEFAULT_THREADS) -> None:
        """Start no thread yet: they start with the first job."""
        self._n_threads = n_threads
        self._jobs: queue.SimpleQueue[Pending[object] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, job: Callable[[], T]) -> Pending[T]:
        """Queue `job`; the caller bounds how many are under way."""
        if len(self._threads) < self._n_threads:
            # Daemons: an interpreter that ends by an exception must not wait for a queue.
            thread = threading.Thread(target=self._work, name="ckpt-image", daemon=True)
            self._threads.append(thread)
            thread.start()
        pending = Pending(job)
        self._jobs.put(pending)  # type: ignore[arg-type]
        return pending

    def _work(self) -> None:
        # Whoever submits may go before others for a moment; a thread begins as urgent as that.
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)
        while (pending := self._jobs.get()) is not None:
            pending.run()
            # Nothing of the last job may stay alive while waiting for the next.
            del pending

    def close(self) -> None:
        """Wait for every job and end the threads; may be called again."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            # One whose start was interrupted cannot be joined; it finds its end in the queue.
            with contextlib.suppress(RuntimeError):
                thread.join()
        self._threads.clear()

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See `close`."""
        self.close()


def iter_ahead(
    work: Callable[[A], T], items: Iterable[A], n_threads: int = DEFAULT_THREADS
) -> Generator[tuple[A, T], None, None]:
    """Yield each item with `work(item)`, in order, computed a few ahead in threads.

    Memory: at most `n_threads + 2` results exist at once. Closing the iterator early waits for the
    jobs under way and drops the rest. What `work` raises is raised at the item's turn.
    """
    with Workers(n_threads) as workers:
        ahead: deque[tuple[A, Pending[T]]] = deque()
        for item in items:
            ahead.append((item, workers.submit(lambda item=item: work(item))))  # type: ignore[misc]
            if len(ahead) >= n_threads + 2:
                first, pending = ahead.popleft()
                yield first, pending.wait()
        while ahead:
            first, pending = ahead.popleft()
            yield first, pending.wait()


def for_each(
    work: Callable[[A], None], items: Iterable[A], n_threads: int = DEFAULT_THREADS
) -> None:
    """Call `work` with each item, in threads that each take the next one when they are free.

    Raises:
        BaseException: what `work`, or the iterator, raised first; further items are not begun.
    """
    source = iter(items)
    turn = threading.Lock()
    stop = threading.Event()

    def drain() -> None:
        try:
            while not stop.is_set():
                with turn:
                    # An iterator must not be asked by two threads at once.
                    item = next(source)
                work(item)
        except StopIteration:
            return
        except BaseException:
            stop.set()
            raise

    with Workers(n_threads) as workers:
        drains = [workers.submit(drain) for _ in range(n_threads)]
        try:
            for pending in drains:
                pending.wait()
        finally:
            stop.set()
