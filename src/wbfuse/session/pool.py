"""Threads for work that may wait. They start on demand and only ever sleep in calls that release the GIL."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

log = logging.getLogger(__name__)

Job = Callable[[], None]


class Pool:
    """At most `size` threads over one queue. Jobs must not raise; one that does is logged and the thread lives on.

    Lock: `_lock` guards `_threads` and `_idle`; nothing else is held with it.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(self, job: Job) -> None:
        """Run `job` in some thread, in the order of submission as far as threads are free."""
        with self._lock:
            if self._closed:
                raise RuntimeError(f"pool {self._name} is closed")
            if self._idle > 0:
                self._idle -= 1
            elif len(self._threads) < self._size:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._jobs.put(job)

    def close(self) -> None:
        """Let what is queued finish, then end the threads. Must not be called from one of them."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # the last barrier of a thread: the pool must not shrink
                log.exception("a pool job failed")
            with self._lock:
                self._idle += 1
