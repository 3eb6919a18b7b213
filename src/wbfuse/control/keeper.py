"""The keeper: holds what a mount must not lose with its worker, and starts the next worker when one dies.

    keeper --spec, kept descriptors--> worker
    worker --keep NAME + descriptor, ready, failed--> keeper

It knows nothing of file systems: descriptors by name (the connection, the log, the journal, the control socket) are
handed to each worker as they were given by the first. While no worker lives the kernel holds all requests, so
applications notice a pause and no error.

    starting --ready--> serving --end of worker--> [exit 0 or LOST] over
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

LOST = 1
"""Exit status of a worker that was told to end and gave up bytes."""
FAILED = 2
RESTART, NOT_YET = 75, 76
"""Exit status of a worker that asks for a new one: at once; in a while, because the store is not there."""
GIVEN_UP = 70
_LOOK_AGAIN = 1.0
WITHIN = 60.0
"""Seconds in which deaths are counted."""
WORKER: tuple[str, ...] = ("-m", "wbfuse.control.worker")
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
        self._served = False
        self._listening = False
        """The worker of this life knows what to do with signals."""
        self._signals: list[int] = []
        """All that came: a worker that follows is told as well."""

    def run(self) -> int:
        """Serve until the mount has ended. Answers the exit status of the last worker, or GIVEN_UP."""
        for number in _SIGNALS:
            signal.signal(number, self._forward)
        deaths: deque[float] = deque(maxlen=self._most_deaths)
        while True:
            status = self._one_life(len(deaths))
            if status in (0, LOST) or not self._served:
                return status
            if status in (RESTART, NOT_YET):
                time.sleep(_LOOK_AGAIN if status == NOT_YET else 0)
                continue
            now = time.monotonic()
            deaths.append(now)
            if len(deaths) == self._most_deaths and now - deaths[0] < WITHIN:
                self._give_up(len(deaths))
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
            names = list(self._kept)
            first = json.dumps({"spec": self._spec, "kept": names, "deaths": deaths}).encode()
            with contextlib.suppress(OSError):  # it is dead already: its status will tell
                socket.send_fds(ours, [first], [self._kept[n] for n in names])
            said = self._listen(ours)
            self._listening = False
            status = self._worker.wait()
            self._worker = None
        if not self._served:
            self._report(said or f"the server died at its start ({_why(status)})")
        return status

    def _give_up(self, deaths: int) -> None:
        """End the mount; what the log has is set aside first."""
        source, mountpoint = self._spec["name"], self._spec["mountpoint"]
        log.error("%s: the worker died %d times within a minute; giving up", mountpoint, deaths)
        try:
            images: dict[str, int] = {name: fd for name, fd in self._kept.items() if name in ("log", "journal")}
            if "log" in images:
                name = quarantine.keep_log(quarantine.default_directory(), source, images)
                log.error("what was not written is kept; see: wbfuse recover %s", name)
        except OSError:
            log.exception("what was not written could not be set aside, and is lost")
        try:
            unmount(mountpoint, lazy=True)
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

    def _ready(self) -> None:
        first, self._served = not self._served, True
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._listening = True
        for number in self._signals:
            self._tell(number)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if first:
            self._report(None)

    def _forward(self, number: int, _frame: object) -> None:
        self._signals.append(number)
        if self._listening or not self._served:  # before the mount is there it simply ends
            self._tell(number)

    def _tell(self, number: int) -> None:
        if self._worker is not None:
            self._worker.send_signal(number)


def _why(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit {status}"


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
