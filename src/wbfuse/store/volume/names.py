"""The name space of a volume: each operation is one transaction, and its rows are what `nodes` learns afterwards.

Locks of a transaction: the session, then the directories, ascending, then what stands in them. Nothing can come to
stand under a name of a locked directory. Two that cross (a directory that was moved below one with a higher number) are
told apart by the database, and one is run again.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from wbfuse.store.contract import ROOT_INO, Change, Found, Owner
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.leases import Leases, holder_of
from wbfuse.store.volume.maps import Maps
from wbfuse.store.volume.nodes import Nodes
from wbfuse.store.volume.reaper import Reaper
from wbfuse.store.volume.schema import dentries, inodes, orphans, settings, xattrs
from wbfuse.store.volume.sessions import Session
from wbfuse.wire.constants import RENAME_EXCHANGE, RENAME_NOREPLACE
from wbfuse.wire.types import Attr, Dirent

MAX_XATTR = 64 << 10
_LISTING = 1000
_FIRST_COOKIE = 16
MOVES = "moves"
"""The row of `settings` that a rename of a directory to another one locks."""

_LOOKUP = (
    select(inodes)
    .join(dentries, dentries.c.ino == inodes.c.ino)
    .where(dentries.c.parent == bindparam("p"), dentries.c.name == bindparam("n"))
)
_INODE = select(inodes).where(inodes.c.ino == bindparam("i"))
_LOCK = (
    select(inodes).where(inodes.c.ino.in_(bindparam("inos", expanding=True))).order_by(inodes.c.ino).with_for_update()
)
_TOUCH = (
    update(inodes)
    .where(inodes.c.ino == bindparam("i"))
    .values(
        version=inodes.c.version + 1, nlink=inodes.c.nlink + bindparam("links"), mtime_ns=bindparam("t"),
        ctime_ns=bindparam("t"),
    )
    .returning(*inodes.c)
)  # fmt: skip
_RELINK = (
    update(inodes)
    .where(inodes.c.ino == bindparam("i"))
    .values(
        version=inodes.c.version + 1, nlink=inodes.c.nlink + bindparam("links"), ctime_ns=bindparam("t"),
        parent=bindparam("above"),
    )
    .returning(*inodes.c)
)  # fmt: skip
_ADD_DENTRY = insert(dentries)
_ABOVE = _TOUCH.cte("above")
_ENTRY = ("name", "ino", "type", "cookie")
_NAMED = insert(dentries).from_select(
    ["parent", *_ENTRY], select(_ABOVE.c.ino, *(bindparam(f"new_{n}", type_=dentries.c[n].type) for n in _ENTRY))
)
_TOUCH_AND_ADD = select(_ABOVE).add_cte(_NAMED.cte("named"))
"""PostgreSQL: a round trip less for every name that is made."""
_ADD_INODE = insert(inodes).returning(*inodes.c)
_ADD_ORPHAN = insert(orphans)
_REMOVE_DENTRY = delete(dentries).where(dentries.c.parent == bindparam("p"), dentries.c.name == bindparam("n"))
_MOVE_DENTRY = (
    update(dentries)
    .where(dentries.c.parent == bindparam("p"), dentries.c.name == bindparam("n"))
    .values(parent=bindparam("np"), name=bindparam("nn"), cookie=bindparam("k"))
)
_ANY_CHILD = select(dentries.c.ino).where(dentries.c.parent == bindparam("p")).limit(1)
_LIST = (
    select(dentries.c.name, dentries.c.cookie, inodes)
    .join(inodes, inodes.c.ino == dentries.c.ino)
    .where(dentries.c.parent == bindparam("p"), dentries.c.cookie > bindparam("after"))
    .order_by(dentries.c.cookie)
    .limit(_LISTING)
)
_GET_XATTR = select(xattrs.c.value).where(xattrs.c.ino == bindparam("i"), xattrs.c.name == bindparam("n"))


def fail(code: int, what: str | bytes = "") -> OSError:
    return OSError(code, os.strerror(code), what)


def check_name(name: bytes) -> None:
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "not a name", name)
    if len(name) > 255:
        raise fail(errno.ENAMETOOLONG, name)


class VolumeNames:
    """Names, attributes and extended attributes; part of VolumeStore."""

    database: Database
    session: Session
    nodes: Nodes
    maps: Maps
    reaper: Reaper
    leases: Leases | None
    """None where the mount has the whole volume."""

    def _init_names(self) -> None:
        self._name_changes = self._names_synced = 0
        """Transactions that changed names, and how many of them no power cut can take."""
        self._counting = threading.Lock()
        """Guards `_name_changes`, for an instant."""

    def removed(self, ino: int) -> None:
        """A file has neither names nor opens: its bytes may go."""
        self.maps.changed(ino, None)
        self.reaper.put_inodes([ino])

    def _do(self, act: Any, *changes: tuple[int, bytes]) -> Any:
        """Run a changing transaction. It answers (result, rows, [(parent, name, ino or None)])."""

        def guarded(c: Connection) -> Any:
            self.session.guard(c)
            return act(c)

        def learn(answer: Any) -> None:
            _, rows, names = answer
            with self._counting:
                self._name_changes += 1
            for row in rows:
                self.nodes.learn(row)
            for parent, name, ino in names:
                self.nodes.renamed(parent, name, ino)

        return self.database.transact(guarded, then=learn)[0]

    # reading

    def lookup(self, parent: int, name: bytes, nowait: bool = False) -> Found:
        check_name(name)
        found = self.nodes.find(parent, name)
        if found is not None:
            return found
        if self.nodes.absent(parent, name):
            raise fail(errno.ENOENT, name)
        if nowait:
            raise BlockingIOError(errno.EAGAIN, "the database must be asked")
        stamp = self.nodes.stamp(parent)
        row = self.database.query(lambda c: c.execute(_LOOKUP, {"p": parent, "n": name}).first())
        if row is None:
            raise fail(errno.ENOENT, name)
        self.nodes.listed(parent, stamp, [(name, row)])
        return row.ino, self.nodes.learn(row, lookups=1)

    def find(self, path: bytes) -> int:
        """The inode at a path below the root, symlinks not followed, with a reference. ENOENT."""
        at = ROOT_INO
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            above, (at, _) = at, self.lookup(at, name)
            if above != ROOT_INO:
                self.forget(above)
        return at

    def forget(self, ino: int, nlookup: int = 1) -> None:
        if self.nodes.forget(ino, nlookup):
            self.removed(ino)

    def _row(self, ino: int) -> Any:
        """The inode's row, asked for where it may have changed elsewhere. ESTALE."""
        row = self.nodes.fresh(ino)
        return self._ask(ino) if row is None else row

    def _meet(self, ino: int) -> None:
        """See that a node is known, which the kernel may know from a server that died. ESTALE."""
        if self.nodes.missing(ino):
            self._ask(ino)

    def _ask(self, ino: int) -> Any:
        """The inode's row from the database. ESTALE."""
        row = self.database.query(lambda c: c.execute(_INODE, {"i": ino}).first())
        if row is None:
            raise fail(errno.ESTALE)
        self.nodes.learn(row)
        return row

    def getattr(self, ino: int, nowait: bool = False) -> Attr:
        row = self.nodes.fresh(ino)
        if row is None and nowait:
            raise BlockingIOError(errno.EAGAIN, "the database must be asked")
        return self.nodes.learn(row if row is not None else self._row(ino))

    def readlink(self, ino: int) -> bytes:
        target = self._row(ino).target
        if target is None:
            raise fail(errno.EINVAL)
        return bytes(target)

    def readdir(self, ino: int, offset: int) -> Iterator[Dirent]:
        row = self._row(ino)
        if not stat.S_ISDIR(row.mode):
            raise fail(errno.ENOTDIR)
        kind = stat.S_IFDIR >> 12
        if offset < 1:
            yield Dirent(b".", ino, kind, 1)
        if offset < 2:
            yield Dirent(b"..", row.parent, kind, 2)
        begun, from_start = self.nodes.stamp(ino), offset < _FIRST_COOKIE
        while True:
            after, stamp = max(offset, _FIRST_COOKIE - 1), self.nodes.stamp(ino)
            rows = self.database.query(
                lambda c, after=after: c.execute(_LIST, {"p": ino, "after": after}).all()  # type: ignore[misc]
            )
            self.nodes.listed(ino, stamp, [(bytes(r.name), r) for r in rows])
            for r in rows:
                yield Dirent(bytes(r.name), r.ino, r.mode >> 12, r.cookie)
            if len(rows) < _LISTING:
                if from_start:
                    self.nodes.whole(ino, begun)
                return
            offset = rows[-1].cookie

    # making

    def _enter_name(self, c: Connection, entry: dict[str, Any], links: int, now: int) -> Any:
        """Lock a directory, move its times and put a name in it. Answers its row. ENOENT where it was removed."""
        touch = {"i": entry["parent"], "links": links, "t": now}
        if not self.database.sqlite:
            new = {f"new_{n}": entry[n] for n in _ENTRY}
            return self._as_parent(c.execute(_TOUCH_AND_ADD, touch | new).first(), links)
        above = self._as_parent(c.execute(_TOUCH, touch).first(), links)
        c.execute(_ADD_DENTRY, entry)
        return above

    def _parent(self, c: Connection, parent: int, links: int, now: int) -> Any:
        """Lock a directory whose names change, and move its times. ENOENT where it was removed."""
        return self._as_parent(c.execute(_TOUCH, {"i": parent, "links": links, "t": now}).first(), links)

    @staticmethod
    def _as_parent(row: Any, links: int) -> Any:
        if row is None or not row.nlink - links:
            raise fail(errno.ENOENT)
        if not stat.S_ISDIR(row.mode):
            raise fail(errno.ENOTDIR)
        return row

    def _make(
        self, parent: int, name: bytes | None, mode: int, owner: Owner, rdev: int = 0, target: bytes | None = None
    ) -> Found:
        """A new inode under a name; without one it is an orphan of this session."""
        if name is not None:
            check_name(name)
        directory = stat.S_ISDIR(mode)
        ino = self.session.ids(2)
        now = time.time_ns()

        def act(c: Connection) -> Any:
            if name is None:
                above = c.execute(_INODE, {"i": parent}).first()
                if above is None:
                    raise fail(errno.ENOENT)
            else:
                entry = {"parent": parent, "name": name, "ino": ino, "type": mode >> 12, "cookie": ino + 1}
                above = self._enter_name(c, entry, int(directory), now)
            gid, bits = owner.gid, mode
            if above.mode & stat.S_ISGID:
                gid = above.gid
                bits |= stat.S_ISGID if directory else 0
            row = c.execute(
                _ADD_INODE,
                {
                    "ino": ino, "version": 1, "mode": bits, "uid": owner.uid, "gid": gid,
                    "nlink": 0 if name is None else 1 + directory, "rdev": rdev, "size": len(target or b""), "bytes": 0,
                    "atime_ns": now, "mtime_ns": now, "ctime_ns": now, "layer": 0,
                    "parent": parent if directory else 0, "target": target,
                },
            ).one()  # fmt: skip
            if name is None:
                c.execute(_ADD_ORPHAN, {"ino": ino, "session": self.session.number})
                return row, [row], []
            return row, [above, row], [(parent, name, ino)]

        row = self._do(act)
        if directory:
            self.nodes.whole(ino, None)
        return ino, self.nodes.learn(row, lookups=1)

    def create(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        return self._make(parent, name, stat.S_IFREG | stat.S_IMODE(mode), owner)

    def tmpfile(self, parent: int, mode: int, owner: Owner) -> Found:
        return self._make(parent, None, stat.S_IFREG | stat.S_IMODE(mode), owner)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, owner: Owner) -> Found:
        return self._make(parent, name, mode, owner, rdev)

    def mkdir(self, parent: int, name: bytes, mode: int, owner: Owner) -> Found:
        return self._make(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), owner)

    def symlink(self, parent: int, name: bytes, target: bytes, owner: Owner) -> Found:
        if len(target) > 4095:
            raise fail(errno.ENAMETOOLONG)
        return self._make(parent, name, stat.S_IFLNK | 0o777, owner, target=target)

    def link(self, ino: int, parent: int, name: bytes) -> Found:
        check_name(name)
        self._meet(ino)
        self.nodes.known(ino)
        cookie, now = self.session.ids(), time.time_ns()

        def act(c: Connection) -> Any:
            rows = self._lock(c, {ino, parent})
            row = rows.get(ino)
            if row is None:
                raise fail(errno.ESTALE)
            if stat.S_ISDIR(row.mode):
                raise fail(errno.EPERM)
            if not row.nlink and not c.execute(delete(orphans).where(orphans.c.ino == ino)).rowcount:
                raise fail(errno.ENOENT)
            entry = {"parent": parent, "name": name, "ino": ino, "type": row.mode >> 12, "cookie": cookie}
            above = self._enter_name(c, entry, 0, now)
            row = c.execute(_RELINK, {"i": ino, "links": 1, "t": now, "above": 0}).one()
            return row, [above, row], [(parent, name, ino)]

        return ino, self.nodes.learn(self._do(act), lookups=1)

    # removing and moving

    def _lock(self, c: Connection, inos: Iterable[int]) -> dict[int, Any]:
        """Lock these inodes in order; their rows, by number."""
        return {r.ino: r for r in c.execute(_LOCK, {"inos": sorted(set(inos))})}

    def _under(self, c: Connection, parent: int, name: bytes) -> Any | None:
        """What stands under a name of a locked directory; it is locked by the UPDATE that follows."""
        return c.execute(_LOOKUP, {"p": parent, "n": name}).first()

    def _unname(self, c: Connection, row: Any, now: int) -> Any:
        """One name less for the file of `row`."""
        row = c.execute(_RELINK, {"i": row.ino, "links": -1, "t": now, "above": 0}).one()
        if row.nlink == 0:
            # Who writes it on another host still has it open: it is his to remove.
            writer = holder_of(c, row.ino) if self.leases is not None else 0
            c.execute(_ADD_ORPHAN, {"ino": row.ino, "session": writer or self.session.number})
        return row

    def _remove_directory(self, c: Connection, row: Any) -> Any:
        """An empty directory goes; ENOTEMPTY. It is locked before one looks, so that nobody makes a name in it."""
        gone = c.execute(_RELINK, {"i": row.ino, "links": -row.nlink, "t": row.ctime_ns, "above": row.parent}).one()
        if c.execute(_ANY_CHILD, {"p": row.ino}).first() is not None:
            raise fail(errno.ENOTEMPTY)
        c.execute(delete(inodes).where(inodes.c.ino == row.ino))
        c.execute(delete(xattrs).where(xattrs.c.ino == row.ino))
        return gone

    def _settle(self, row: Any) -> tuple[int, int]:
        """After a file lost a name: what unlink answers; its bytes go where nobody has it open."""
        if row.nlink == 0 and self.nodes.unnamed(row.ino):
            self.removed(row.ino)
        return row.ino, row.nlink

    def unlink(self, parent: int, name: bytes) -> tuple[int, int]:
        check_name(name)
        now = time.time_ns()

        def act(c: Connection) -> Any:
            above = self._parent(c, parent, 0, now)
            row = self._under(c, parent, name)
            if row is None:
                raise fail(errno.ENOENT, name)
            if stat.S_ISDIR(row.mode):
                raise fail(errno.EISDIR, name)
            c.execute(_REMOVE_DENTRY, {"p": parent, "n": name})
            row = self._unname(c, row, now)
            return row, [above, row], [(parent, name, None)]

        return self._settle(self._do(act))

    def rmdir(self, parent: int, name: bytes) -> None:
        check_name(name)
        now = time.time_ns()

        def act(c: Connection) -> Any:
            above = self._parent(c, parent, -1, now)
            row = self._under(c, parent, name)
            if row is None:
                raise fail(errno.ENOENT, name)
            if not stat.S_ISDIR(row.mode):
                raise fail(errno.ENOTDIR, name)
            gone = self._remove_directory(c, row)
            c.execute(_REMOVE_DENTRY, {"p": parent, "n": name})
            return None, [above, gone], [(parent, name, None)]

        self._do(act)

    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> tuple[int, int]:
        check_name(name)
        check_name(newname)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE) or flags == RENAME_NOREPLACE | RENAME_EXCHANGE:
            raise fail(errno.EINVAL)
        now = time.time_ns()
        cookie = self.session.ids()

        def act(c: Connection) -> Any:
            parents = self._lock(c, {parent, newparent})
            if len(parents) < len({parent, newparent}) or not all(p.nlink for p in parents.values()):
                raise fail(errno.ENOENT, newname)
            moved, other = self._under(c, parent, name), self._under(c, newparent, newname)
            if moved is None or (other is None and flags & RENAME_EXCHANGE):
                raise fail(errno.ENOENT, name)
            if other is not None and flags & RENAME_NOREPLACE:
                raise fail(errno.EEXIST, newname)
            if other is not None and moved.ino == other.ino:
                return None, [], []
            if parent != newparent:
                self._no_cycle(c, moved, newparent)
                if flags & RENAME_EXCHANGE:
                    self._no_cycle(c, other, parent)
            if flags & RENAME_EXCHANGE:
                return self._exchange(c, (parent, name, moved), (newparent, newname, other), now)
            victim = None
            if other is not None:  # its name keeps its cookie: a listing that has passed it must not meet it again
                victim = self._replace(c, moved, other, now)
                c.execute(_REMOVE_DENTRY, {"p": parent, "n": name})
                self._point(c, newparent, newname, moved)
            else:
                c.execute(_MOVE_DENTRY, {"p": parent, "n": name, "np": newparent, "nn": newname, "k": cookie})
            directory = stat.S_ISDIR(moved.mode)
            above = newparent if directory else 0
            learned = [c.execute(_RELINK, {"i": moved.ino, "links": 0, "t": now, "above": above}).one()]
            links = {parent: -int(directory)}
            replaced = directory and other is not None
            links[newparent] = links.get(newparent, 0) + int(directory) - int(replaced)
            learned += [c.execute(_TOUCH, {"i": p, "links": n, "t": now}).one() for p, n in sorted(links.items())]
            if victim is not None:
                learned.append(victim)
            answer = victim if victim is not None and not stat.S_ISDIR(victim.mode) else None
            return answer, learned, [(parent, name, None), (newparent, newname, moved.ino)]

        victim = self._do(act)
        return (0, 0) if victim is None else self._settle(victim)

    def _replace(self, c: Connection, moved: Any, other: Any, now: int) -> Any:
        """What stands at the target of a rename goes."""
        if stat.S_ISDIR(other.mode):
            if not stat.S_ISDIR(moved.mode):
                raise fail(errno.EISDIR)
            return self._remove_directory(c, other)
        if stat.S_ISDIR(moved.mode):
            raise fail(errno.ENOTDIR)
        return self._unname(c, other, now)

    def _exchange(self, c: Connection, one: tuple[int, bytes, Any], two: tuple[int, bytes, Any], now: int) -> Any:
        """Each (directory, name, row): the names change places."""
        links = {one[0]: 0, two[0]: 0}
        learned = []
        for (old, _, row), (new, name, _) in ((one, two), (two, one)):
            self._point(c, new, name, row)
            directory = stat.S_ISDIR(row.mode)
            links[old] -= directory
            links[new] += directory
            above = new if directory else 0
            learned.append(c.execute(_RELINK, {"i": row.ino, "links": 0, "t": now, "above": above}).one())
        learned += [c.execute(_TOUCH, {"i": p, "links": n, "t": now}).one() for p, n in sorted(links.items())]
        return None, learned, [(one[0], one[1], two[2].ino), (two[0], two[1], one[2].ino)]

    @staticmethod
    def _point(c: Connection, parent: int, name: bytes, row: Any) -> None:
        """A name is that of another file from now on."""
        where = (dentries.c.parent == parent) & (dentries.c.name == name)
        c.execute(update(dentries).where(where).values(ino=row.ino, type=row.mode >> 12))

    def _no_cycle(self, c: Connection, moved: Any, newparent: int) -> None:
        """EINVAL where a directory would come to stand below itself. One such move at a time: two could make a ring."""
        if not stat.S_ISDIR(moved.mode):
            return
        c.execute(select(settings).where(settings.c.name == MOVES).with_for_update())
        at = newparent
        while at not in (ROOT_INO, 0):
            if at == moved.ino:
                raise fail(errno.EINVAL)
            at = c.execute(select(inodes.c.parent).where(inodes.c.ino == at)).scalar_one_or_none() or 0
        if moved.ino == ROOT_INO:
            raise fail(errno.EBUSY)

    def fsyncdir(self, ino: int) -> None:
        self.sync_names()

    def sync_names(self) -> None:
        """Every change of names so far is durable when this returns."""
        wanted = self._name_changes
        if self._names_synced < wanted:
            self.database.flush()
            self._names_synced = max(self._names_synced, wanted)

    # attributes

    def setattr(self, ino: int, change: Change) -> Attr:
        self._meet(ino)
        self.nodes.known(ino)
        values: dict[str, Any] = {"version": inodes.c.version + 1, "ctime_ns": time.time_ns()}
        given = {"uid": change.uid, "gid": change.gid, "atime_ns": change.atime_ns, "mtime_ns": change.mtime_ns}
        values |= {column: value for column, value in given.items() if value is not None}
        if change.mode is not None:
            values["mode"] = inodes.c.mode.op("&")(~0o7777).op("|")(stat.S_IMODE(change.mode))

        def act(c: Connection) -> Any:
            if self.leases is not None and holder_of(c, ino) not in (0, self.session.number):
                raise fail(errno.EBUSY)
            row = c.execute(update(inodes).where(inodes.c.ino == ino).values(values).returning(*inodes.c)).first()
            if row is None:
                raise fail(errno.ESTALE)
            return row, [row], []

        return self.nodes.learn(self._do(act))

    def getxattr(self, ino: int, name: bytes) -> bytes:
        value = self.database.query(lambda c: c.execute(_GET_XATTR, {"i": ino, "n": name}).scalar_one_or_none())
        if value is None:
            raise fail(errno.ENODATA, name)
        return bytes(value)

    def listxattr(self, ino: int) -> Sequence[bytes]:
        names = select(xattrs.c.name).where(xattrs.c.ino == ino).order_by(xattrs.c.name)
        return [bytes(n) for n in self.database.query(lambda c: c.execute(names).scalars().all())]

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int) -> None:
        if len(name) > 255:
            raise fail(errno.ERANGE, name)
        if len(value) > MAX_XATTR:
            raise fail(errno.E2BIG, name)

        def act(c: Connection) -> Any:
            row = self._changed(c, ino)
            there = c.execute(_GET_XATTR, {"i": ino, "n": name}).first() is not None
            if there and flags & os.XATTR_CREATE:
                raise fail(errno.EEXIST, name)
            if not there and flags & os.XATTR_REPLACE:
                raise fail(errno.ENODATA, name)
            where = (xattrs.c.ino == ino) & (xattrs.c.name == name)
            statement = update(xattrs).where(where).values(value=value) if there else None
            c.execute(insert(xattrs).values(ino=ino, name=name, value=value) if statement is None else statement)
            return None, [row], []

        self._do(act)

    def removexattr(self, ino: int, name: bytes) -> None:
        def act(c: Connection) -> Any:
            row = self._changed(c, ino)
            if not c.execute(delete(xattrs).where(xattrs.c.ino == ino, xattrs.c.name == name)).rowcount:
                raise fail(errno.ENODATA, name)
            return None, [row], []

        self._do(act)

    def _changed(self, c: Connection, ino: int) -> Any:
        """Lock an inode and move its ctime."""
        changed = update(inodes).where(inodes.c.ino == ino)
        changed = changed.values(version=inodes.c.version + 1, ctime_ns=time.time_ns())
        row = c.execute(changed.returning(*inodes.c)).first()
        if row is None:
            raise fail(errno.ESTALE)
        return row


def path_of(database: Database, ino: int) -> str:
    """One path of an inode, for people."""
    parts: list[str] = []
    while ino != ROOT_INO and len(parts) < 100:
        e = database.query(lambda c, ino=ino: c.execute(select(dentries).where(dentries.c.ino == ino)).first())  # type: ignore[misc]
        if e is None:
            return "?/" + "/".join(reversed(parts))
        parts.append(bytes(e.name).decode(errors="backslashreplace"))
        ino = e.parent
    return "/" + "/".join(reversed(parts))
