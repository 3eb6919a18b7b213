"""Removing what nobody can reach any more: inodes without names, the rows of their maps, packs that never were live.

One thread of the mount, so that unlink of a huge file answers at once. Everything goes in slices, each a transaction,
and may stop anywhere: what is left is found again by `leftovers`, which gc and the next mount ask.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from queue import Empty, SimpleQueue

from sqlalchemy import Connection, delete, func, select, update

from wbfuse.store.volume.database import Database
from wbfuse.store.volume.layout import HOLE, pack_key
from wbfuse.store.volume.objects import Objects
from wbfuse.store.volume.schema import DOOMED, PENDING, extents, inodes, layers, orphans, packs, sessions, xattrs

log = logging.getLogger(__name__)

_INODES = 256
_GATHER, _RETRY = 0.3, 5.0
_ROWS = 4096
_PACKS = 4096
"""So many in one statement."""


def remove_inodes(c: Connection, inos: list[int], session: int = 0) -> list[int]:
    """Forget orphans of `session`, or of sessions that are over. Answers the layers that nobody stands on now."""
    mine = (orphans.c.session == session) | orphans.c.session.not_in(select(sessions.c.session))
    theirs = select(orphans.c.ino).where(orphans.c.ino.in_(inos), mine)
    gone = c.execute(
        delete(inodes).where(inodes.c.ino.in_(theirs), inodes.c.nlink == 0).returning(inodes.c.ino, inodes.c.layer)
    ).all()
    nameless = select(inodes.c.ino).where(inodes.c.ino == orphans.c.ino, inodes.c.nlink == 0).exists()
    c.execute(delete(orphans).where(orphans.c.ino.in_(inos), mine, ~nameless))  # also of what never was an orphan
    c.execute(delete(xattrs).where(xattrs.c.ino.in_([g.ino for g in gone])))
    return leave_layers(c, [g.layer for g in gone if g.layer])


def leave_layers(c: Connection, left: list[int]) -> list[int]:
    """Each of these has one user less. Answers those that have none now."""
    if not left:
        return []
    c.execute(update(layers).where(layers.c.layer.in_(left)).values(users=layers.c.users - 1))
    return list(c.execute(select(layers.c.layer).where(layers.c.layer.in_(left), layers.c.users <= 0)).scalars())


def remove_rows(c: Connection, layer: int) -> tuple[bool, list[int]]:
    """Remove a slice of the rows of a dead layer. Answers whether it is gone, and layers that died with it."""
    # Somebody else may be at it (gc, another host): what two of them count must not be taken off twice.
    if (
        c.execute(select(layers.c.layer).where(layers.c.layer == layer, layers.c.users <= 0).with_for_update()).first()
        is None
    ):
        return True, []
    rows = c.execute(select(extents.c.start).where(extents.c.layer == layer).order_by(extents.c.start).limit(_ROWS))
    starts = list(rows.scalars())
    if starts:
        inside = (extents.c.layer == layer) & (extents.c.start <= starts[-1])
        use = select(extents.c.pack, func.sum(extents.c.length)).where(inside).group_by(extents.c.pack)
        changes = [(p, int(n)) for p, n in c.execute(use) if p != HOLE]
        c.execute(delete(extents).where(inside))
        for p, n in sorted(changes):
            c.execute(update(packs).where(packs.c.pack == p).values(live=packs.c.live - n))
    if len(starts) == _ROWS:
        return False, []
    row = c.execute(delete(layers).where(layers.c.layer == layer, layers.c.users <= 0).returning(layers.c.base)).first()
    return True, leave_layers(c, [row.base]) if row is not None and row.base else []


def leftovers(c: Connection, limit: int) -> tuple[list[int], list[int], list[int]]:
    """What sessions that are over have left: orphans, dead layers, pending packs; at most so many of each."""
    alive = select(sessions.c.session)
    some = select(orphans.c.ino).where(orphans.c.session.not_in(alive)).limit(limit)
    dead = select(layers.c.layer).where(layers.c.users <= 0).limit(limit)
    pending = (packs.c.state == PENDING) & packs.c.session.not_in(alive)
    lost = select(packs.c.pack).where(pending | (packs.c.state == DOOMED)).limit(limit)
    return list(c.execute(some).scalars()), list(c.execute(dead).scalars()), list(c.execute(lost).scalars())


def delete_packs(database: Database, objects: Objects, numbers: list[int]) -> int:
    """Delete packs that are pending or doomed: first nobody may take them any more, then the object, then the row.

    That first transaction is durable, and so is what emptied them: a power cut cannot bring back rows that name them.
    An object that cannot be deleted keeps its row, and is raised once the others are gone. Answers how many went.
    """
    objects.check_owner()
    return sum(_delete_some(database, objects, numbers[i : i + _PACKS]) for i in range(0, len(numbers), _PACKS))


def _delete_some(database: Database, objects: Objects, numbers: list[int]) -> int:
    there = (packs.c.pack.in_(numbers)) & packs.c.state.in_((PENDING, DOOMED))
    doom = update(packs).where(there).values(state=DOOMED).returning(packs.c.pack)
    doomed = database.transact(lambda c: list(c.execute(doom).scalars()), durable=True)
    gone, error = [], None
    for number in doomed:
        try:
            objects.delete(pack_key(number))
        except OSError as e:
            error = e
        else:
            gone.append(number)
    database.transact(lambda c: c.execute(delete(packs).where(packs.c.pack.in_(gone), packs.c.state == DOOMED)))
    if error is not None:
        raise error
    return len(gone)


class Reaper:
    """`put` inodes and packs; a thread removes them. What fails is left for gc."""

    def __init__(self, database: Database, objects: Objects, session: int) -> None:
        self._database = database
        self._session = session
        self._objects = objects
        self._queue: SimpleQueue[tuple[str, list[int]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        self._ended = threading.Event()
        self._thread.start()

    def put_inodes(self, inos: Iterable[int]) -> None:
        self._queue.put(("inodes", list(inos)))

    def put_layers(self, numbers: Iterable[int]) -> None:
        self._queue.put(("layers", list(numbers)))

    def put_packs(self, numbers: Iterable[int]) -> None:
        self._queue.put(("packs", list(numbers)))

    def close(self) -> None:
        """End after the slice under way."""
        self._ended.set()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None and not self._ended.is_set():
            self._ended.wait(_GATHER)  # many go together, and not between the steps of who removes them
            batch: dict[str, list[int]] = {"inodes": [], "layers": [], "packs": []}
            while item is not None:
                batch[item[0]] += item[1]
                try:
                    item = self._queue.get_nowait() if len(batch["inodes"]) < _INODES else None
                except Empty:
                    break
                if item is None and self._ended.is_set():
                    return
            try:
                self._reap(batch)
            except Exception as e:  # noqa: BLE001 - a store or database that is not there now
                log.warning("cleaning up: %s; trying again", e)
                self._ended.wait(_RETRY)
                for kind, numbers in batch.items():
                    if numbers:
                        self._queue.put((kind, numbers))

    def _reap(self, batch: dict[str, list[int]]) -> None:
        dead = batch["layers"]
        for i in range(0, len(batch["inodes"]), _INODES):
            some = batch["inodes"][i : i + _INODES]
            dead += self._database.transact(lambda c, some=some: remove_inodes(c, some, self._session))  # type: ignore[misc]
        while dead and not self._ended.is_set():
            layer = dead[-1]
            ended, more = self._database.transact(lambda c, layer=layer: remove_rows(c, layer))  # type: ignore[misc]
            if ended:
                dead.pop()
                dead += more
        if batch["packs"]:
            delete_packs(self._database, self._objects, batch["packs"])
