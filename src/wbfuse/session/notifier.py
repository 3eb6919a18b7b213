"""Notifications to the kernel, each written from one thread of their own.

NOTIFY_INVAL_INODE on dirty pages waits in the kernel for their write-back, so the thread that answers WRITEs must
never send one, and nothing that must be quick may queue behind one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue


class Notifier:
    """A queue and its thread. `send` gives a Future that ends once the kernel has taken (and acted on) the message."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue: SimpleQueue[tuple[Sequence[bytes], Future[None]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def send(self, message: Sequence[bytes]) -> Future[None]:
        """The Future raises OSError as the kernel answered: ENOENT is a node that it does not know."""
        future: Future[None] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(OSError(19, "the session has ended"))
                return future
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
                self._thread.start()
            self._queue.put((message, future))
        return future

    def close(self) -> None:
        with self._lock:
            self._closed = True
            thread = self._thread
        self._queue.put(None)
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            message, future = item
            try:
                os.writev(self._fd, message)
            except OSError as e:
                future.set_exception(e)
            else:
                future.set_result(None)
