"""Leases: who may write a file of a shared volume. One row a file; the session in it is the epoch: never used twice.

A lease is taken when a file is opened for writing and given back, by a thread of its own, when nobody here has it open
any more. A silent holder is fenced as a whole, never robbed of one file: its session could not tell.

Lock: `_lock` guards the sets here; the transaction that gives a lease back runs under it, so that it is not taken anew
in between.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from sqlalchemy import Connection, delete, insert, select, update

from wbfuse.store.contract import FencedError
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.schema import inodes, leases, orphans, sessions
from wbfuse.store.volume.sessions import Session, fence

log = logging.getLogger(__name__)

_LOOK_AGAIN = 0.2


class Leases:
    """Of a shared mount. `wait`: seconds to wait for a file that another host writes. `died`: told of files that
    another host has removed while they were open here. `held`: whether a file is open
    here; who acquires holds first."""

    def __init__(
        self,
        database: Database,
        session: Session,
        wait: float,
        died: Callable[[int], None],
        held: Callable[[int], bool],
    ) -> None:
        self._database = database
        self._session = session
        self._wait = wait
        self._died = died
        self._held = held
        self.barrier: Callable[[], None] = lambda: None
        """Called before a lease is given back."""
        self._lock = threading.Lock()
        self._mine: set[int] = set()
        self._closed = threading.Event()
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._give_back, name="leases", daemon=True)
        self._thread.start()

    def __contains__(self, ino: int) -> bool:
        return ino in self._mine

    def acquire(self, ino: int) -> bool:
        """Take the lease; whether it was not here before. EBUSY where a living host has it."""
        with self._lock:
            if ino in self._mine:
                return False
        until = time.monotonic() + self._wait
        while (holder := self._take(ino)) != 0:
            if self._session.silent(holder):
                log.warning("session %d is silent: fenced, its lease on node %d taken over", holder, ino)
                self._database.transact(lambda c, holder=holder: fence(c, holder), durable=True)  # type: ignore[misc]
            elif time.monotonic() >= until or self._closed.wait(_LOOK_AGAIN):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        with self._lock:
            self._mine.add(ino)
        return True

    def _take(self, ino: int) -> int:
        """0 where it is ours now, else the session that has it."""

        def act(c: Connection) -> int:
            self._session.guard(c)
            # Who removes the last name locks the inode as well, so one of us sees the other.
            links = c.execute(select(inodes.c.nlink).where(inodes.c.ino == ino).with_for_update()).scalar_one_or_none()
            mine = select(orphans.c.ino).where(orphans.c.ino == ino, orphans.c.session == self._session.number)
            if links is None or (links == 0 and c.execute(mine).first() is None):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            row = c.execute(select(leases.c.session).where(leases.c.ino == ino).with_for_update()).first()
            if row is None:
                c.execute(insert(leases).values(ino=ino, session=self._session.number))
                return 0
            if row.session == self._session.number:
                return 0
            if c.execute(select(sessions.c.session).where(sessions.c.session == row.session)).first() is None:
                c.execute(update(leases).where(leases.c.ino == ino).values(session=self._session.number))
                return 0
            return int(row.session)

        for last in (False, True):
            try:
                return self._database.transact(act)
            except FileExistsError:  # somebody inserted first
                if last:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY)) from None
        raise AssertionError("unreachable")

    def guard(self, c: Connection, inos: Iterable[int]) -> None:
        """In a transaction that changes bytes of files: lock their leases. Raises FencedError where one is gone."""
        wanted = set(inos)
        mine = (leases.c.ino.in_(wanted)) & (leases.c.session == self._session.number)
        held = set(c.execute(select(leases.c.ino).where(mine).with_for_update(read=True, key_share=True)).scalars())
        if held != wanted:
            raise FencedError(f"the lease on node {min(wanted - held)} was taken by another host")

    def forget_others(self) -> None:
        """Leases of this session that a server before this one took, and this one does not need."""
        mine = leases.c.session == self._session.number
        with self._lock:
            needed = set(self._mine)

            def act(c: Connection) -> None:
                found = set(c.execute(select(leases.c.ino).where(mine)).scalars())
                for ino in found - needed:
                    c.execute(delete(leases).where(mine, leases.c.ino == ino))

            self._database.transact(act)

    def release(self, ino: int) -> None:
        """Nobody here has the file open any more. Does not block."""
        if ino in self._mine:
            self._queue.put(ino)

    def _give_back(self) -> None:
        while (ino := self._queue.get()) is not None:
            with self._lock:
                if ino not in self._mine or self._held(ino):  # who acquires holds first
                    continue
                try:
                    self.barrier()  # what the log on disk has of it must not be replayed over another host's
                    removed = self._database.transact(lambda c, ino=ino: self._leave(c, ino))  # type: ignore[misc]
                except Exception as e:  # noqa: BLE001 - the session's end gives it back
                    log.warning("the lease on node %d could not be given back: %s", ino, e)
                    continue
                self._mine.discard(ino)
            if removed:
                self._died(ino)

    def _leave(self, c: Connection, ino: int) -> bool:
        # Who removes the last name locks the inode, then asks for the holder: one of us sees the other.
        links = c.execute(select(inodes.c.nlink).where(inodes.c.ino == ino).with_for_update()).scalar_one_or_none()
        c.execute(delete(leases).where(leases.c.ino == ino, leases.c.session == self._session.number))
        return links == 0

    def close(self) -> None:
        """What is held is given back with the session."""
        self._closed.set()
        self._queue.put(None)
        self._thread.join()


def holder_of(c: Connection, ino: int) -> int:
    """The living session that may write a file, 0 where none may."""
    alive = sessions.c.session == leases.c.session
    found = select(leases.c.session).join(sessions, alive).where(leases.c.ino == ino)
    return int(c.execute(found).scalar_one_or_none() or 0)
