"""Is a volume whole? Every row has its pack, every byte (asked for) its checksum, counts are true, names connected.

What the database says is looked at as of one moment. Repairs put counts right and bring what has lost its name to
/lost+found; each looks again, within its transaction, whether it is still needed. Nothing that anybody could still want
is removed: rows whose bytes are missing stay, and are told again next time.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, Double, case, cast, delete, func, insert, select, update

from wbfuse.store.contract import ROOT_INO
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.layout import HOLE, MAX_EXTENT, Frame, decode_frames, pack_key, pack_of
from wbfuse.store.volume.names import path_of
from wbfuse.store.volume.objects import Objects
from wbfuse.store.volume.packer import CorruptFrameError, open_frame
from wbfuse.store.volume.rows import MAX_SIZE, clear, use_packs
from wbfuse.store.volume.schema import LIVE, dentries, extents, inodes, layers, orphans, packs
from wbfuse.store.volume.sessions import take_ids

LOST = b"lost+found"
_SLICE = 1000
_READERS = 8
_DIRECTORY = stat.S_IFDIR >> 12

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
    with database.snapshot() as c:
        found = [*_names(c, progress), *_counts(c), *_maps(c, progress)]
    yield from found
    there = _objects(objects, progress)
    for problem, number in _missing(database, objects, there):
        there.pop(number, None)
        yield problem
    if data:
        yield from _data(database, objects, compression, there, progress)


# names


def _names(c: Connection, progress: Progress) -> Iterator[Problem]:
    progress("names", 0, 0)
    known = select(inodes.c.ino)
    if c.execute(known.where(inodes.c.ino == ROOT_INO)).first() is None:
        yield Problem("the root directory is missing", _make_root)
    for e in c.execute(select(dentries).where(dentries.c.ino.not_in(known))).all():
        yield Problem(f"name {bytes(e.name)!r} in directory {e.parent} leads to inode {e.ino}, which is missing",
                      partial(_unname, e=e))  # fmt: skip
    for e in c.execute(select(dentries).where(dentries.c.parent.not_in(known), dentries.c.ino.in_(known))).all():
        yield Problem(f"inode {e.ino} has the name {bytes(e.name)!r} in directory {e.parent}, which is missing",
                      partial(_unname, e=e))  # fmt: skip
    yield from _kinds(c)
    yield from _links(c)
    yield from _rings(c)


def _kinds(c: Connection) -> Iterator[Problem]:
    """What names say of the inodes that they lead to."""
    kind = inodes.c.mode.op("/")(4096)
    joined = select(dentries.c.parent, dentries.c.name, dentries.c.ino, dentries.c.type, kind.label("kind"))
    joined = joined.join(inodes, inodes.c.ino == dentries.c.ino)
    for r in c.execute(joined.where(dentries.c.type != kind)).all():
        yield Problem(f"name {bytes(r.name)!r} in directory {r.parent} says type {r.type}, inode {r.ino} is {r.kind}",
                      partial(_set_type, parent=r.parent, name=r.name, kind=r.kind))  # fmt: skip
    twins = select(dentries.c.parent, dentries.c.cookie).group_by(dentries.c.parent, dentries.c.cookie)
    for t in c.execute(twins.having(func.count() > 1)).all():
        yield Problem(f"names in directory {t.parent} have the same place {t.cookie} in its order",
                      partial(_new_cookies, parent=t.parent, cookie=t.cookie))  # fmt: skip
    is_directory = kind == _DIRECTORY
    several = select(dentries.c.ino).join(inodes, inodes.c.ino == dentries.c.ino).where(is_directory)
    for ino in c.execute(several.group_by(dentries.c.ino).having(func.count() > 1)).scalars().all():
        yield Problem(f"directory {ino} has several names", partial(_one_name, ino=ino))
    up = select(inodes.c.ino, inodes.c.parent, dentries.c.parent.label("above")).join(
        dentries, dentries.c.ino == inodes.c.ino
    )
    for d in c.execute(up.where(is_directory, inodes.c.parent != dentries.c.parent)).all():
        yield Problem(f"directory {d.ino} says it is in {d.parent}, and is in {d.above}",
                      partial(_set_parent, ino=d.ino))  # fmt: skip


def _links(c: Connection) -> Iterator[Problem]:
    """Link counts, and inodes without a name. Those whose directory is missing have lost theirs."""
    known = select(inodes.c.ino)
    links = (
        select(dentries.c.ino, func.count().label("n"))
        .where(dentries.c.parent.in_(known))
        .group_by(dentries.c.ino)
        .subquery()
    )
    below = (
        select(dentries.c.parent, func.count().label("n"))
        .where(dentries.c.type == _DIRECTORY)
        .group_by(dentries.c.parent)
        .subquery()
    )
    named = func.coalesce(links.c.n, 0)
    wanted = case((_is_directory(), 2 + func.coalesce(below.c.n, 0)), else_=named)
    joined = (
        select(inodes.c.ino, inodes.c.nlink, named.label("named"), wanted.label("wanted"))
        .outerjoin(links, links.c.ino == inodes.c.ino)
        .outerjoin(below, below.c.parent == inodes.c.ino)
        .where((inodes.c.nlink != wanted) | (named == 0))
    )
    waiting = set(c.execute(select(orphans.c.ino)).scalars())
    for r in c.execute(joined).all():
        if r.ino != ROOT_INO and r.named == 0:
            if r.nlink == 0 and r.ino in waiting:
                continue  # open somewhere, or about to be collected
            yield Problem(f"inode {r.ino} has no name", partial(_to_lost, ino=r.ino))
        elif r.nlink != r.wanted:
            yield Problem(f"inode {r.ino} counts {r.nlink} links and has {r.wanted}", partial(_set_links, ino=r.ino))
    named_orphans = select(orphans.c.ino).join(inodes, inodes.c.ino == orphans.c.ino).where(inodes.c.nlink > 0)
    for ino in c.execute(named_orphans).scalars().all():
        yield Problem(f"inode {ino} has a name and waits to be removed", partial(_not_orphan, ino=ino))


def _rings(c: Connection) -> Iterator[Problem]:
    """Rings of directories, out of reach. What hangs below one, or below a directory without a name, comes with it."""
    rows = c.execute(select(dentries.c.parent, dentries.c.ino).where(dentries.c.type == _DIRECTORY)).all()
    above: dict[int, int] = {r.ino: r.parent for r in rows}
    safe = {ROOT_INO}
    for ino in above:
        way: list[int] = []
        at = ino
        while at in above and at not in safe and at not in way:
            way.append(at)
            at = above[at]
        if at in way:
            ring = way[way.index(at) :]
            first = min(ring)
            yield Problem(f"directories {ring} hang in a ring, out of reach", partial(_cut_ring, ino=first))
        safe.update(way)


# repairs of names


def _is_directory() -> Any:
    return inodes.c.mode.op("/")(4096) == _DIRECTORY


def _make_root(c: Connection) -> None:
    if c.execute(select(inodes.c.ino).where(inodes.c.ino == ROOT_INO)).first() is None:
        _make_directory(c, ROOT_INO, ROOT_INO)
        _set_links(c, ROOT_INO)


def _make_directory(c: Connection, ino: int, parent: int) -> None:
    now = time.time_ns()
    c.execute(
        insert(inodes).values(
            ino=ino, version=1, mode=stat.S_IFDIR | 0o700, uid=0, gid=0, nlink=2, rdev=0, size=0, bytes=0,
            atime_ns=now, mtime_ns=now, ctime_ns=now, layer=0, parent=parent,
        )
    )  # fmt: skip


def _unname(c: Connection, e: Any) -> None:
    ends = [c.execute(select(inodes.c.ino).where(inodes.c.ino == i)).first() is None for i in (e.ino, e.parent)]
    if any(ends):
        c.execute(delete(dentries).where(dentries.c.parent == e.parent, dentries.c.name == e.name))


def _set_type(c: Connection, parent: int, name: bytes, kind: int) -> None:
    c.execute(update(dentries).where(dentries.c.parent == parent, dentries.c.name == name).values(type=kind))


def _new_cookies(c: Connection, parent: int, cookie: int) -> None:
    here = (dentries.c.parent == parent) & (dentries.c.cookie == cookie)
    for name in c.execute(select(dentries.c.name).where(here)).scalars().all()[1:]:
        c.execute(update(dentries).where(here, dentries.c.name == name).values(cookie=take_ids(c, 1)))


def _one_name(c: Connection, ino: int) -> None:
    """The name where the directory itself says it is, else any."""
    says = c.execute(select(inodes.c.parent).where(inodes.c.ino == ino)).scalar_one()
    found = c.execute(select(dentries).where(dentries.c.ino == ino)).all()
    keep = next((e for e in found if e.parent == says), found[0] if found else None)
    for e in found:
        if e is not keep:
            c.execute(delete(dentries).where(dentries.c.parent == e.parent, dentries.c.name == e.name))


def _set_parent(c: Connection, ino: int) -> None:
    above = c.execute(select(dentries.c.parent).where(dentries.c.ino == ino)).scalars().all()
    if len(above) == 1:
        c.execute(update(inodes).where(inodes.c.ino == ino).values(parent=above[0], version=inodes.c.version + 1))


def _set_links(c: Connection, ino: int) -> None:
    """As many as there are now."""
    row = c.execute(select(inodes.c.mode).where(inodes.c.ino == ino).with_for_update()).first()
    if row is None:
        return
    if stat.S_ISDIR(row.mode):
        below = select(func.count()).where(dentries.c.parent == ino, dentries.c.type == _DIRECTORY)
        links = 2 + c.execute(below).scalar_one()
    else:
        links = c.execute(select(func.count()).where(dentries.c.ino == ino)).scalar_one()
    c.execute(update(inodes).where(inodes.c.ino == ino).values(nlink=links, version=inodes.c.version + 1))


def _not_orphan(c: Connection, ino: int) -> None:
    if c.execute(select(inodes.c.nlink).where(inodes.c.ino == ino, inodes.c.nlink > 0)).first() is not None:
        c.execute(delete(orphans).where(orphans.c.ino == ino))


def _cut_ring(c: Connection, ino: int) -> None:
    """The ring becomes a tree below /lost+found."""
    seen, at = set[int](), ino
    while at != ROOT_INO and at not in seen:
        seen.add(at)
        at = c.execute(select(dentries.c.parent).where(dentries.c.ino == at)).scalars().first() or ROOT_INO
    if at == ino:
        c.execute(delete(dentries).where(dentries.c.ino == ino))
        _to_lost(c, ino)


def _to_lost(c: Connection, ino: int) -> None:
    """Give an inode without a name one in /lost+found."""
    row = c.execute(select(inodes).where(inodes.c.ino == ino)).first()
    if row is None or c.execute(select(dentries.c.ino).where(dentries.c.ino == ino)).first() is not None:
        return
    home = _lost_and_found(c)
    c.execute(delete(orphans).where(orphans.c.ino == ino))
    entry = {"parent": home, "ino": ino, "type": row.mode >> 12, "cookie": take_ids(c, 1)}
    c.execute(insert(dentries).values(name=_free_name(c, home, b"#%d" % ino), **entry))
    if stat.S_ISDIR(row.mode):
        c.execute(update(inodes).where(inodes.c.ino == ino).values(parent=home))
        _set_links(c, home)
    _set_links(c, ino)


def _free_name(c: Connection, parent: int, wanted: bytes) -> bytes:
    name, n = wanted, 0
    while c.execute(select(dentries.c.ino).where(dentries.c.parent == parent, dentries.c.name == name)).first():
        n += 1
        name = b"%s.%d" % (wanted, n)
    return name


def _lost_and_found(c: Connection) -> int:
    """The directory, made where it is missing; another name where something else has this one."""
    name, n = LOST, 0
    while True:
        under = select(inodes).join(dentries, dentries.c.ino == inodes.c.ino)
        row = c.execute(under.where(dentries.c.parent == ROOT_INO, dentries.c.name == name)).first()
        if row is None:
            break
        if stat.S_ISDIR(row.mode):
            return int(row.ino)
        n += 1
        name = b"%s.%d" % (LOST, n)
    home = take_ids(c, 2)
    _make_directory(c, home, ROOT_INO)
    c.execute(insert(dentries).values(parent=ROOT_INO, name=name, ino=home, type=_DIRECTORY, cookie=home + 1))
    _set_links(c, ROOT_INO)
    return home


# maps and counts


def _maps(c: Connection, progress: Progress) -> Iterator[Problem]:
    live = {r.pack: r.size for r in c.execute(select(packs.c.pack, packs.c.size).where(packs.c.state == LIVE))}
    known = {r.layer: r for r in c.execute(select(layers))}
    unknown: dict[int, int] = {}
    homeless: dict[int, int] = {}
    total = int(c.execute(select(func.count()).select_from(extents)).scalar_one())
    rows = c.execution_options(yield_per=_SLICE).execute(select(extents).order_by(extents.c.layer, extents.c.start))
    layer = end = -1
    for i, r in enumerate(rows):
        if i % _SLICE == 0:
            progress("maps", i, total)
        if r.layer == layer and r.start < end:
            yield Problem(f"layer {r.layer}: the row at {r.start} begins within the one before", lost=True)
        layer, end = r.layer, r.start + r.length
        if r.layer not in known:
            homeless[r.layer] = homeless.get(r.layer, 0) + 1
        if r.pack != HOLE and r.pack not in live:
            unknown[r.pack] = unknown.get(r.pack, 0) + 1
        wrong = _row_problem(r, live.get(r.pack))
        if wrong:
            yield Problem(f"layer {r.layer}: the row at {r.start} {wrong}", lost=True)
    for pack, n in unknown.items():
        yield Problem(f"{n} rows name pack {pack_key(pack)}, which the volume does not have", lost=True)
    wanted = set(c.execute(select(inodes.c.layer).where(inodes.c.layer != 0)).scalars())
    for number in sorted(homeless.keys() | (wanted - known.keys())):
        yield Problem(f"layer {number}, with {homeless.get(number, 0)} rows, is missing",
                      partial(_make_layer, layer=number), lost=number not in homeless)  # fmt: skip
    for r in known.values():
        if r.base and (r.base not in known or r.base >= r.layer):
            yield Problem(f"layer {r.layer} stands on layer {r.base}, which cannot be", lost=True)
    yield from _beyond(c)


def _row_problem(r: Any, size: int | None) -> str:
    """What is wrong with one row of a map, empty where nothing is."""
    if r.length <= 0 or r.length > MAX_EXTENT or r.start < 0 or r.start + r.length > MAX_SIZE:
        return f"has {r.length} bytes"
    if r.pack == HOLE:
        return ""
    frames = _frames(r)
    if frames is None or r.offset < 0 or r.skip < 0:
        return "says nothing sensible about its frames"
    raw, stored = sum(f.raw for f in frames), sum(f.stored for f in frames)
    if r.skip + r.length > raw:
        return f"has {r.length} bytes after {r.skip}, and frames of {raw}"
    if size is not None and size and r.offset + stored > size:
        return f"ends at {r.offset + stored} of pack {pack_key(r.pack)}, which has {size} bytes"
    return ""


def _frames(r: Any) -> list[Frame] | None:
    try:
        return list(decode_frames(bytes(r.frames)))
    except ValueError:
        return None


def _make_layer(c: Connection, layer: int) -> None:
    if c.execute(select(layers.c.layer).where(layers.c.layer == layer)).first() is None:
        c.execute(insert(layers).values(layer=layer, base=0, base_size=0, users=0, depth=0))
        _set_users(c, layer)


def _beyond(c: Connection) -> Iterator[Problem]:
    """Rows of a file's own layer beyond its end would come back as old bytes when it grows."""
    negative = select(inodes.c.ino, inodes.c.size).where(inodes.c.size < 0)
    for r in c.execute(negative).all():
        yield Problem(f"inode {r.ino} has a size of {r.size}", lost=True)
    late = (extents.c.layer == inodes.c.layer) & (extents.c.start + extents.c.length > inodes.c.size)
    joined = select(inodes.c.ino, inodes.c.size).join(extents, late).where(inodes.c.size >= 0, extents.c.pack != HOLE)
    for r in c.execute(joined.distinct()).all():
        yield Problem(f"inode {r.ino} ends at {r.size}, and has rows beyond", partial(_cut_off, ino=r.ino))


def _cut_off(c: Connection, ino: int) -> None:
    row = c.execute(select(inodes).where(inodes.c.ino == ino).with_for_update()).first()
    if row is not None and row.layer and row.size >= 0:
        live: dict[int, int] = {}
        held = clear(c, row.layer, row.size, MAX_SIZE, live)
        c.execute(
            update(inodes)
            .where(inodes.c.ino == ino)
            .values(bytes=max(0, row.bytes + held), version=inodes.c.version + 1)
        )
        use_packs(c, live, {})


def _sum(column: Any) -> Any:
    """Of numbers that may make no sense: SQLite fails where a sum of integers does not fit, floats are exact enough."""
    return func.coalesce(func.sum(cast(column, Double)), 0)


def _counts(c: Connection) -> Iterator[Problem]:
    used = select(extents.c.pack, _sum(extents.c.length).label("n")).group_by(extents.c.pack).subquery()
    n = func.coalesce(used.c.n, 0)
    wrong = select(packs.c.pack, packs.c.live, n.label("n")).outerjoin(used, used.c.pack == packs.c.pack)
    for r in c.execute(wrong.where(packs.c.live != n, packs.c.state == LIVE)).all():
        yield Problem(f"pack {pack_key(r.pack)} counts {r.live} live bytes and has {int(r.n)}",
                      partial(_set_live, pack=r.pack))  # fmt: skip
    users: dict[int, int] = {}
    for column in (inodes.c.layer, layers.c.base):
        for layer, count in c.execute(select(column, func.count()).where(column != 0).group_by(column)):
            users[layer] = users.get(layer, 0) + count
    for layer, count in c.execute(select(layers.c.layer, layers.c.users)).all():
        if count != users.get(layer, 0):
            yield Problem(f"layer {layer} counts {count} users and has {users.get(layer, 0)}",
                          partial(_set_users, layer=layer))  # fmt: skip


def _users(layer: Any) -> Any:
    """How many inodes and layers stand on a layer."""
    of, on = inodes.alias(), layers.alias()
    return (
        select(func.count()).select_from(of).where(of.c.layer == layer).scalar_subquery()
        + select(func.count()).select_from(on).where(on.c.base == layer).scalar_subquery()
    )


def _set_live(c: Connection, pack: int) -> None:
    c.execute(select(packs.c.pack).where(packs.c.pack == pack).with_for_update())
    n = select(_sum(extents.c.length)).where(extents.c.pack == pack).scalar_subquery()
    c.execute(update(packs).where(packs.c.pack == pack).values(live=n))


def _set_users(c: Connection, layer: int) -> None:
    c.execute(select(layers.c.layer).where(layers.c.layer == layer).with_for_update())
    c.execute(update(layers).where(layers.c.layer == layer).values(users=_users(layer)))


# objects and bytes


def _objects(objects: Objects, progress: Progress) -> dict[int, int]:
    """Sizes of the packs in the bucket."""
    there: dict[int, int] = {}
    for i, (key, size) in enumerate(objects.list("packs")):
        if i % _SLICE == 0:
            progress("objects", i, 0)
        number = pack_of(key)
        if number is not None:
            there[number] = size
    return there


def _missing(database: Database, objects: Objects, there: dict[int, int]) -> Iterator[tuple[Problem, int]]:
    """Live packs that have no object, or a short one. Each is looked at again: it may be newer than the listing."""
    used = select(packs.c.pack, packs.c.size).where(packs.c.state == LIVE, packs.c.live > 0)
    for r in database.query(lambda c: c.execute(used).all()):
        if there.get(r.pack, -1) >= r.size:
            continue
        try:
            size = objects.size(pack_key(r.pack))
        except FileNotFoundError:
            size = -1
        still = used.where(packs.c.pack == r.pack)
        if size >= r.size or database.query(lambda c, still=still: c.execute(still).first()) is None:  # type: ignore[misc]
            there[r.pack] = size
            continue
        what = "is not in the store" if size < 0 else f"has {size} bytes of {r.size} in the store"
        for text in _who_loses(database, r.pack):
            yield Problem(f"pack {pack_key(r.pack)} {what}: {text}", lost=True), r.pack


def _who(database: Database, layer: int) -> str:
    """Whose a layer is, for people."""
    of = select(inodes.c.ino).where(inodes.c.layer == layer)
    ino = database.query(lambda c: c.execute(of).scalars().first())
    return f"frozen layer {layer}" if ino is None else f"inode {ino} ({path_of(database, ino)})"


def _who_loses(database: Database, pack: int) -> list[str]:
    """The ranges of files that a pack holds, for people."""
    ranges = (
        select(extents.c.layer, func.min(extents.c.start), func.max(extents.c.start + extents.c.length),
               _sum(extents.c.length))
        .where(extents.c.pack == pack)
        .group_by(extents.c.layer)
    )  # fmt: skip
    found = database.query(lambda c: c.execute(ranges).all())
    return [f"{int(n)} bytes of {_who(database, layer)} between {low} and {high}" for layer, low, high, n in found]


def _data(
    database: Database, objects: Objects, compression: str, there: dict[int, int], progress: Progress
) -> Iterator[Problem]:
    """Read every frame that a row names, of packs that are there."""
    total = int(database.query(lambda c: c.execute(select(_sum(packs.c.live))).scalar_one()))
    numbers = database.query(lambda c: c.execute(select(packs.c.pack).where(packs.c.live > 0)).scalars().all())
    done = 0

    def verify(number: int) -> tuple[int, list[str]]:
        of = select(extents).where(extents.c.pack == number).order_by(extents.c.offset)
        rows = database.query(lambda c: c.execute(of).all())
        wrong = []
        for r in rows:
            frames = _frames(r)
            if frames is None or r.offset < 0:
                continue  # told already
            at = r.offset
            try:
                stored = objects.get(pack_key(number), at, sum(f.stored for f in frames))
                for frame in frames:
                    open_frame(stored[at - r.offset : at - r.offset + frame.stored], frame, compression)
                    at += frame.stored
            except (OSError, CorruptFrameError) as e:
                if isinstance(e, FileNotFoundError) and not database.query(lambda c: c.execute(of).all()):
                    break  # collected meanwhile, so nobody needs it
                wrong.append(f"{_who(database, r.layer)}, {r.length} bytes at {r.start}, "
                             f"pack {pack_key(number)} at {at}: {e}")  # fmt: skip
        return sum(r.length for r in rows), wrong

    with ThreadPoolExecutor(_READERS) as pool:
        for size, wrong in pool.map(verify, [n for n in numbers if n in there]):
            done += size
            progress("bytes", done, total)
            for text in wrong:
                yield Problem(text, lost=True)
