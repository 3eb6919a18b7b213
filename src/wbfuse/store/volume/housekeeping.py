"""What a mount does for its volume at intervals: collect garbage, and keep a dump in the bucket."""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy import func, select

from wbfuse.store.volume.admin.dump import dump_to_bucket
from wbfuse.store.volume.admin.gc import collect
from wbfuse.store.volume.database import Database
from wbfuse.store.volume.objects import Objects
from wbfuse.store.volume.schema import dumps, inodes
from wbfuse.store.volume.sessions import Session

log = logging.getLogger(__name__)

GC_SECONDS = 60.0
LOOK_SECONDS = 10.0
"""How often it is made sure that the bucket is this volume's still."""


class Housekeeper:
    """One thread. `dump_interval`: seconds between dumps where anything changed; 0 for none."""

    def __init__(self, database: Database, objects: Objects, session: Session, dump_interval: float) -> None:
        self._database = database
        self._session = session
        self._objects = objects
        self._dump_interval = dump_interval
        self._dumped: tuple[int, ...] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        due = GC_SECONDS
        while not self._ended.wait(LOOK_SECONDS):
            due -= LOOK_SECONDS
            acts = [self._look]
            if due <= 0:
                due = GC_SECONDS
                acts += [self._collect, self._dump]  # a dump that finds the store full must not keep it full
            for act in acts:
                try:
                    act()
                except Exception as e:  # noqa: BLE001 - it will be tried again
                    log.warning("housekeeping: %s", e)

    def _look(self) -> None:
        """Where the volume was loaded into another database, nothing more may be committed to this one."""
        try:
            self._objects.check_owner()
        except PermissionError as e:
            log.error("%s: fenced", e.strerror)
            self._session.give_up()

    def _collect(self) -> None:
        collect(self._database, self._objects, stop=self._ended.is_set)

    def _dump(self) -> None:
        """Dump, where the last one is old and something has changed since this mount made one."""
        if not self._dump_interval:
            return
        newest = self._database.query(lambda c: c.execute(select(func.max(dumps.c.made_ns))).scalar_one())
        if newest is not None and time.time_ns() - newest < self._dump_interval * 1e9:
            return
        everything = (func.count(), func.sum(inodes.c.version), func.max(inodes.c.ino), func.max(inodes.c.ctime_ns))
        state = tuple(self._database.query(lambda c: c.execute(select(*everything)).one()))
        if self._dumped != state:
            log.info("dumped to %s", dump_to_bucket(self._database, self._objects))
            self._dumped = state
