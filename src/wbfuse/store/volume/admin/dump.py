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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from backports import zstd
from sqlalchemy import Connection, LargeBinary, Table, delete, func, insert, select, update

from wbfuse.store.volume.database import Database
from wbfuse.store.volume.objects import Objects
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
_CHUNK = 1 << 20

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


class DumpError(Exception):
    """It is no dump, or not a whole one; one line for the person who asked."""


def write_dump(database: Database, out: BinaryIO, progress: Progress = lambda _done, _all: None) -> int:
    """Write everything, as of one moment. Answers the number of rows."""
    with database.snapshot() as c:
        total = sum(c.execute(select(func.count()).select_from(t)).scalar_one() for t in TABLES)
        done = 0
        with zstd.ZstdFile(out, "wb", level=3) as packed:
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
            lines: Iterable[bytes] = io.BufferedReader(packed, _CHUNK)
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
                    return
                else:
                    yield _row(value)
                    count += 1
    except (zstd.ZstdError, EOFError, ValueError, KeyError) as e:
        raise DumpError(f"not a whole dump: {e}") from e
    raise DumpError("the end is missing")


def _header(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise DumpError("not a dump of a wbfuse volume")
    if value["version"] > VERSION:
        raise DumpError(f"made by a newer wbfuse (version {value['version']}, this one knows {VERSION}); update it")
    return value


_BY_NAME = {t.name: t for t in TABLES}


def _row(value: list[Any]) -> tuple[Table, dict[str, Any]]:
    table = _BY_NAME[value[0]]
    out = {}
    for column, item in zip(table.c, value[1:], strict=True):
        out[column.name] = base64.b64decode(item) if isinstance(column.type, LargeBinary) and item is not None else item
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
    numbers = database.query(lambda c: list(c.execute(select(dumps.c.number).order_by(dumps.c.number)).scalars()))
    for old in numbers[:-KEEP]:
        objects.delete(f"{FOLDER}/{old:012d}")
        database.transact(lambda c, old=old: c.execute(delete(dumps).where(dumps.c.number == old)))  # type: ignore[misc]
    return key


def newest_dump(objects: Objects) -> str:
    """The key of the newest dump in a bucket. Raises DumpError where there is none."""
    keys = sorted(key for key, _ in objects.list(FOLDER))
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
    used = max((int(key.rpartition("/")[2], 16) for key, _ in objects.list("packs")), default=0)
    there = {int(key.rpartition("/")[2]): size for key, size in objects.list(FOLDER)}
    last_dump = max(there, default=0)
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
    except BaseException:
        metadata.drop_all(database.engine)
        raise
    return fresh
