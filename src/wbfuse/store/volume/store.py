"""VolumeStore: a volume as a Store, put together from its parts, and `format`, which makes one."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sqlalchemy import Connection, func, insert, inspect, select
from sqlalchemy.exc import NoResultFound

from wbfuse.journal import Journal, Kind
from wbfuse.store.contract import ROOT_INO, Capabilities, SourceError, Store
from wbfuse.store.volume.compact import Compactor
from wbfuse.store.volume.data import VolumeData
from wbfuse.store.volume.database import Database, DatabaseError
from wbfuse.store.volume.frames import DiskCache, FrameCache
from wbfuse.store.volume.housekeeping import Housekeeper
from wbfuse.store.volume.leases import Leases
from wbfuse.store.volume.maps import Maps
from wbfuse.store.volume.names import MOVES, path_of
from wbfuse.store.volume.nodes import Nodes
from wbfuse.store.volume.objects import MARK, Objects, ObjectsError, explain
from wbfuse.store.volume.packer import COMPRESS
from wbfuse.store.volume.reaper import Reaper, leftovers
from wbfuse.store.volume.rows import MAX_SIZE
from wbfuse.store.volume.schema import VERSION, counters, inodes, metadata, orphans, packs, settings
from wbfuse.store.volume.sessions import Session, VolumeBusyError, fence, noted
from wbfuse.store.volume.staging import Staging
from wbfuse.wire.types import Statfs

log = logging.getLogger(__name__)

MIB = 1 << 20
PACK_SIZE = 16 * MIB
_FIRST_ID = 1024
_UPLOADS = 8
_STATFS_SECONDS = 5.0
_PLENTY = 1 << 50
SECRET = re.compile(r"secret|token|password|key", re.IGNORECASE)


class VolumeError(SourceError):
    """The volume cannot serve; one line for the person who asked."""


@dataclass(slots=True)
class Tuning:
    """How a volume is mounted. Sizes in bytes, times in seconds."""

    options: dict[str, str] = field(default_factory=dict)
    """Of the object store: endpoint, region, access_key_id, secret_access_key, profile ..."""
    shared: bool = False
    lease_wait: float = 0.0
    session_timeout: float = 20.0
    attr_timeout: float = 1.0
    cache_dir: str | None = None
    cache_size: int = 10 << 30
    memory: int = 128 * MIB
    readahead: int = 32 * MIB
    compact_rate: float = 20e6
    """Bytes a second that compaction may take; 0: no compaction."""
    dump_interval: float = 3600.0


def read_settings(database: Database) -> dict[str, str]:
    """The volume's settings. Raises VolumeError where this is no volume, or one that a newer wbfuse made."""
    where = database.url.render_as_string()
    if not inspect(database.engine).has_table(settings.name):
        raise VolumeError(f"{where}: no volume here; make one with: wbfuse format META --data URL")
    found: dict[str, str] = {r.name: r.value for r in database.query(lambda c: c.execute(select(settings)).all())}
    if "version" not in found:
        raise VolumeError(f"{where}: no volume here; make one with: wbfuse format META --data URL")
    if int(found["version"]) > VERSION:
        raise VolumeError(
            f"{where}: made by a newer wbfuse (volume version {found['version']}, this one knows {VERSION}); update it"
        )
    return found


def uuid_of(meta: str) -> str:
    """Of the volume whose database is `meta`. Raises VolumeError."""
    try:
        database = Database(meta)
    except DatabaseError as e:
        raise VolumeError(str(e)) from e
    try:
        return read_settings(database)["uuid"]
    finally:
        database.close()


def notes_of(meta: str) -> tuple[list[str], Callable[[], None]]:
    """The notes of logs that sessions of a volume have left, and how to end those. Raises VolumeError."""
    try:
        database = Database(meta)
    except DatabaseError as e:
        raise VolumeError(str(e)) from e
    read_settings(database)
    found = database.query(noted)

    def act(c: Connection) -> None:
        for session in found:
            fence(c, session)

    return list(found.values()), lambda: database.transact(act, durable=True)


def paths_in(meta: str) -> Callable[[int], str]:
    """One path of each inode of a volume, empty where it has none. Raises VolumeError."""
    try:
        database = Database(meta)
    except DatabaseError as e:
        raise VolumeError(str(e)) from e
    read_settings(database)
    return partial(path_of, database)


def open_objects(found: dict[str, str], options: dict[str, str]) -> Objects:
    """The bucket of a volume, seen to be its own. Raises VolumeError."""
    saved = {name[7:]: value for name, value in found.items() if name.startswith("option.")}
    try:
        objects = Objects(found["data"], saved | options)
        objects.own(found["uuid"])
    except ObjectsError as e:
        raise VolumeError(str(e)) from e
    except FileNotFoundError as e:
        raise VolumeError(f"{found['data']}: no volume is there (or no such bucket): {e.strerror}") from e
    except OSError as e:
        if e.errno == errno.EPERM:
            raise VolumeError(f"{found['data']}: {e.strerror}; was it loaded into another database?") from e
        raise VolumeError(f"{found['data']}: {explain(e)}") from e
    return objects


def format_volume(
    meta: str, data: str, options: dict[str, str], pack_size: int = PACK_SIZE, compress: str = "none"
) -> dict[str, str]:
    """Make an empty volume. Answers its settings. Raises VolumeError; nothing is changed then."""
    if not MIB <= pack_size <= 1 << 30:
        raise VolumeError("a pack is 1MiB to 1GiB")
    try:
        database = Database(meta, create=True)
    except DatabaseError as e:
        raise VolumeError(str(e)) from e
    try:
        taken = set(metadata.tables) & set(inspect(database.engine).get_table_names())
        if taken:
            what = "a volume" if settings.name in taken else f"a table {min(taken)!r}"
            raise VolumeError(f"{database.url.render_as_string()}: there is {what} already; use another database")
        values = {
            "uuid": str(uuid.uuid4()), "version": str(VERSION), "data": data, "pack_size": str(pack_size),
            "compress": compress, MOVES: "", "made": str(int(time.time())),
        } | {f"option.{name}": value for name, value in options.items() if not SECRET.search(name)}  # fmt: skip
        try:
            objects = Objects(data, options)
            objects.probe()
            try:
                objects.put(MARK, [values["uuid"].encode()])
            except FileExistsError:
                mark = objects.owners()[0]
                raise VolumeError(f"{data}: holds a volume already ({mark}); use another prefix") from None
        except ObjectsError as e:
            raise VolumeError(str(e)) from e
        except OSError as e:
            raise VolumeError(f"{data}: {explain(e)}") from e
        now = time.time_ns()
        root = {
            "ino": ROOT_INO, "version": 1, "mode": stat.S_IFDIR | 0o755, "uid": os.geteuid(), "gid": os.getegid(),
            "nlink": 2, "rdev": 0, "size": 0, "bytes": 0, "atime_ns": now, "mtime_ns": now, "ctime_ns": now, "layer": 0,
            "parent": ROOT_INO, "target": None,
        }  # fmt: skip

        def fill(c: Any) -> None:
            c.execute(insert(counters), [{"name": "id", "value": _FIRST_ID}, {"name": "session", "value": 0},
                                         {"name": "sync", "value": 0}, {"name": "dump", "value": 0}])  # fmt: skip
            c.execute(insert(inodes).values(root))
            c.execute(insert(settings), [{"name": n, "value": v} for n, v in values.items()])

        try:
            metadata.create_all(database.engine)
            database.transact(fill, durable=True)
        except BaseException:  # also Ctrl-C: half a volume would be in the way of the next try
            metadata.drop_all(database.engine)
            objects.delete(MARK)
            raise
        return values
    finally:
        database.close()


class VolumeStore(VolumeData, Store):
    """Serve the volume whose database is `meta`. Raises VolumeError.

    `journal` keeps what a server that comes after this one must know. `guardian`: the pid of who starts that one.
    `unwritten`: as Session has it.
    """

    def __init__(
        self, meta: str, tuning: Tuning | None = None, waiting: Callable[[str], None] = lambda _text: None,
        journal: Journal | None = None, guardian: int = 0, unwritten: Callable[[str], str] = lambda _note: "",
    ) -> None:  # fmt: skip
        tuning = tuning or Tuning()
        journal = journal or Journal()
        before = journal.inherited(Kind.SESSION).get(0)
        number = None if before is None else int.from_bytes(before, "little")
        try:
            self.database = Database(meta)
        except DatabaseError as e:
            raise VolumeError(str(e)) from e
        try:
            self.settings = read_settings(self.database)
            self.objects = open_objects(self.settings, tuning.options)
            self.session = Session(
                self.database, tuning.shared, tuning.session_timeout, waiting, guardian, number, unwritten
            )
            journal.put(Kind.SESSION, 0, self.session.number.to_bytes(8, "little"))
        except VolumeBusyError as e:
            self.database.close()
            raise VolumeError(f"{meta}: {e}") from e
        except BaseException:
            self.database.close()
            raise
        self.pack_size = int(self.settings["pack_size"])
        self.compress = COMPRESS[self.settings["compress"]]
        disk = None
        if tuning.cache_dir is not None:
            try:
                disk = DiskCache(os.path.join(tuning.cache_dir, self.settings["uuid"]), tuning.cache_size)
            except OSError as e:
                self.session.close()
                self.database.close()
                raise VolumeError(f"{tuning.cache_dir}: cannot be used as --cache: {e.strerror}") from e
        self.frames = FrameCache(self.objects, self.settings["compress"], tuning.memory, disk)
        self.nodes = Nodes(tuning.attr_timeout if tuning.shared else None, inherited=number is not None)
        self._attr_timeout = tuning.attr_timeout
        self.leases = None
        if tuning.shared:
            self.leases = Leases(self.database, self.session, tuning.lease_wait, self.removed, self.nodes.held)
        self._init_names()
        self._init_reads(min(tuning.readahead, tuning.memory // 4))
        self.maps = Maps()
        self.reaper = Reaper(self.database, self.objects, self.session.number)
        self.workers = ThreadPoolExecutor(_UPLOADS, "upload")
        self.staging = Staging(
            self.database, self.session, self.objects, self.frames, self.pack_size, self.compress, self.workers,
            self.reaper.put_packs,
        )  # fmt: skip
        self.compactor = Compactor(self, tuning.compact_rate)
        self.housekeeper = Housekeeper(self.database, self.objects, self.session, tuning.dump_interval)
        self._statfs: tuple[float, int] = (-1e9, 0)
        try:
            self.nodes.learn(self._row_of_root(), lookups=1)
        except (OSError, NoResultFound) as e:
            self.close()
            raise VolumeError(f"{meta}: the root directory cannot be read: {e}; see: wbfuse check {meta}") from e
        inos, layers, numbers = self.database.query(lambda c: leftovers(c, 100_000))
        self.reaper.put_inodes(inos)
        self.reaper.put_layers(layers)
        self.reaper.put_packs(numbers)

    def _row_of_root(self) -> Any:
        return self.database.query(lambda c: c.execute(select(inodes).where(inodes.c.ino == ROOT_INO)).one())

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            atomic_commit=True, preferred_piece=self.pack_size, max_file_size=MAX_SIZE, stages=True,
            group_bytes=self.pack_size, clones=True, quick_names=True, shared=self.leases is not None,
            attr_timeout=self._attr_timeout,
        )  # fmt: skip

    def close(self) -> None:
        self.housekeeper.close()
        self.compactor.close()
        if self.leases is not None:
            self.leases.close()
        self.reaper.close()
        self.workers.shutdown()
        self.frames.close()
        self.session.close()
        self.database.close()

    def taken_over(self) -> None:
        if self.leases is not None:
            self.leases.forget_others()
        mine = select(orphans.c.ino).where(orphans.c.session == self.session.number)
        found = self.database.query(lambda c: list(c.execute(mine).scalars()))
        self.reaper.put_inodes([ino for ino in found if not self.nodes.held(ino)])

    def note_log(self, note: str | None) -> None:
        self.session.note_log(note)

    def noted_log(self) -> str | None:
        return self.session.noted_log()

    def counters(self) -> dict[str, int]:
        cache = self.frames
        return {
            "bytes_fetched": cache.fetched, "frame_hits": cache.hits, "frame_misses": cache.misses,
            "bytes_compacted": self.compactor.bytes,
        }  # fmt: skip

    def statfs(self) -> Statfs:
        """What packs take of a petabyte: a bucket has no end."""
        now = time.monotonic()
        if now - self._statfs[0] > _STATFS_SECONDS:
            used = self.database.query(
                lambda c: c.execute(select(func.coalesce(func.sum(packs.c.size), 0))).scalar_one()
            )
            self._statfs = now, int(used)
        free = max(0, _PLENTY - self._statfs[1]) // 4096
        return Statfs(_PLENTY // 4096, free, free, 1 << 40, 1 << 40)
