"""Notifications to the kernel, each written from one thread of their own.

NOTIFY_INVAL_INODE on dirty pages waits in the kernel for their write-back, so the thread that answers WRITEs must
never send one, and what must be quick does not queue behind one: it is written at once, by who sends it.

That wait cannot be killed: a server that dies in it is not gone before its WRITEs are answered, and until it is gone
nobody answers them. So where another server is to follow, a process of its own writes. It holds the connection, so
where nobody follows after all it ends the wait itself.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import SimpleQueue

log = logging.getLogger(__name__)

_SCRIPT = Path(__file__).with_name("notify_process.py")


class Notifier:
    """A queue and its thread. `send` gives a Future that ends once the kernel has taken (and acted on) the message."""

    def __init__(self, fd: int, lifeline: int | None = None) -> None:
        self._fd = fd
        self._lifeline = lifeline
        self._apart: _Apart | None = None
        self._queue: SimpleQueue[tuple[Sequence[bytes], Future[None]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def send(self, message: Sequence[bytes], at_once: bool = False) -> Future[None]:
        """The Future raises OSError as the kernel answered: ENOENT is a node that it does not know.

        `at_once` is for what does not wait in the kernel, such as NOTIFY_RESEND.
        """
        future: Future[None] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(OSError(errno.ENODEV, "the session has ended"))
                return future
            if at_once:
                _settle(future, self._write, message)
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
        write = self._write if self._lifeline is None else partial(self._write_apart, self._lifeline)
        while (item := self._queue.get()) is not None:
            message, future = item
            _settle(future, write, message)
        if self._apart is not None:
            self._apart.close()

    def _write(self, message: Sequence[bytes]) -> None:
        os.writev(self._fd, message)

    def _write_apart(self, lifeline: int, message: Sequence[bytes]) -> None:
        for _ in range(2):
            try:
                self._apart = self._apart or _Apart(self._fd, lifeline)
            except OSError as e:
                log.warning("no process for notifications can be started: %s", e)
                break
            try:
                return self._apart.write(message)
            except ConnectionError:  # it was killed: what it did may be done twice
                self._apart.close()
                self._apart = None
        return self._write(message)  # better than not at all: it matters only to who is killed just then


def _settle(future: Future[None], write: Callable[[Sequence[bytes]], None], message: Sequence[bytes]) -> None:
    try:
        write(message)
    except OSError as e:
        future.set_exception(e)
    else:
        future.set_result(None)


class _Apart:
    """The process that writes. Raises OSError where there is none to be had."""

    def __init__(self, fd: int, lifeline: int) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as failed:
            failed.callback(self._channel.close)
            with theirs, open(f"/proc/self/fd/{lifeline}", "rb", buffering=0) as other_end:
                given = [fd, theirs.fileno(), other_end.fileno()]
                command = [sys.executable, "-I", "-S", str(_SCRIPT), *map(str, given)]
                # A group of its own: Ctrl-C is for the keeper.
                self._process = subprocess.Popen(command, pass_fds=given, stdin=subprocess.DEVNULL, process_group=0)
            failed.pop_all()

    def write(self, message: Sequence[bytes]) -> None:
        """Raises OSError as the kernel answered, ConnectionError where the process has ended."""
        self._channel.sendmsg(message)
        answer = self._channel.recv(4)
        if not answer:
            raise ConnectionResetError(errno.ECONNRESET, "the notifying process has ended")
        if error := int.from_bytes(answer, "little"):
            raise OSError(error, os.strerror(error))

    def close(self) -> None:
        self._channel.close()
        self._process.wait()
