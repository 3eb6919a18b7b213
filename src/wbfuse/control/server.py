"""The control socket's serving end: one JSON object a line, asked and answered. Only the owner and root get in.

A connection asks {"command": NAME, ...} and gets any number of progress lines and one line that has "done" or
"error". Each connection has a thread of its own; there are few.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

from wbfuse.session.mount import MountError

log = logging.getLogger(__name__)

Message = dict[str, Any]
Command = Callable[[Message], Iterator[Message]]
_LONGEST = 65536


class ControlServer:
    """Listens on `path` until `close`; with `fd` (owned from now on), on a socket that listens there already."""

    def __init__(self, path: str, commands: dict[str, Command], fd: int | None = None) -> None:
        self._commands = commands
        self.path = path
        self._socket = self._listen(path) if fd is None else socket.socket(fileno=fd)
        self._lock = threading.Lock()
        self._busy: set[threading.Thread] = set()
        self._thread = threading.Thread(target=self._accept, name="control", daemon=True)
        self._thread.start()

    @staticmethod
    def _listen(path: str) -> socket.socket:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # of a mount that died: ours has just been made on the same directory
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listening.bind(path)
        finally:
            os.umask(mask)
        listening.listen(16)
        return listening

    @property
    def fd(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening; running commands may finish their answer."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        with self._lock:
            busy = list(self._busy)
        for thread in busy:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            thread = threading.Thread(target=self._serve, args=(connection,), name="control-client", daemon=True)
            with self._lock:
                self._busy.add(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(30)
                raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                _, uid, _ = struct.unpack("3i", raw)
                if uid not in (0, os.geteuid()):
                    return
                with connection.makefile("rwb") as stream:
                    self._answer(stream)
        except OSError as e:
            log.info("a control client went away: %s", e)
        finally:
            with self._lock:
                self._busy.discard(threading.current_thread())

    def _answer(self, stream: Any) -> None:
        for message in self._replies(stream.readline(_LONGEST)):
            stream.write(json.dumps(message).encode() + b"\n")
            stream.flush()

    def _replies(self, line: bytes) -> Iterator[Message]:
        try:
            request = json.loads(line)
            command = self._commands[request["command"]]
        except (ValueError, KeyError, TypeError):
            yield {"error": "not understood"}
            return
        try:
            yield from command(request)
        except (OSError, MountError) as e:
            log.warning("%s: %s", request["command"], e)
            yield {"error": str(e)}
        except Exception as e:  # a defect: the client must get an answer all the same, and the server must live on
            log.exception("control command %r failed", request)
            yield {"error": str(e)}
