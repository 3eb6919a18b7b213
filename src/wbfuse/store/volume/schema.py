"""The tables of a volume. One schema for every database; `VERSION` counts its changes."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, LargeBinary, MetaData, String, Table

VERSION = 1

metadata = MetaData()

settings = Table(
    "settings",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", String, nullable=False),
)
"""uuid, version, data (URL), pack_size, compress, endpoint..., and rows that only serve as locks."""

counters = Table(
    "counters",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""`id`: the next free number, for inodes, dentries, layers, packs and sessions alike; handed out in blocks."""

inodes = Table(
    "inodes",
    metadata,
    Column("ino", BigInteger, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
    Column("mode", Integer, nullable=False),
    Column("uid", BigInteger, nullable=False),
    Column("gid", BigInteger, nullable=False),
    Column("nlink", Integer, nullable=False),
    Column("rdev", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("atime_ns", BigInteger, nullable=False),
    Column("mtime_ns", BigInteger, nullable=False),
    Column("ctime_ns", BigInteger, nullable=False),
    Column("layer", BigInteger, nullable=False),
    Column("parent", BigInteger, nullable=False),
    Column("target", LargeBinary),
)
"""`bytes`: what the rows of its layers hold, for st_blocks. `layer` 0: none. `parent`: of a directory, for "..".
`version` counts changes of the row, and of a directory's names."""

dentries = Table(
    "dentries",
    metadata,
    Column("parent", BigInteger, primary_key=True, autoincrement=False),
    Column("name", LargeBinary, primary_key=True),
    Column("ino", BigInteger, nullable=False),
    Column("type", Integer, nullable=False),
    Column("cookie", BigInteger, nullable=False),
    Index("dentries_by_cookie", "parent", "cookie"),
)
"""`cookie`: the entry's readdir offset, from the counter, so it holds while names come and go. `type`: mode >> 12."""

xattrs = Table(
    "xattrs",
    metadata,
    Column("ino", BigInteger, primary_key=True, autoincrement=False),
    Column("name", LargeBinary, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

layers = Table(
    "layers",
    metadata,
    Column("layer", BigInteger, primary_key=True, autoincrement=False),
    Column("base", BigInteger, nullable=False),
    Column("base_size", BigInteger, nullable=False),
    Column("users", Integer, nullable=False),
    Column("depth", Integer, nullable=False),
    Index("layers_by_base", "base"),
)
"""`base` 0: none. `users`: inodes and layers that stand on it. `depth`: layers below."""

extents = Table(
    "extents",
    metadata,
    Column("layer", BigInteger, primary_key=True, autoincrement=False),
    Column("start", BigInteger, primary_key=True, autoincrement=False),
    Column("length", Integer, nullable=False),
    Column("pack", BigInteger, nullable=False),
    Column("offset", Integer, nullable=False),
    Column("skip", Integer, nullable=False),
    Column("frames", LargeBinary, nullable=False),
    Index("extents_by_pack", "pack"),
    sqlite_with_rowid=False,
)

packs = Table(
    "packs",
    metadata,
    Column("pack", BigInteger, primary_key=True, autoincrement=False),
    Column("state", Integer, nullable=False),
    Column("session", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("live", BigInteger, nullable=False),
    Column("dead_at", BigInteger),
    Index("packs_by_state", "state", "session"),
    Index("packs_dead", "live"),
)
"""`live`: bytes of files that extents find in it. `size`: bytes of the object. `dead_at`: the newest dump when gc first
saw that nothing is live in it."""
PENDING, LIVE, DOOMED = 0, 1, 2
"""Of a pack: not committed yet; committed; about to be deleted, so nothing may refer to it again."""

orphans = Table(
    "orphans",
    metadata,
    Column("ino", BigInteger, primary_key=True, autoincrement=False),
    Column("session", BigInteger, nullable=False),
)
"""Inodes without names that the session still has open."""

sessions = Table(
    "sessions",
    metadata,
    Column("session", BigInteger, primary_key=True, autoincrement=False),
    Column("beat", BigInteger, nullable=False),
    Column("shared", Boolean, nullable=False),
    Column("host", String, nullable=False),
    Column("process", String, nullable=False),
    Column("timeout_ms", Integer, nullable=False),
)
"""Those that are alive: who fences one removes its row. Numbers are never used twice, so a session is its own epoch.
`timeout_ms`: how long it may stand still before others may take it for dead. `process`: boot id, pid and start
time, so that a dead one on the same machine is known at once."""

dumps = Table(
    "dumps",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("made_ns", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("foreign", Boolean, nullable=False, default=False),
)
"""Dumps that are kept in the bucket; what they name is not collected. `foreign`: made before this database was loaded
from one of them."""

leases = Table(
    "leases",
    metadata,
    Column("ino", BigInteger, primary_key=True, autoincrement=False),
    Column("session", BigInteger, nullable=False),
)
"""Who may write a file of a shared volume."""
