"""The keeper: holds what a mount must not lose with its worker, and starts the next worker when one dies.

    keeper --spec, kept descriptors--> worker
    worker --keep NAME + descriptor, ready, failed, over--> keeper

It knows nothing of file systems: descriptors by name (the connection, the log, the journal, the control socket) are
handed to each worker as they were given by the first. While no worker lives the kernel holds all requests, so
applications notice a pause and no error.

    starting --ready--> serving --end of worker--> [it said "over"] over
        | failed: over            | any other end: starting again, after a pause; too often: over
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from wbfuse.session.mount import MountError, unmount
from wbfuse.writeback import quarantine

log = logging.getLogger(__name__)

LEFT = 1
"""Exit status of a mount that was told to end before everything was in the store."""
FAILED = 2
RESTART, NOT_YET = 75, 76
"""Exit status of a worker that asks for a new one: at once; in a while, because the store is not there."""
GIVEN_UP = 70
_LOOK_AGAIN = 1.0
WITHIN = 60.0
"""Seconds in which deaths are counted."""
WORKER: tuple[str, ...] = ("-m", "wbfuse.control.worker")
STOP = b"stop"
"""What a worker is told for each signal to the keeper."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PAUSES = (0.0, 0.0, 0.1, 0.2, 0.5, 1.0)
"""Seconds before the next worker starts, by deaths in the last minute."""
_LONGEST = 1 << 16


class Keeper:
    """`spec` is handed to each worker; `report` is told once: None when the mount answers, else why it will not.

    After `most_deaths` workers within a minute it gives up.
    """

    def __init__(self, spec: dict[str, Any], report: Callable[[str | None], None], most_deaths: int = 10) -> None:
        self._spec = spec
        self._most_deaths = most_deaths
        self._report = report
        self._kept: dict[str, int] = {}
        self._worker: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._served = False
        self._listening = False
        """The worker of this life can be told to stop."""
        self._over: int | None = None
        """What the worker said that its exit status will be, when the mount had ended."""
        self._stops = 0
        """Signals that came: a worker that follows is told as well."""
        self._last = 0

    def run(self) -> int:
        """Serve until the mount has ended. Answers the exit status of the last worker, or GIVEN_UP."""
        for number in _SIGNALS:
            signal.signal(number, self._forward)
        deaths: deque[float] = deque(maxlen=self._most_deaths)
        while True:
            try:
                status = self._one_life(len(deaths))
            except OSError as e:  # no memory, no descriptor, no interpreter: there may be some in a moment
                log.error("no worker can be started: %s", e)
                status = GIVEN_UP
            if self._over is not None:
                return self._over
            if not self._served:
                if "fuse" in self._kept:
                    self._unmount()
                return status
            if self._stops > 1 and not self._listening:
                self._give_up("told to end before a worker could serve it again")
                return GIVEN_UP
            self._listening = False
            if status in (RESTART, NOT_YET):
                time.sleep(_LOOK_AGAIN if status == NOT_YET else 0)
                continue
            now = time.monotonic()
            deaths.append(now)
            if len(deaths) == self._most_deaths and now - deaths[0] < WITHIN:
                self._give_up(f"its worker died {len(deaths)} times within a minute")
                return GIVEN_UP
            while deaths and now - deaths[0] > WITHIN:
                deaths.popleft()
            log.error("the worker died (%s); starting another", _why(status))
            time.sleep(_PAUSES[min(len(deaths) - 1, len(_PAUSES) - 1)])

    def _one_life(self, deaths: int) -> int:
        """Start a worker and wait for its end. Answers its exit status, negative for a signal."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                command = [sys.executable, "-P", *WORKER, str(theirs.fileno())]
                # A group of its own: Ctrl-C is for the keeper, which hands it on, once.
                self._worker = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0
                )
            self._channel = ours
            names = list(self._kept)
            first = json.dumps({"spec": self._spec, "kept": names, "deaths": deaths}).encode()
            with contextlib.suppress(OSError):  # it is dead already: its status will tell
                socket.send_fds(ours, [first], [self._kept[n] for n in names])
            try:
                said = self._listen(ours)
            except OSError:
                self._worker.kill()  # there must never be two
                raise
            finally:
                self._channel = None
                status = self._worker.wait()
                self._worker = None
        if not self._served:
            self._report(said or f"the server died at its start ({_why(status)})")
        return status

    def _give_up(self, why: str) -> None:
        """End the mount; what the log has is set aside first."""
        source = self._spec["name"]
        log.error("%s: %s; giving up", self._spec["mountpoint"], why)
        images: dict[str, int] = {name: fd for name, fd in self._kept.items() if name in ("log", "journal")}
        while "log" in images:
            try:
                name = quarantine.keep_log(quarantine.default_directory(), source, images)
            except OSError as e:
                log.error(
                    "what was not written cannot be set aside: %s; make room and send SIGHUP, or SIGTERM to lose it", e
                )
                signal.pause()
                if self._last != signal.SIGHUP:
                    break
            else:
                log.error("what was not written is kept; see: wbfuse recover %s", name)
                break
        self._unmount()

    def _unmount(self) -> None:
        try:
            unmount(self._spec["mountpoint"], lazy=True, dead=True)
        except MountError as e:
            log.warning("%s", e)

    def _listen(self, channel: socket.socket) -> str:
        """Take what the worker gives until it ends. Answers why it failed, if it said so."""
        failed = ""
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(channel, _LONGEST, 1)
            except ConnectionResetError:
                return failed
            if not message and not fds:
                return failed
            said = json.loads(message)
            if "keep" in said:
                self._kept[said["keep"]] = fds[0]
            elif "ready" in said:
                self._ready()
            elif "failed" in said:
                failed = said["failed"]
            elif "over" in said:
                self._over = said["over"]

    def _ready(self) -> None:
        first, self._served = not self._served, True
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._listening = True
        for _ in range(self._stops):
            self._tell()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if first:
            self._report(None)

    def _forward(self, number: int, _frame: object) -> None:
        """Workers ignore signals, which may go to all processes of a service at once: they are told, once for each."""
        self._stops += 1
        self._last = number
        if self._listening:
            self._tell()
        elif self._worker is not None and (not self._served or self._stops > 1):
            self._worker.kill()  # it cannot hear, or nothing is mounted yet

    def _tell(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):  # it has just died: the next one is told
                self._channel.send(STOP)


def _why(status: int) -> str:
    if status >= 0:
        return f"exit {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def fds_of(channel: socket.socket) -> tuple[dict[str, Any], dict[str, int]]:
    """The worker's side of the first message: what it says, and the kept descriptors by name."""
    message, fds, _, _ = socket.recv_fds(channel, _LONGEST, 16)
    said = json.loads(message)
    for fd in fds:
        os.set_inheritable(fd, False)
    return said, dict(zip(said["kept"], fds, strict=True))


def keep(channel: socket.socket, name: str, fd: int) -> None:
    """The worker's side: have `fd` kept for the next worker."""
    socket.send_fds(channel, [json.dumps({"keep": name}).encode()], [fd])
