"""Is a volume whole? Every row has its pack, every byte (asked for) its checksum, counts are true, names connected.

Repairs put counts right and bring what has lost its name to /lost+found. Nothing that anybody could still want is
removed: rows whose bytes are missing stay, and are told again next time.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, Select, and_, case, func, insert, select, update

from wbfuse.store.contract import ROOT_INO
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.layout import HOLE, MAX_EXTENT, decode_frames, pack_key
from wbfuse.store.volume.names import path_of
from wbfuse.store.volume.objects import Objects
from wbfuse.store.volume.packer import CorruptFrameError, open_frame
from wbfuse.store.volume.schema import LIVE, dentries, extents, inodes, layers, orphans, packs
from wbfuse.store.volume.sessions import take_ids

LOST = b"lost+found"
_SLICE = 1000
_READERS = 8

Progress = Callable[[str, int, int], None]
"""Called with what is being looked at, how many are done, and how many there are."""


@dataclass(slots=True)
class Problem:
    """One thing that is wrong. `repair` puts it right in a transaction; None: nothing can."""

    text: str
    repair: Callable[[Connection], None] | None = None
    lost: bool = False
    """Bytes are missing or wrong."""


def check(database: Database, objects: Objects, compression: str, data: bool, progress: Progress) -> Iterator[Problem]:
    """Problems, one by one. Raises OSError where database or store do not answer."""
    yield from _tree(database, progress)
    yield from _maps(database, progress)
    yield from _counts(database)
    missing = yield from _objects(database, objects, progress)
    if data:
        yield from _data(database, objects, compression, missing, progress)


def _rows(database: Database, query: Callable[[Connection], Any]) -> list[Any]:
    found: list[Any] = database.query(lambda c: list(query(c)))
    return found


def _select(database: Database, query: Select[Any]) -> list[Any]:
    return _rows(database, lambda c: c.execute(query))


# names


def _tree(database: Database, progress: Progress) -> Iterator[Problem]:
    progress("names", 0, 0)
    known = select(inodes.c.ino)
    for e in _rows(database, lambda c: c.execute(select(dentries).where(dentries.c.ino.not_in(known)))):
        yield Problem(f"name {bytes(e.name)!r} in directory {e.parent} leads to inode {e.ino}, which is missing",
                      partial(_unname, e=e))  # fmt: skip
    links = select(dentries.c.ino, func.count().label("n")).group_by(dentries.c.ino).subquery()
    below = (
        select(dentries.c.parent, func.count().label("n"))
        .where(dentries.c.type == stat.S_IFDIR >> 12)
        .group_by(dentries.c.parent)
        .subquery()
    )
    named = func.coalesce(links.c.n, 0)
    is_directory = inodes.c.mode.op("&")(stat.S_IFMT(0o170000)) == stat.S_IFDIR
    wanted = case((is_directory, 2 + func.coalesce(below.c.n, 0)), else_=named)
    joined = (
        select(
            inodes.c.ino, inodes.c.nlink, inodes.c.mode, inodes.c.parent, named.label("named"), wanted.label("wanted")
        )
        .outerjoin(links, links.c.ino == inodes.c.ino)
        .outerjoin(below, below.c.parent == inodes.c.ino)
        .where((inodes.c.nlink != wanted) | (named == 0))
    )
    waiting = set(_rows(database, lambda c: c.execute(select(orphans.c.ino)).scalars()))
    for r in _select(database, joined):
        if r.ino != ROOT_INO and r.named == 0:
            if r.nlink == 0 and r.ino in waiting:
                continue  # open somewhere, or about to be collected
            yield Problem(f"inode {r.ino} has no name", partial(_to_lost, row=r))
        elif r.nlink != r.wanted:
            yield Problem(f"inode {r.ino} counts {r.nlink} links and has {r.wanted}",
                          partial(_set_links, ino=r.ino, links=r.wanted))  # fmt: skip
    yield from _unconnected(database)


def _unname(c: Connection, e: Any) -> None:
    c.execute(dentries.delete().where(dentries.c.parent == e.parent, dentries.c.name == e.name))


def _set_links(c: Connection, ino: int, links: int) -> None:
    c.execute(update(inodes).where(inodes.c.ino == ino).values(nlink=links, version=inodes.c.version + 1))


def _unconnected(database: Database) -> Iterator[Problem]:
    """Directories from which no way leads up to the root: a ring."""
    rows = _select(database, select(dentries.c.parent, dentries.c.ino).where(dentries.c.type == stat.S_IFDIR >> 12))
    children: dict[int, list[int]] = {}
    for parent, ino in rows:
        children.setdefault(parent, []).append(ino)
    reached, queue = {ROOT_INO}, [ROOT_INO]
    while queue:
        for ino in children.get(queue.pop(), ()):
            if ino not in reached:
                reached.add(ino)
                queue.append(ino)
    for parent, ino in rows:
        if parent not in reached:
            yield Problem(f"directory {ino} hangs in a ring below {parent}, out of reach",
                          partial(_cut_ring, parent=parent, ino=ino))  # fmt: skip


def _cut_ring(c: Connection, parent: int, ino: int) -> None:
    c.execute(dentries.delete().where(dentries.c.parent == parent, dentries.c.ino == ino))
    row = c.execute(select(inodes).where(inodes.c.ino == ino)).first()
    if row is not None:
        _to_lost(c, row)


def _to_lost(c: Connection, row: Any) -> None:
    """Give an inode a name in /lost+found."""
    now = time.time_ns()
    home = c.execute(
        select(dentries.c.ino).where(dentries.c.parent == ROOT_INO, dentries.c.name == LOST)
    ).scalar_one_or_none()
    if home is None:
        home = take_ids(c, 2)
        c.execute(
            insert(inodes).values(
                ino=home, version=1, mode=stat.S_IFDIR | 0o700, uid=0, gid=0, nlink=2, rdev=0, size=0, bytes=0,
                atime_ns=now, mtime_ns=now, ctime_ns=now, layer=0, parent=ROOT_INO,
            )
        )  # fmt: skip
        c.execute(
            insert(dentries).values(parent=ROOT_INO, name=LOST, ino=home, type=stat.S_IFDIR >> 12, cookie=home + 1)
        )
        root = c.execute(select(inodes.c.nlink).where(inodes.c.ino == ROOT_INO)).scalar_one()
        _set_links(c, ROOT_INO, root + 1)
    directory = stat.S_ISDIR(row.mode)
    cookie = take_ids(c, 1)
    c.execute(
        insert(dentries).values(parent=home, name=b"#%d" % row.ino, ino=row.ino, type=row.mode >> 12, cookie=cookie)
    )
    if directory:
        c.execute(update(inodes).where(inodes.c.ino == row.ino).values(parent=home))
        _set_links(c, home, c.execute(select(inodes.c.nlink).where(inodes.c.ino == home)).scalar_one() + 1)
    else:
        _set_links(c, row.ino, 1)


# maps and counts


def _maps(database: Database, progress: Progress) -> Iterator[Problem]:
    progress("maps", 0, 0)
    after = extents.alias()
    overlap = select(extents.c.layer, extents.c.start, after.c.start.label("other")).join(
        after,
        and_(
            after.c.layer == extents.c.layer,
            after.c.start > extents.c.start,
            after.c.start < extents.c.start + extents.c.length,
        ),
    )
    for r in _select(database, overlap):
        yield Problem(f"layer {r.layer}: rows at {r.start} and {r.other} overlap", lost=True)
    wrong = select(extents.c.layer, extents.c.start, extents.c.length).where(
        (extents.c.length <= 0) | (extents.c.length > MAX_EXTENT) | (extents.c.start < 0)
    )
    for r in _select(database, wrong):
        yield Problem(f"layer {r.layer}: the row at {r.start} has {r.length} bytes", lost=True)
    live = select(packs.c.pack).where(packs.c.state == LIVE)
    unknown = select(extents.c.pack, func.count().label("n")).where(extents.c.pack != HOLE, extents.c.pack.not_in(live))
    for r in _select(database, unknown.group_by(extents.c.pack)):
        yield Problem(f"{r.n} rows name pack {pack_key(r.pack)}, which the volume does not have", lost=True)
    known = select(layers.c.layer)
    for column, what in ((inodes.c.layer, "inode"), (layers.c.base, "layer")):
        key = inodes.c.ino if what == "inode" else layers.c.layer
        for r in _select(database, select(key, column).where(column != 0, column.not_in(known))):
            yield Problem(f"{what} {r[0]} stands on layer {r[1]}, which is missing", lost=True)


def _counts(database: Database) -> Iterator[Problem]:
    used = select(extents.c.pack, func.sum(extents.c.length).label("n")).group_by(extents.c.pack).subquery()
    n = func.coalesce(used.c.n, 0)
    wrong = select(packs.c.pack, packs.c.live, n.label("n")).outerjoin(used, used.c.pack == packs.c.pack)
    for r in _select(database, wrong.where(packs.c.live != n, packs.c.state == LIVE)):
        yield Problem(f"pack {pack_key(r.pack)} counts {r.live} live bytes and has {r.n}",
                      partial(_set_live, pack=r.pack, live=int(r.n)))  # fmt: skip
    of_inodes = select(inodes.c.layer, func.count().label("n")).where(inodes.c.layer != 0).group_by(inodes.c.layer)
    of_layers = select(layers.c.base, func.count().label("n")).where(layers.c.base != 0).group_by(layers.c.base)
    users: dict[int, int] = {}
    for query in (of_inodes, of_layers):
        for layer, count in _select(database, query):
            users[layer] = users.get(layer, 0) + count
    for r in _select(database, select(layers.c.layer, layers.c.users)):
        if r.users != users.get(r.layer, 0):
            yield Problem(f"layer {r.layer} counts {r.users} users and has {users.get(r.layer, 0)}",
                          partial(_set_users, layer=r.layer, users=users.get(r.layer, 0)))  # fmt: skip


def _set_live(c: Connection, pack: int, live: int) -> None:
    c.execute(update(packs).where(packs.c.pack == pack).values(live=live))


def _set_users(c: Connection, layer: int, users: int) -> None:
    c.execute(update(layers).where(layers.c.layer == layer).values(users=users))


# objects and bytes


def _objects(database: Database, objects: Objects, progress: Progress) -> Generator[Problem, None, set[int]]:
    """Every live pack has its object, long enough for what is said to be in it. Answers those that have not."""
    there: dict[int, int] = {}
    for i, (key, size) in enumerate(objects.list("packs")):
        if i % _SLICE == 0:
            progress("objects", i, 0)
        number = int(key.rpartition("/")[2], 16)
        if pack_key(number) == key:
            there[number] = size
    missing: set[int] = set()
    for r in _select(database, select(packs.c.pack, packs.c.live).where(packs.c.state == LIVE)):
        if r.pack not in there and r.live > 0:
            missing.add(r.pack)
            for text in _who_loses(database, r.pack):
                yield Problem(f"pack {pack_key(r.pack)} is not in the store: {text}", lost=True)
    return missing


def _who_loses(database: Database, pack: int) -> list[str]:
    """The ranges of files that a pack holds, for people."""
    joined = (
        select(inodes.c.ino, extents.c.layer, func.min(extents.c.start), func.max(extents.c.start + extents.c.length),
               func.sum(extents.c.length))
        .outerjoin(inodes, inodes.c.layer == extents.c.layer)
        .where(extents.c.pack == pack)
        .group_by(inodes.c.ino, extents.c.layer)
    )  # fmt: skip
    out = []
    for ino, layer, low, high, n in _select(database, joined):
        who = f"inode {ino} ({path_of(database, ino)})" if ino is not None else f"frozen layer {layer}"
        out.append(f"{n} bytes of {who} between {low} and {high}")
    return out


def _data(
    database: Database, objects: Objects, compression: str, missing: set[int], progress: Progress
) -> Iterator[Problem]:
    """Read every frame that a row names."""
    total = int(database.query(lambda c: c.execute(select(func.coalesce(func.sum(packs.c.live), 0))).scalar_one()))
    numbers = _rows(database, lambda c: c.execute(select(packs.c.pack).where(packs.c.live > 0)).scalars())
    done = 0

    def verify(number: int) -> tuple[int, list[str]]:
        rows = _select(database, select(extents).where(extents.c.pack == number).order_by(extents.c.offset))
        wrong = []
        for r in rows:
            at = r.offset
            frames = list(decode_frames(bytes(r.frames)))
            try:
                stored = objects.get(pack_key(number), at, sum(f.stored for f in frames))
                for frame in frames:
                    open_frame(stored[at - r.offset : at - r.offset + frame.stored], frame, compression)
                    at += frame.stored
            except (OSError, CorruptFrameError) as e:
                wrong.append(f"layer {r.layer}, {r.length} bytes at {r.start}, pack {pack_key(number)} at {at}: {e}")
        return sum(r.length for r in rows), wrong

    with ThreadPoolExecutor(_READERS) as pool:
        for size, wrong in pool.map(verify, [n for n in numbers if n not in missing]):
            done += size
            progress("bytes", done, total)
            for text in wrong:
                yield Problem(text, lost=True)
