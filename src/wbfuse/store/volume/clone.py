"""Clones: a file, or a whole tree, stands afterwards on the same frozen layers; no byte is moved.

A tree is cloned in one transaction, so its clone is what the tree was at one moment.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, insert, select, update

from wbfuse.store.contract import ROOT_INO
from wbfuse.store.volume.names import VolumeNames, check_name, fail
from wbfuse.store.volume.rows import layer_row
from wbfuse.store.volume.schema import dentries, extents, inodes, layers, xattrs

_AT_ONCE = 500
_IDS = 4
"""Numbers that one cloned inode needs at most: itself, its name, two layers."""


def share(c: Connection, row: Any, size: int, take: Callable[[], int]) -> tuple[int, int]:
    """Freeze what a file has. Answers (the file's own layer now, a new layer that shows its first `size` bytes).

    `take` gives numbers. Where the file's own layer is empty, what it stands on is shared as it is, so that clones of
    clones stand no deeper.
    """
    top = layer_row(c, row.layer)
    any_row = select(extents.c.start).where(extents.c.layer == top.layer).limit(1)
    empty = bool(top.base) and c.execute(any_row).first() is None
    base, shown, depth = (top.base, top.base_size, top.depth) if empty else (top.layer, row.size, top.depth + 1)
    mine = row.layer
    if not empty:
        mine = take()
        c.execute(insert(layers).values(layer=mine, base=base, base_size=shown, users=1, depth=depth))
    new = take()
    c.execute(insert(layers).values(layer=new, base=base, base_size=min(shown, size), users=1, depth=depth))
    # A layer that is frozen now had one user, its file; now two layers stand on it. One frozen before gets one more.
    c.execute(update(layers).where(layers.c.layer == base).values(users=layers.c.users + 1))
    return mine, new


class VolumeClones(VolumeNames):
    """Part of VolumeStore."""

    def clone(self, source: int, parent: int, name: bytes, without: int = 0) -> int:
        """Clone the file or tree `source` as a new name; the directory `without` is left out. Answers its ino.

        EEXIST where the name is there, EINVAL where it would lie inside the source.
        """
        check_name(name)
        now = time.time_ns()
        count = self.database.query(lambda c: _count(c, source))
        first = self.session.ids(_IDS * (count + 64))
        last = first + _IDS * (count + 64)
        numbers = iter(range(first, last))

        def take() -> int:
            number = next(numbers, None)
            if number is None:
                raise fail(errno.EAGAIN, "the tree grew while it was being cloned")
            return number

        def act(c: Connection) -> Any:
            nonlocal numbers
            numbers = iter(range(first, last))  # where the transaction is run again
            source_row = self._lock(c, [source]).get(source)
            if source_row is None:
                raise fail(errno.ESTALE)
            directory = stat.S_ISDIR(source_row.mode)
            if directory:
                self._outside(c, source, parent, without)
            made = _copy_tree(c, source_row, parent, without, take, self._lock)
            new = made[source]
            entry = {"parent": parent, "name": name, "ino": new, "type": source_row.mode >> 12, "cookie": take()}
            above = self._enter_name(c, entry, int(directory), now)
            changed = list(c.execute(select(inodes).where(inodes.c.ino == source)))
            return new, [above, *changed], [(parent, name, new)]

        return int(self._do(act))

    @staticmethod
    def _outside(c: Connection, source: int, parent: int, without: int) -> None:
        at = parent
        while at not in (0, without):
            if at == source:
                raise fail(errno.EINVAL, "a tree cannot be cloned into itself")
            if at == ROOT_INO:
                return
            at = c.execute(select(inodes.c.parent).where(inodes.c.ino == at)).scalar_one_or_none() or 0


def _count(c: Connection, source: int) -> int:
    """Inodes and names of a tree, about."""
    total, level = 1, [source]
    while level:
        rows = c.execute(select(dentries.c.ino, dentries.c.type).where(dentries.c.parent.in_(level[:_AT_ONCE]))).all()
        level = level[_AT_ONCE:] + [r.ino for r in rows if r.type == stat.S_IFDIR >> 12]
        total += len(rows)
    return total


def _copy_tree(
    c: Connection, source: Any, parent: int, without: int, take: Callable[[], int],
    lock: Callable[[Connection, Any], dict[int, Any]],
) -> dict[int, int]:  # fmt: skip
    """Copy inodes, names and attributes, level by level. Answers the new number of each inode."""
    made: dict[int, int] = {}
    _copy_inodes(c, [source], {source.ino: 1}, made, parent, take)
    level = [source.ino] if stat.S_ISDIR(source.mode) else []
    names: list[dict[str, Any]] = []
    links: dict[int, int] = {}
    while level:
        some, level = level[:_AT_ONCE], level[_AT_ONCE:]
        entries = [
            e for e in c.execute(select(dentries).where(dentries.c.parent.in_(some))) if not without or e.ino != without
        ]
        for e in entries:
            links[e.ino] = links.get(e.ino, 0) + 1
        fresh = sorted({e.ino for e in entries} - made.keys())
        for i in range(0, len(fresh), _AT_ONCE):
            rows = lock(c, fresh[i : i + _AT_ONCE])
            _copy_inodes(c, list(rows.values()), links, made, 0, take)
        for e in entries:
            entry = {"parent": made[e.parent], "name": e.name, "ino": made[e.ino], "type": e.type, "cookie": take()}
            names.append(entry)
            if e.type == stat.S_IFDIR >> 12:
                level.append(e.ino)
    if names:
        c.execute(insert(dentries), names)
    _fix_links(c, links, made, names)
    return made


def _copy_inodes(
    c: Connection, rows: list[Any], links: dict[int, int], made: dict[int, int], parent: int, take: Callable[[], int]
) -> None:
    out = []
    for row in rows:
        new = made[row.ino] = take()
        layer = 0
        if row.layer and stat.S_ISREG(row.mode):
            mine, layer = share(c, row, row.size, take)
            if mine != row.layer:
                changed = update(inodes).where(inodes.c.ino == row.ino)
                c.execute(changed.values(layer=mine, version=inodes.c.version + 1))
        values = dict(row._mapping) | {"ino": new, "version": 1, "layer": layer, "parent": parent}
        values["nlink"] = links.get(row.ino, 1)
        out.append(values)
    if out:
        c.execute(insert(inodes), out)
    of = {row.ino for row in rows}
    copies = [
        {"ino": made[x.ino], "name": x.name, "value": x.value}
        for x in c.execute(select(xattrs).where(xattrs.c.ino.in_(of)))
    ]
    if copies:
        c.execute(insert(xattrs), copies)


def _fix_links(c: Connection, links: dict[int, int], made: dict[int, int], names: list[dict[str, Any]]) -> None:
    """Links within the tree alone, and parents of directories."""
    subdirectories: dict[int, int] = {}
    for e in names:
        if e["type"] == stat.S_IFDIR >> 12:
            subdirectories[e["parent"]] = subdirectories.get(e["parent"], 0) + 1
            c.execute(update(inodes).where(inodes.c.ino == e["ino"]).values(parent=e["parent"]))
    directories = {e["ino"] for e in names if e["type"] == stat.S_IFDIR >> 12} | set(subdirectories)
    for old, new in made.items():
        if new in directories or old not in links:
            continue
        if links[old] > 1:
            c.execute(update(inodes).where(inodes.c.ino == new).values(nlink=links[old]))
    is_directory = inodes.c.mode.op("&")(stat.S_IFMT(0o170000)) == stat.S_IFDIR
    for new in made.values():
        if new in directories:
            c.execute(update(inodes).where(inodes.c.ino == new).values(nlink=2 + subdirectories.get(new, 0)))
    root = next(iter(made.values()))
    c.execute(update(inodes).where(inodes.c.ino == root, is_directory).values(nlink=2 + subdirectories.get(root, 0)))
