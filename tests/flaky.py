"""A proxy before an S3 server that misbehaves as it is told: no answer, half an answer, an error, late."""

from __future__ import annotations

import contextlib
import random
import socket
import threading

_REVOKED = b"<Error><Code>AccessDenied</Code><Message>revoked</Message></Error>"
ANSWERS = {
    "busy": b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "forbidden": b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(_REVOKED)
    + _REVOKED,
}


class FlakyProxy:
    """Listens on a port of its own. `faults`: what may happen to a connection, and with which chance."""

    def __init__(self, endpoint: str, seed: int) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._target = host, int(port)
        self._rng = random.Random(seed)
        self.faults: dict[str, float] = {}
        self.happened: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _fault(self) -> str:
        with self._lock:
            dice = self._rng.random()
            for name, chance in self.faults.items():
                dice -= chance
                if dice < 0:
                    self.happened[name] = self.happened.get(name, 0) + 1
                    return name
        return ""

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            server = socket.create_connection(self._target)
            with server:
                up = threading.Thread(target=self._up, args=(client, server), daemon=True)
                up.start()
                self._down(server, client)
                up.join()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        """Requests. A fault is drawn for each piece that begins one."""
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 18):
                what = self._fault() if data[:4] in (b"PUT ", b"GET ", b"HEAD", b"DELE") else ""
                if what in ANSWERS:
                    client.sendall(ANSWERS[what])
                    break
                if what == "reset":
                    break
                if what == "half":  # the request arrives, and of the answer the beginning
                    server.sendall(data)
                    client.sendall(server.recv(1 << 16)[:40])
                    break
                if what == "late":
                    self._closed.wait(1.0)
                if what == "lost":  # the request arrives whole, and its answer never does
                    server.sendall(data)
                    server.recv(1 << 16)
                    break
                server.sendall(data)
            for end in (client, server):
                end.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _down(server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 18):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)
