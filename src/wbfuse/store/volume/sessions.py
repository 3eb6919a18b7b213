"""Who has a volume: the session of this mount, its heartbeat, and the fencing of those that are dead.

Safety does not rest on clocks: every change takes a lock on its session's row and fails where that is gone. Time only
says when it is worth trying to remove somebody else's.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from wbfuse.store.contract import FencedError
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.schema import counters, leases, sessions, settings

log = logging.getLogger(__name__)

IDS_AT_ONCE = 1024
_BEATS = 4
"""Heartbeats in a timeout."""

_GUARD = (
    select(sessions.c.session).where(sessions.c.session == bindparam("s")).with_for_update(read=True, key_share=True)
)


class VolumeBusyError(Exception):
    """Somebody else has the volume; one line for the person who asked."""


def this_process(guardian: int = 0) -> str:
    """Names this process among all that ever ran on any machine: boot id, PID namespace, pid, start time.

    With `guardian`, a pid: that one as well, which starts another in the place of this one when it dies.
    """
    own = f"{_here()}:{os.getpid()}:{_started(os.getpid())}"
    return f"{own} {_here()}:{guardian}:{_started(guardian)}" if guardian else own


def _here() -> str:
    """The set of processes in which a pid means something: this boot, and in it this PID namespace."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        boot = f.read().strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"


def _started(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
        fields = f.read().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(f"process {pid} has ended, and nobody has asked how")
    return fields[19]


def is_here(process: str) -> bool:
    """Whether this process can see whether that one lives."""
    return process.startswith(_here() + ":")


def is_dead(process: str) -> bool:
    """Whether that process, and its guardian, are known to be gone: they could be seen from here, and cannot now."""
    return is_here(process) and all(_is_over(one) for one in process.split(" "))


def _is_over(process: str) -> bool:
    _, _, pid, started = process.split(":")
    try:
        return _started(int(pid)) != started
    except OSError:
        return True


def take_ids(c: Connection, n: int) -> int:
    """The first of `n` numbers that nobody else gets."""
    ids = counters.c.name == "id"
    after = c.execute(update(counters).where(ids).values(value=counters.c.value + n).returning(counters.c.value))
    return int(after.scalar_one()) - n


def fence(c: Connection, session: int) -> None:
    """Nothing that this session still does can be committed from here on."""
    c.execute(delete(sessions).where(sessions.c.session == session))
    c.execute(delete(leases).where(leases.c.session == session))
    c.execute(delete(settings).where(settings.c.name == _note(session)))


def noted(c: Connection) -> dict[int, str]:
    """The notes of logs on disk, by the session that left each and is dead."""
    rows = c.execute(select(settings).where(settings.c.name.startswith("log."))).all()
    alive = {r.session for r in c.execute(select(sessions)).all() if not is_dead(r.process)}
    found = {int(r.name.removeprefix("log.")): str(r.value) for r in rows}
    return {n: note for n, note in found.items() if n not in alive}


def _note(session: int) -> str:
    return f"log.{session}"


class Session:
    """A session of `database`, taken by the constructor: alone, or with others where all are `shared`.

    Raises VolumeBusyError where somebody alive has it. `timeout`: seconds without a beat after which others may take
    this one for dead. `guardian`: pid of who goes on with it when this process dies. `number`: of the session of a
    process that died, to go on with; where it was fenced meanwhile, so is this one. `unwritten`: says how to
    bring in what a log on disk has, given a note of it; empty where there is nothing to bring in from here.
    Lock: `_lock` guards the numbers in stock; a transaction may run under it.
    """

    def __init__(
        self, database: Database, shared: bool, timeout: float, waiting: Callable[[str], None] = lambda _text: None,
        guardian: int = 0, number: int | None = None, unwritten: Callable[[str], str] = lambda _note: "",
    ) -> None:  # fmt: skip
        self._database = database
        self.shared = shared
        self.unwritten = unwritten
        self._process = this_process(guardian)
        self.timeout = timeout
        self.fenced = threading.Event()
        self._lock = threading.Lock()
        self._next = self._end = 0
        self._seen: dict[int, tuple[int, float]] = {}
        """The beat of other sessions, and since when it stands there."""
        self._closed = threading.Event()
        self.number = self._take(waiting) if number is None else self._go_on(number)
        self._thread = threading.Thread(target=self._beat_loop, name="heartbeat", daemon=True)
        self._thread.start()

    # taking

    def _go_on(self, number: int) -> int:
        ours = update(sessions).where(sessions.c.session == number)
        ours = ours.values(process=self._process, beat=sessions.c.beat + 1)
        if self._database.transact(lambda c: c.execute(ours).rowcount, durable=True) == 0:
            log.error("session %d was fenced while nobody served it", number)
            self.fenced.set()
        return number

    def _take(self, waiting: Callable[[str], None]) -> int:
        while True:
            try:
                return self._database.transact(self._enter, durable=True)
            except _InTheWayError as e:
                holder = e
            if is_here(holder.process):  # its beats may be late, a process that can be seen cannot be mistaken
                alive = "" if is_dead(holder.process) else "runs"
            else:
                alive = self._watch(holder, waiting)
            if alive:
                raise VolumeBusyError(
                    f"in use by {holder.host} (process {holder.process.split(' ')[-1].split(':')[2]}"
                    f"{', shared' if holder.shared else ''}); "
                    + ("unmount it there, or mount both with --shared" if not self.shared else "it is not --shared")
                )
            note = self.noted_log(holder.session)
            if note is not None and (how := self.unwritten(note)):
                where = self._database.url.render_as_string()
                raise VolumeBusyError(
                    f"the last mount here may have left data in {how}; or give it up: wbfuse recover --of {where}"
                )
            if note is not None:
                log.warning("session %d of %s has data in a log on disk: %s", holder.session, holder.host, note)
            log.warning("session %d of %s is dead: fenced", holder.session, holder.host)
            self._database.transact(lambda c, n=holder.session: fence(c, n), durable=True)  # type: ignore[misc]

    def _enter(self, c: Connection) -> int:
        c.execute(select(counters).where(counters.c.name == "session").with_for_update())  # one enters at a time
        for row in c.execute(select(sessions)):
            if not (self.shared and row.shared):
                raise _InTheWayError(row)
        number = take_ids(c, 1)
        c.execute(
            insert(sessions).values(
                session=number,
                beat=0,
                shared=self.shared,
                host=socket.gethostname(),
                process=self._process,
                timeout_ms=int(self.timeout * 1000),
            )
        )  # fmt: skip
        return number

    def _watch(self, holder: _InTheWayError, waiting: Callable[[str], None]) -> str:
        """Whether the holder moves within a timeout, as a non-empty string."""
        waiting(f"the volume was in use by {holder.host}; waiting {holder.timeout:.0f} s to see whether it lives")
        until = time.monotonic() + holder.timeout
        beat = select(sessions.c.beat).where(sessions.c.session == holder.session)
        while time.monotonic() < until:
            now = self._database.query(lambda c: c.execute(beat).scalar_one_or_none())
            if now is None:
                return ""
            if now != holder.beat:
                return "moves"
            self._closed.wait(min(0.5, holder.timeout / _BEATS))
        return ""

    # the log on disk

    def note_log(self, note: str | None) -> None:
        """Where this session keeps what the volume has not; who fences it forgets that as well."""

        def act(c: Connection) -> None:
            self.guard(c)
            c.execute(delete(settings).where(settings.c.name == _note(self.number)))
            if note is not None:
                c.execute(insert(settings).values(name=_note(self.number), value=note))

        self._database.transact(act, durable=True)

    def noted_log(self, session: int | None = None) -> str | None:
        """Of this session, or another."""
        found = select(settings.c.value).where(settings.c.name == _note(session or self.number))
        note: str | None = self._database.query(lambda c: c.execute(found).scalar_one_or_none())
        return note

    # being

    def guard(self, c: Connection) -> None:
        """The first statement of every change. Raises EIO where this session was fenced."""
        if c.execute(_GUARD, {"s": self.number}).first() is None:
            self.fenced.set()
            raise FencedError("this mount was fenced: another host has taken the volume over")

    def ids(self, n: int = 1) -> int:
        """The first of `n` numbers that nobody else gets."""
        with self._lock:
            if self._end - self._next < n:
                block = max(n, IDS_AT_ONCE)
                self._next = self._database.transact(lambda c: take_ids(c, block))
                self._end = self._next + block
            first = self._next
            self._next += n
            return first

    def silent(self, session: int) -> bool:
        """Whether another session has not moved for a timeout, or its process is known to be dead."""
        try:
            row = self._database.query(
                lambda c: c.execute(select(sessions).where(sessions.c.session == session)).first()
            )
        except OSError:
            self._blind()
            raise
        if row is None or is_dead(row.process):
            return True
        now = time.monotonic()
        with self._lock:
            since: float
            beat, since = self._seen.get(session, (row.beat, now))
            if beat != row.beat:
                since = now
            self._seen[session] = row.beat, since
        return bool(now - since > row.timeout_ms / 1000)

    def _blind(self) -> None:
        """The database could not be asked, so nobody could be heard: silence counts from here on."""
        with self._lock:
            self._seen.clear()

    def _watch_others(self) -> None:
        others = self._database.query(
            lambda c: list(c.execute(select(sessions.c.session).where(sessions.c.session != self.number)).scalars())
        )
        for session in others:
            self.silent(session)

    def _beat_loop(self) -> None:
        mine = sessions.c.session == self.number
        beat = update(sessions).where(mine).values(beat=sessions.c.beat + 1)
        while not self._closed.wait(self.timeout / _BEATS):
            began = time.monotonic()
            try:
                if self._database.transact(lambda c: c.execute(beat).rowcount) == 0:
                    if not self.fenced.is_set():
                        log.error("this mount was fenced: another host has taken the volume over")
                    self.fenced.set()
                    return
                if time.monotonic() - began > self.timeout / _BEATS:
                    self._blind()  # whoever waited as long as this could not beat either
                if self.shared:
                    self._watch_others()
            except Exception as e:  # noqa: BLE001 - without a heartbeat others would take the mount for dead
                self._blind()
                log.warning("heartbeat: %s", e)

    def give_up(self) -> None:
        """Fence this session: nothing more can be committed here."""
        self.fenced.set()
        self._database.transact(lambda c: fence(c, self.number), durable=True)

    def close(self) -> None:
        """End the session, where it was not fenced before, and no log on disk has what the volume has not."""
        self._closed.set()
        self._thread.join()
        try:
            if self.noted_log() is not None:
                return
            self._database.transact(lambda c: fence(c, self.number), durable=True)
        except OSError as e:
            log.warning("the session could not be ended: %s; the next mount will wait for it", e.strerror)


class _InTheWayError(Exception):
    def __init__(self, row: Any) -> None:
        super().__init__(row.session)
        self.session, self.beat, self.shared, self.host, self.process = (
            row.session, row.beat, row.shared, row.host, row.process
        )  # fmt: skip
        self.timeout = row.timeout_ms / 1000
