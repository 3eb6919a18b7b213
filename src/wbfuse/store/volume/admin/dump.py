"""The database as a stream of lines, and back. A dump and the packs that it names are a volume that can be rebuilt.

zstd of JSON lines: first a header, then rows as [table, columns...], bytes in base64. Sessions, leases and dumps are
not in it: they are about who is there now.
"""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from backports import zstd
from sqlalchemy import Connection, LargeBinary, Table, delete, func, insert, inspect, select, update
from sqlalchemy.exc import SQLAlchemyError

from wbfuse.store.contract import ROOT_INO
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.layout import pack_of
from wbfuse.store.volume.objects import MARK, Objects
from wbfuse.store.volume.schema import (
    LIVE,
    VERSION,
    counters,
    dentries,
    dumps,
    extents,
    inodes,
    layers,
    metadata,
    orphans,
    packs,
    settings,
    xattrs,
)

TABLES: tuple[Table, ...] = (settings, counters, inodes, dentries, xattrs, layers, packs, extents, orphans)
FOLDER = "dumps"
KEEP = 3
"""Dumps kept in the bucket."""
_FORMAT = "wbfuse-dump"
_ROWS = 5000
_STUCK_NS = 6 * 3600 * 10**9
_CHUNK = 1 << 20
_ZSTD: dict[int, int] = {zstd.CompressionParameter.compression_level: 3, zstd.CompressionParameter.checksum_flag: 1}

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


class DumpError(Exception):
    """It is no dump, or not a whole one; one line for the person who asked."""


def write_dump(database: Database, out: BinaryIO, progress: Progress = lambda _done, _all: None) -> int:
    """Write everything, as of one moment. Answers the number of rows."""
    with database.snapshot() as c:
        total = sum(c.execute(select(func.count()).select_from(t)).scalar_one() for t in TABLES)
        done = 0
        with zstd.ZstdFile(out, "wb", options=_ZSTD) as packed:
            packed.write(_line({"format": _FORMAT, "version": VERSION, "rows": total, "made_ns": time.time_ns()}))
            for table in TABLES:
                binary = [i for i, column in enumerate(table.c) if isinstance(column.type, LargeBinary)]
                rows = c.execution_options(yield_per=_ROWS).execute(select(table))
                for part in rows.partitions():
                    packed.write(b"".join(_line([table.name, *_texts(row, binary)]) for row in part))
                    done += len(part)
                    progress(done, total)
            packed.write(_line({"end": done}))
    return done


def _line(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _texts(row: Any, binary: list[int]) -> list[Any]:
    values = list(row)
    for i in binary:
        if values[i] is not None:
            values[i] = base64.b64encode(values[i]).decode()
    return values


def read_dump(source: BinaryIO) -> Iterator[Any]:
    """The header as a dict, then (table, row as a dict). Raises DumpError, also where the end is missing."""
    try:
        with zstd.ZstdFile(source, "rb") as packed:
            lines = io.BufferedReader(packed, _CHUNK)
            header: dict[str, Any] | None = None
            count = 0
            for line in lines:
                value = json.loads(line)
                if header is None:
                    header = _header(value)
                    yield header
                elif isinstance(value, dict):
                    if value.get("end") != count:
                        raise DumpError("rows are missing")
                    if lines.read(1):  # and with that its checksum, which stands behind it, is seen
                        raise DumpError("something follows its end")
                    return
                else:
                    yield _row(value)
                    count += 1
    except (zstd.ZstdError, EOFError, ValueError, KeyError, TypeError, IndexError) as e:
        raise DumpError(f"not a whole dump: {e}") from e
    raise DumpError("the end is missing")


def _header(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise DumpError("not a dump of a wbfuse volume")
    if not isinstance(value["version"], int) or not isinstance(value["rows"], int):
        raise DumpError("its first line is none")
    if value["version"] > VERSION:
        raise DumpError(f"made by a newer wbfuse (version {value['version']}, this one knows {VERSION}); update it")
    return value


_BY_NAME = {t.name: t for t in TABLES}


def _row(value: list[Any]) -> tuple[Table, dict[str, Any]]:
    table = _BY_NAME[value[0]]
    out = {}
    for column, item in zip(table.c, value[1:], strict=True):
        binary = isinstance(column.type, LargeBinary) and item is not None
        out[column.name] = base64.b64decode(item) if binary else item
        if not isinstance(out[column.name], column.type.python_type) and not (item is None and column.nullable):
            raise DumpError(f"a row of {table.name} has {item!r} as {column.name}")
    return table, out


def dump_to_bucket(database: Database, objects: Objects, progress: Progress = lambda _done, _all: None) -> str:
    """A new dump in the bucket; the oldest beyond KEEP goes. Answers its key. Raises OSError."""

    def next_number(c: Connection) -> int:
        at = counters.c.name == "dump"
        return int(
            c.execute(
                update(counters).where(at).values(value=counters.c.value + 1).returning(counters.c.value)
            ).scalar_one()
        )

    number = database.transact(next_number)
    # Its row comes first: from here on gc keeps what this dump is going to name.
    objects.check_owner()
    database.transact(lambda c: c.execute(insert(dumps).values(number=number, made_ns=time.time_ns(), size=0)))
    buffer = io.BytesIO()
    try:
        write_dump(database, buffer, progress)
        key = f"{FOLDER}/{number:012d}"
        objects.put(key, [buffer.getbuffer()])
    except BaseException:
        # Its answer may be all that was lost: a dump that is there must be known, or gone.
        objects.delete(f"{FOLDER}/{number:012d}")
        database.transact(lambda c: c.execute(delete(dumps).where(dumps.c.number == number)))
        raise
    size = len(buffer.getbuffer())
    database.transact(
        lambda c: c.execute(update(dumps).where(dumps.c.number == number).values(size=size)), durable=True
    )
    # One without a size is being made, or its maker died: it is none to rely on, nor counted.
    whole = select(dumps.c.number).where(dumps.c.size > 0).order_by(dumps.c.number)
    numbers = database.query(lambda c: list(c.execute(whole).scalars()))
    stuck = (dumps.c.size == 0) & (dumps.c.made_ns < time.time_ns() - _STUCK_NS)
    numbers = [*database.query(lambda c: c.execute(select(dumps.c.number).where(stuck)).scalars().all()), *numbers]
    for old in numbers[:-KEEP]:
        objects.delete(f"{FOLDER}/{old:012d}")
        database.transact(lambda c, old=old: c.execute(delete(dumps).where(dumps.c.number == old)))  # type: ignore[misc]
    return key


def _dumps_in(objects: Objects) -> list[tuple[str, int]]:
    """(key, size) of the dumps in a bucket."""
    return [(key, size) for key, size in objects.list(FOLDER) if key.rpartition("/")[2].isdigit()]


def newest_dump(objects: Objects) -> str:
    """The key of the newest dump in a bucket. Raises DumpError where there is none."""
    keys = sorted(key for key, _ in _dumps_in(objects))
    if not keys:
        raise DumpError("there is no dump in this bucket")
    return keys[-1]


def load_dump(
    database: Database, source: BinaryIO, objects: Objects, data: str, progress: Progress = lambda _done, _all: None
) -> str:
    """Fill an empty database from a dump. Answers the volume's new uuid: the old database is not to be used again.

    Raises DumpError; nothing is kept then.
    """
    fresh = str(uuid.uuid4())
    owners = objects.owners()
    used = max((pack_of(key) or 0 for key, _ in objects.list("packs")), default=0)
    there = {
        int(key.rpartition("/")[2]): size for key, size in objects.list(FOLDER) if key.rpartition("/")[2].isdigit()
    }
    last_dump = max(there, default=0)
    if set(metadata.tables) & set(inspect(database.engine).get_table_names()):
        raise DumpError("the database is not empty: it has tables of the same names")
    metadata.create_all(database.engine)

    def fill(c: Connection) -> None:
        rows = read_dump(source)
        total = next(rows)["rows"]
        waiting: dict[Table, list[dict[str, Any]]] = {}
        done = 0
        for table, row in rows:
            if table is packs and row["state"] != LIVE:
                continue  # they may have become live after this dump; a newer one may name them
            batch = waiting.setdefault(table, [])
            batch.append(row)
            if len(batch) >= _ROWS:
                c.execute(insert(table), batch)
                done += len(batch)
                batch.clear()
                progress(done, total)
        for table, batch in waiting.items():
            if batch:
                c.execute(insert(table), batch)
        progress(total, total)
        _see_that_it_fits(c, owners)
        for name, value in (("uuid", fresh), ("data", data)):
            c.execute(update(settings).where(settings.c.name == name).values(value=value))
        # Numbers that were used after the dump must never be used again: their objects may be there.
        beyond = counters.c.value + (1 << 20)
        c.execute(update(counters).where(counters.c.name == "id").values(value=beyond))
        c.execute(update(counters).where(counters.c.name == "id", counters.c.value <= used).values(value=used + 1))
        c.execute(
            update(counters).where(counters.c.name == "dump", counters.c.value < last_dump).values(value=last_dump)
        )
        if there:  # gc must keep what these name: one may be loaded again
            now = time.time_ns()
            c.execute(
                insert(dumps), [{"number": n, "made_ns": now, "size": s, "foreign": True} for n, s in there.items()]
            )

    try:
        database.transact(fill, durable=True)
        objects.put(MARK, ["\n".join([fresh, *owners]).encode()], replace=True)
    except BaseException as e:
        metadata.drop_all(database.engine)
        if isinstance(e, SQLAlchemyError | TypeError | OverflowError | KeyError | IndexError):
            raise DumpError(f"not a dump that can be used: {type(e).__name__}: {e}") from e
        raise
    return fresh


def _see_that_it_fits(c: Connection, owners: list[str]) -> None:
    """The rows are those of a volume, and of the one that this bucket has or had. Raises DumpError."""
    found = {r.name: r.value for r in c.execute(select(settings)).all()}
    if not {"uuid", "version", "data", "pack_size", "compress"} <= found.keys() or not found["pack_size"].isdigit():
        raise DumpError("the settings of the volume are not in it")
    if c.execute(select(inodes.c.ino).where(inodes.c.ino == ROOT_INO)).first() is None:
        raise DumpError("the root directory is not in it")
    if set(c.execute(select(counters.c.name)).scalars()) < {"id", "session", "sync", "dump"}:
        raise DumpError("the counters of the volume are not in it")
    if found["uuid"] not in owners:
        raise DumpError(f"it is of another volume ({found['uuid']}) than this bucket ({owners[0]})")
