"""Garbage: packs in which nothing is live, what sessions that are over have left, objects that nobody knows.

Rules, each for a way to lose data otherwise:
- A pack is first doomed, in a transaction that sees that no row names it; then its object goes; then its row. A commit
  or copy that wants it meanwhile does not find it live, and stages again.
- Pending packs are taken only of sessions that are over: such a session can commit nothing any more.
- A pack that a retained dump names stays. `dead_at` is the newest dump when it was first seen dead: dumps up to that
  one may name it, later ones cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, func, select, update

from wbfuse.store.volume.database import Database
from wbfuse.store.volume.layout import pack_of
from wbfuse.store.volume.objects import Objects
from wbfuse.store.volume.reaper import delete_packs, leftovers, remove_inodes, remove_rows
from wbfuse.store.volume.schema import DOOMED, LIVE, counters, dumps, extents, packs

_SLICE = 128

Progress = Callable[[str, int], None]
"""Called with what is being done, and how many packs or objects are done."""


@dataclass(slots=True)
class Collected:
    packs: int = 0
    objects: int = 0
    """Objects that no row knew."""
    kept_for_dumps: int = 0


def mark_dead(c: Connection) -> None:
    """Note of packs in which nothing is live when that was first seen."""
    newest = select(counters.c.value).where(counters.c.name == "dump").scalar_subquery()
    named = select(extents.c.pack).where(extents.c.pack == packs.c.pack).exists()
    dead = (packs.c.state == LIVE) & (packs.c.live <= 0) & ~named
    c.execute(update(packs).where(dead, packs.c.dead_at.is_(None)).values(dead_at=newest))
    c.execute(update(packs).where(packs.c.live > 0, packs.c.dead_at.is_not(None)).values(dead_at=None))


def doom(c: Connection, limit: int) -> list[int]:
    """Packs that nobody may name again from here on. What live counts claim is not believed without looking."""
    oldest = c.execute(select(func.min(dumps.c.number))).scalar_one_or_none()
    named = select(extents.c.pack).where(extents.c.pack == packs.c.pack).exists()
    dead = select(packs.c.pack).where(packs.c.state == LIVE, packs.c.live <= 0, packs.c.dead_at.is_not(None), ~named)
    if oldest is not None:
        dead = dead.where(packs.c.dead_at < oldest)
    found = list(c.execute(dead.order_by(packs.c.pack).limit(limit).with_for_update()).scalars())
    if found:
        still = (packs.c.pack.in_(found)) & (packs.c.live <= 0)
        c.execute(update(packs).where(still).values(state=DOOMED))
    return found


def collect(
    database: Database, objects: Objects, progress: Progress = lambda _what, _done: None, scan: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Collected:  # fmt: skip
    """One whole collection. With `scan` the bucket is listed as well, for objects without a row. Raises OSError.

    It ends between slices where `stop` says so.
    """
    objects.check_owner()
    out = Collected()
    while not stop():
        inos, layers, lost = database.query(lambda c: leftovers(c, _SLICE))
        for i in range(0, len(inos), _SLICE):
            layers += database.transact(lambda c, some=inos[i : i + _SLICE]: remove_inodes(c, some))  # type: ignore[misc]
        while layers and not stop():
            gone, more = database.transact(lambda c, layer=layers[-1]: remove_rows(c, layer))  # type: ignore[misc]
            if gone:
                layers.pop()
                layers += more
        out.packs += delete_packs(database, objects, lost) if lost else 0
        progress("left by sessions that are over", out.packs)
        if not inos and not layers and not lost:
            break
    database.transact(mark_dead)
    while not stop() and (doomed := database.transact(lambda c: doom(c, _SLICE))):
        out.packs += delete_packs(database, objects, doomed)
        progress("dead packs", out.packs)
    waiting = select(func.count()).select_from(packs).where(packs.c.state == LIVE, packs.c.dead_at.is_not(None))
    out.kept_for_dumps = database.query(lambda c: c.execute(waiting).scalar_one())
    if scan:
        _scan(database, objects, out, progress)
    return out


def _scan(database: Database, objects: Objects, out: Collected, progress: Progress) -> None:
    """Delete objects that no row knows: a row is there before its object, so none is on its way.

    Not while dumps are kept that are newer than the one this database was loaded from: what they name it cannot know.
    """
    theirs = select(func.count()).select_from(dumps).where(dumps.c.foreign)
    if database.query(lambda c: c.execute(theirs).scalar_one()):
        return
    batch: dict[int, str] = {}

    def settle() -> None:
        known = database.query(lambda c: set(c.execute(select(packs.c.pack).where(packs.c.pack.in_(batch))).scalars()))
        for number, key in batch.items():
            if number not in known:
                objects.delete(key)
                out.objects += 1
        batch.clear()

    for seen, (key, _) in enumerate(objects.list("packs"), 1):
        number = pack_of(key)
        if number is not None:
            batch[number] = key
        if len(batch) >= _SLICE:
            settle()
            progress("objects looked at", seen)
    settle()
