"""Rows of maps in the database: read by range, resolved through layers, and changed within a transaction.

What a change does to the use of packs is added up by the caller (`live`) and told to the packs at the end
(`use_packs`), in the order in which packs are locked.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select, text, update

from wbfuse.store.volume.layout import HOLE, Extent, cut, overlay, without_gaps
from wbfuse.store.volume.maps import WINDOW
from wbfuse.store.volume.schema import LIVE, PENDING, extents, inodes, layers, packs

log = logging.getLogger(__name__)

MAX_SIZE = (1 << 63) - 1

COLUMNS = (extents.c.start, extents.c.length, extents.c.pack, extents.c.offset, extents.c.skip, extents.c.frames)
_BEFORE = (
    select(func.max(extents.c.start))
    .where(extents.c.layer == bindparam("l"), extents.c.start <= bindparam("a"))
    .scalar_subquery()
)
_RANGE = (
    select(*COLUMNS)
    .where(
        extents.c.layer == bindparam("l"), extents.c.start < bindparam("b"),
        extents.c.start >= func.coalesce(_BEFORE, bindparam("a")),
    )
    .order_by(extents.c.start)
)  # fmt: skip
_LAYER = select(layers).where(layers.c.layer == bindparam("l"))

_ADD_EXTENTS = insert(extents)
_DROP_EXTENTS = delete(extents).where(extents.c.layer == bindparam("l"), extents.c.start == bindparam("s"))
_MAKE_LIVE = (
    update(packs)
    .where(packs.c.pack == bindparam("p"), packs.c.state.in_((PENDING, LIVE)))
    .values(state=LIVE, size=func.coalesce(bindparam("z"), packs.c.size))
)
_USE = update(packs).where(packs.c.pack == bindparam("p")).values(live=packs.c.live + bindparam("d"))

# Rows that touch any of many ranges, in one statement: each database has its own way to take a list as one parameter.
_FEW = 4
_MANY = {
    True: text(
        "select e.start, e.length, e.pack, e.offset, e.skip, e.frames from json_each(:r) as r, extents as e "
        "where e.layer = :l and e.start < json_extract(r.value, '$[1]') and e.start >= coalesce((select max(p.start) "
        "from extents as p where p.layer = :l and p.start <= json_extract(r.value, '$[0]')), "
        "json_extract(r.value, '$[0]'))"
    ),
    False: text(
        "select e.* from json_array_elements(cast(:r as json)) as r cross join lateral ("
        'select e.start, e.length, e.pack, e."offset", e.skip, e.frames from extents as e '
        "where e.layer = :l and e.start < cast(r->>1 as bigint) and e.start >= coalesce((select max(p.start) "
        "from extents as p where p.layer = :l and p.start <= cast(r->>0 as bigint)), cast(r->>0 as bigint))) as e"
    ),
}


class PacksGoneError(Exception):
    """Packs that a commit was to point at are not there any more."""


def _extent(row: Any) -> Extent:
    """Raises EIO for a row that makes no sense, with a line for the log."""
    found = Extent(row[0], row[1], row[2], row[3], row[4], bytes(row[5]))
    if not found.is_sound:
        log.error("the row of a map at %d makes no sense: see wbfuse check", found.start)
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return found


def rows_in(c: Connection, layer: int, start: int, end: int) -> list[Extent]:
    """The rows of one layer that reach into [start, end), in order."""
    found = [_extent(r) for r in c.execute(_RANGE, {"l": layer, "a": start, "b": end})]
    return found[1:] if found and found[0].end <= start else found


def rows_touched(c: Connection, layer: int, ranges: Sequence[tuple[int, int]], sqlite: bool) -> list[Extent]:
    """The rows of one layer that reach into any of these ranges, in order."""
    if len(ranges) <= _FEW:
        found = {e.start: e for a, b in ranges for e in rows_in(c, layer, a, b)}
    else:
        rows = c.execute(_MANY[sqlite], {"l": layer, "r": json.dumps(ranges)})
        found = {r[0]: _extent(r) for r in rows}
    return sorted(found.values())


def layer_row(c: Connection, layer: int) -> Any:
    return c.execute(_LAYER, {"l": layer}).one()


def resolve(c: Connection, layer: int, start: int, end: int) -> list[Extent]:
    """What a file with this top layer shows in [start, end), cut to it, without holes, in order."""
    out: list[Extent] = []
    gaps = [(start, end)] if start < end else []
    while layer and gaps:
        row = layer_row(c, layer)
        rest: list[tuple[int, int]] = []
        for low, high in gaps:
            for a, b, extent in without_gaps(rows_in(c, layer, low, high), low, high):
                if extent is None:
                    if row.base and a < row.base_size:
                        rest.append((a, min(b, row.base_size)))
                elif extent.pack != HOLE:
                    out.append(extent)
        if row.base >= layer:
            raise OSError(errno.EIO, f"layer {layer} stands on layer {row.base}, which is not below it")
        gaps, layer = rest, row.base
    out.sort()
    return out


def next_data(c: Connection, ino: int, offset: int, size: int) -> int | None:
    """The first byte at or after `offset` that a row shows."""
    layer = c.execute(select(inodes.c.layer).where(inodes.c.ino == ino)).scalar_one_or_none()
    if not layer:
        return None
    at = offset
    while at < size:
        shown = resolve(c, layer, at, min(size, at + WINDOW))
        if shown:
            return shown[0].start
        at = min(size, at + WINDOW)
        candidates: list[int | None] = []
        walk = layer
        while walk:
            after = select(func.min(extents.c.start)).where(
                extents.c.layer == walk, extents.c.start >= at, extents.c.pack != HOLE
            )
            candidates.append(c.execute(after).scalar_one_or_none())
            reaching = [e.start for e in rows_in(c, walk, at, at + 1) if e.pack != HOLE]
            candidates += [at] if reaching else []
            walk = layer_row(c, walk).base
        following = [n for n in candidates if n is not None]
        if not following:
            return None
        at = max(at, min(following))
    return None


def replace_rows(c: Connection, layer: int, gone: list[int], come: list[Extent]) -> None:
    """Take the rows of a layer that begin at `gone` away, and add `come`."""
    if gone:
        c.execute(_DROP_EXTENTS, [{"l": layer, "s": s} for s in gone])
    if come:
        c.execute(_ADD_EXTENTS, [as_row(layer, e) for e in come])


def use_packs(c: Connection, live: dict[int, int], used: Mapping[int, int | None]) -> None:
    """Set `used` packs live (with their size, where it is new), and change how much of each is used.

    PacksGoneError where one is not there.
    """
    for pack, size in sorted(used.items()):
        if c.execute(_MAKE_LIVE, {"p": pack, "z": size}).rowcount != 1:
            raise PacksGoneError
    changes = [{"p": p, "d": d} for p, d in sorted(live.items()) if d and p != HOLE]
    if changes:
        c.execute(_USE, changes)


def lay(c: Connection, layer: int, changes: list[Extent], live: dict[int, int], sqlite: bool) -> int:
    """Lay `changes` over the rows of a layer. Answers how many more bytes its rows hold."""
    base = layer_row(c, layer)
    held = 0
    wide = [e for e in changes if e.pack == HOLE and e.length > WINDOW]
    for e in wide:  # rows inside go without being read
        held += clear(c, layer, e.start, e.end, live)
    based = bool(base.base)
    if based:  # of wide holes only what hides the base
        changes = [e if e not in wide else cut(e, e.start, base.base_size) for e in changes
                   if e not in wide or e.start < base.base_size]  # fmt: skip
    else:
        changes = [e for e in changes if e not in wide]
    old = rows_touched(c, layer, _merged(changes), sqlite)
    gone, come, used = overlay(old, changes, based)
    # Beyond what the base shows a hole needs no row.
    come = [cut(e, 0, base.base_size) if e.pack == HOLE else e for e in come
            if e.pack != HOLE or e.start < base.base_size]  # fmt: skip
    replace_rows(c, layer, gone, come)
    for pack, change in used.items():
        live[pack] = live.get(pack, 0) + change
    return held + sum(used.values())


def clear(c: Connection, layer: int, start: int, end: int, live: dict[int, int]) -> int:
    """Remove the rows of a layer in [start, end). Answers (not above 0) how many more bytes its rows hold."""
    held = 0
    edges = {e.start: e for at in (start, end) for e in rows_in(c, layer, at, min(at + 1, MAX_SIZE)) if e.start < at}
    inside = (extents.c.layer == layer) & (extents.c.start >= start) & (extents.c.start < end)
    use = select(extents.c.pack, func.sum(extents.c.length)).where(inside).group_by(extents.c.pack)
    for pack, length in c.execute(use):
        if pack != HOLE:
            live[pack] = live.get(pack, 0) - int(length)
            held -= int(length)
    c.execute(delete(extents).where(inside))
    for e in edges.values():
        kept = [cut(e, e.start, start)] if e.start < start else []
        kept += [cut(e, end, e.end)] if e.end > end else []
        if e.start < start:
            c.execute(_DROP_EXTENTS, [{"l": layer, "s": e.start}])
        c.execute(_ADD_EXTENTS, [as_row(layer, k) for k in kept]) if kept else None
        if e.pack != HOLE:
            # One that begins inside was counted with those that went; what is kept of it comes back.
            change = sum(k.length for k in kept) - (e.length if e.start < start else 0)
            live[e.pack] = live.get(e.pack, 0) + change
            held += change
    return held


def _merged(changes: list[Extent]) -> list[tuple[int, int]]:
    """Ranges that changes touch, neighbours as one."""
    out: list[tuple[int, int]] = []
    for e in changes:
        if out and out[-1][1] == e.start:
            out[-1] = out[-1][0], e.end
        else:
            out.append((e.start, e.end))
    return out


def as_row(layer: int, e: Extent) -> dict[str, Any]:
    return {
        "layer": layer, "start": e.start, "length": e.length, "pack": e.pack, "offset": e.offset, "skip": e.skip,
        "frames": e.frames,
    }  # fmt: skip
